"""`lmd bench` as a person and as a script run it."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from llamacpp_mqtt_deploy.commands.bench_load import Round, Sampled, compared, summary
from tests.client.terminal import Terminal, lmd
from tests.client.worker import PlayedWorker, answer_in_words
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker


class Crowd:
    """Answers when as many requests wait as there are streams, and counts the most that ever waited."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self.most = 0

    def __call__(self, worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        with self._lock:
            self._waiting.append((session, request))
            self.most = max(self.most, len(self._waiting))
            ready = self._waiting if len(self._waiting) == self._streams else []
            if ready:
                self._waiting = []
        for each in ready:
            answer_in_words(worker, *each)


def test_on_a_pipe_the_figures_are_json(broker: Mosquitto, environment: dict[str, str]) -> None:
    crowd = Crowd(2)
    arguments = ("--streams", "2", "--requests", "6", "--max-tokens", "9", "one two three")
    with PlayedWorker(broker.port, play=crowd) as worker:
        result = lmd("bench", "--port", str(broker.port), *arguments, environment=environment)
        assert (result.returncode, result.stderr) == (0, b"")
        asked = [json.loads(payload) for _, payload in worker.requests]
        sessions = {session for session, _ in worker.requests}
        eventually(lambda: {(name, "delete") for name in sessions}
                   == {(name, control["action"]) for name, control in worker.controls})  # fmt: skip
    figures = json.loads(result.stdout)
    assert figures["streams"] == 2
    assert figures["bus"]["answered"] == 6
    assert figures["bus"]["tokens"] == figures["bus"]["chunks"] == 18
    assert figures["bus"]["errors"] == {}
    assert figures["bus"]["tokens_per_s"] > 0
    assert 0 < figures["bus"]["first_token_ms"]["p50"] <= figures["bus"]["first_token_ms"]["p99"]
    assert "direct" not in figures
    assert crowd.most == 2, "more at once than there are streams"
    assert len(sessions) == 2
    assert {(each["prompt"], each["max_tokens"], each["new"]) for each in asked} == {("one two three", 9, True)}


def test_on_a_terminal_it_is_a_table(broker: Mosquitto, environment: dict[str, str]) -> None:
    with (
        PlayedWorker(broker.port),
        Terminal(["bench", "--port", str(broker.port), "--requests", "3"], environment=environment) as terminal,
    ):
        assert terminal.wait() == 0
    assert "3 of 3 requests" in terminal.text
    assert "first token, p99, ms" in terminal.text


def test_no_prompt_is_asked_twice_unless_one_is_given(
    broker: Mosquitto, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with PlayedWorker(broker.port) as worker:
        assert lmd("bench", "--port", str(broker.port), "--requests", "4", environment=environment).returncode == 0
        assert len({json.loads(payload)["prompt"] for _, payload in worker.requests}) == 4
        worker.requests.clear()
        file = tmp_path_factory.mktemp("prompts") / "questions.txt"
        file.write_text("größer\n\nkleiner\n", "utf-8")
        flags = ("--requests", "3", "--prompts", str(file))
        assert lmd("bench", "--port", str(broker.port), *flags, environment=environment).returncode == 0
        assert [json.loads(payload)["prompt"] for _, payload in worker.requests] == ["größer", "kleiner", "größer"]
        assert lmd("bench", *flags, "hello", environment=environment).returncode == 2


def test_a_worker_that_refuses_is_not_asked_ever_more_often(broker: Mosquitto, environment: dict[str, str]) -> None:
    def refuse(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="error", seq=0, final=True, code="busy", message="Full.", retryable=True)

    with PlayedWorker(broker.port, play=refuse) as worker:
        flags = ("--streams", "3", "--requests", "900")
        result = lmd("bench", "--port", str(broker.port), *flags, environment=environment)
        assert len(worker.requests) == 6
    assert result.returncode == 5
    assert json.loads(result.stdout)["bus"]["errors"] == {"busy": 6}
    assert b"6 of the requests failed; the first one: busy: Full." in result.stderr


def test_ctrl_c_cancels_what_runs_and_prints_what_there_is(broker: Mosquitto, environment: dict[str, str]) -> None:
    def begin(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if len(worker.requests) == 1:
            answer_in_words(worker, session, request)
            return
        worker.say(session, request, type="start", protocol=1, model="played", worker="played", created=0)
        worker.say(session, request, type="chunk", seq=0, content="one ")

    with PlayedWorker(broker.port, play=begin) as worker:
        arguments = ["bench", "--port", str(broker.port), "--requests", "50"]
        with Terminal(arguments, environment=environment) as terminal:
            terminal.shows("1 of 50 requests")
            eventually(lambda: len(worker.requests) == 2)
            terminal.interrupt()
            eventually(lambda: any(control["action"] == "cancel" for _, control in worker.controls))
            session, payload = worker.requests[1]
            worker.done(session, json.loads(payload), "one ", seq=1, reason="cancelled")
            assert terminal.wait() == 130
        assert len(worker.requests) == 2
    assert "requests answered" in terminal.text


def test_without_a_worker_it_says_so(broker: Mosquitto, environment: dict[str, str]) -> None:
    result = lmd("bench", "--port", str(broker.port), "--requests", "1", environment=environment)
    assert result.returncode == 4
    assert b"worker" in result.stderr


def test_the_figures_are_medians_of_rounds_and_percentiles_of_requests() -> None:
    def seen(asked: float, first: float, ended: float) -> Sampled:
        one = Sampled(asked, ended=ended, tokens=10)
        for at in (first, first + 0.01, first + 0.04):
            one.chunk(at)
        return one

    bus = summary([Round([seen(0, 0.1, 1), seen(0, 0.3, 2)]), Round([seen(5, 5.1, 6)]), Round()])
    assert bus["tokens_per_s"] == 10  # 20 tokens in 2 s, 10 in 1 s
    assert bus["first_token_ms"] == {"p50": 100.0, "p99": 300.0, "max": 300.0}
    assert bus["chunk_pause_ms"] == {"p50": 30.0, "p99": 30.0, "max": 30.0}
    direct = summary([Round([seen(0, 0.05, 0.5)])])
    assert compared(bus, direct) == {"tokens_per_s": 0.5, "first_token_later_ms": {"p50": 50.0, "p99": 250.0}}
    assert compared(summary([Round()]), direct)["tokens_per_s"] is None
