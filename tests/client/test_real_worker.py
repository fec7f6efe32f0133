"""The bus client and a real worker: `lmd run` between a real mosquitto and a real llama.cpp server."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.client import AnswerError, BusClient
from tests.client.terminal import lmd
from tests.client.worker import PASSWORDS
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.sham_server import DONE, ShamServer, delta, stream
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]


@contextlib.contextmanager
def working(engine_url: str, guarded: Mosquitto, environment: dict[str, str], tmp_path: Path) -> Iterator[BusClient]:
    """A client of a worker that is up, in front of this engine."""
    settings = {
        "LMD_MQTT__HOST": "127.0.0.1",
        "LMD_MQTT__PORT": str(guarded.port),
        "LMD_MQTT__USERNAME": "worker",
        "LMD_MQTT__PASSWORD": PASSWORDS["worker"],
        "LMD_MQTT__WORKER_ID": "real",
        "LMD_ENGINE__URL": engine_url,
        "LMD_SESSIONS__PATH": str(tmp_path / "state.db"),
        "LMD_STREAMING__HEARTBEAT_S": "1",
    }
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "llamacpp_mqtt_deploy", "run"], env=environment | settings, stderr=log
        )
    try:
        with BusClient("127.0.0.1", guarded.port, username="alice", password=PASSWORDS["alice"]) as client:
            client.status(wait_s=30)
            # A worker that starts says `offline` until it is subscribed.
            eventually(lambda: client.status()["real"]["state"] == "online", 30.0)
            yield client
    finally:
        worker.terminate()
        worker.wait(30)


@pytest.fixture
def bus(
    guarded: Mosquitto, llama_server: LlamaServer, environment: dict[str, str], tmp_path: Path
) -> Iterator[BusClient]:
    with working(llama_server.url, guarded, environment, tmp_path) as client:
        yield client


def test_an_answer_that_arrives_in_one_read_is_told_once(
    guarded: Mosquitto, environment: dict[str, str], tmp_path: Path
) -> None:
    with ShamServer() as engine:
        text = [delta(content="a fast engine"), delta(content=" is done at once"), delta("stop"), DONE]
        engine.on("/v1/chat/completions", stream(b"".join(text)))
        with working(engine.url, guarded, environment, tmp_path) as client:
            answer = client.ask("hi")
            assert "".join(answer) == "a fast engine is done at once" == answer.result().content


def test_an_operator_sees_a_worker_drains_it_and_resumes_it(
    guarded: Mosquitto, environment: dict[str, str], tmp_path: Path
) -> None:
    password_file = tmp_path / "operator"
    password_file.write_text(PASSWORDS["operator"])
    password_file.chmod(0o600)
    flags = ["--port", str(guarded.port), "--username", "operator", "--password-file", str(password_file)]
    with ShamServer() as engine, working(engine.url, guarded, environment, tmp_path):
        for words, state in ((["drain"], "draining"), (["resume"], "online"), (["log-level", "debug"], "online")):
            result = lmd("admin", *words, *flags, environment=environment)
            assert (result.returncode, result.stderr) == (0, b"")
            shown = lmd("status", *flags, environment=environment)
            assert shown.returncode == 0
            assert shown.stdout.decode().splitlines()[1].split()[:2] == ["real", state]
        foreign = lmd("admin", "restart-engine", *flags, environment=environment)
        assert foreign.returncode == 1
        assert b"unsupported" in foreign.stderr


def test_the_pieces_of_short_answers_join_to_the_whole(bus: BusClient) -> None:
    for number in range(30):
        answer = bus.ask("hello there", session=f"alice/s{number}", max_tokens=1 + number % 5)
        pieces = "".join(answer)
        assert pieces == answer.result().content


def test_a_count_is_what_the_same_request_is_told_as_its_prompt(bus: BusClient) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count me, please."}]
    done = bus.ask(messages=messages, max_tokens=1).result(30)
    assert bus.count_tokens(messages=messages) == done.usage["prompt_tokens"]
    with pytest.raises(AnswerError, match="model_not_found"):
        bus.count_tokens("hi", model="nope")
    with pytest.raises(AnswerError, match="payload_too_large"):
        bus.count_tokens("x" * 2**20)


def test_a_conversation_a_cancel_and_a_refusal(bus: BusClient) -> None:
    bus.ask("one", max_tokens=3).result(30)
    done = bus.ask("two", max_tokens=3).result(30)
    assert [message["role"] for message in bus.history()] == ["user", "assistant", "user", "assistant"]
    assert bus.history()[-1]["content"] == done.content
    answer = bus.ask("long", max_tokens=7000)
    next(iter(answer))
    answer.cancel()
    assert answer.result(30).cancelled
    with pytest.raises(AnswerError, match="model_not_found"):
        bus.ask("hi", model="nope").result(30)
    assert bus.control(None, "reset")["status"] == "ok"
    assert bus.history() == []


def test_an_answer_outlives_a_restart_of_the_broker(bus: BusClient, guarded: Mosquitto) -> None:
    answer = bus.ask("hello", max_tokens=3000)
    pieces = iter(answer)
    first = next(pieces)
    guarded.kill()
    guarded.start()
    assert first + "".join(pieces) == answer.result(60).content


def test_ask_leaves_no_session_behind(
    bus: BusClient, guarded: Mosquitto, environment: dict[str, str], tmp_path: Path
) -> None:
    password_file = tmp_path / "alice"
    password_file.write_text(PASSWORDS["alice"])
    password_file.chmod(0o600)
    flags = ["--port", str(guarded.port), "--username", "alice", "--password-file", str(password_file)]
    result = lmd("ask", *flags, "--max-tokens", "3", "hi", environment=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.endswith(os.linesep.encode())


def test_a_live_deployment_is_measured_beside_its_engine(
    llama_server: LlamaServer, guarded: Mosquitto, environment: dict[str, str], tmp_path: Path
) -> None:
    password = tmp_path / "password"
    password.write_text(PASSWORDS["alice"])
    password.chmod(0o600)
    user = ("--host", "127.0.0.1", "--port", str(guarded.port), "-u", "alice", "--password-file", str(password))
    with working(llama_server.url, guarded, environment, tmp_path):
        load = ("--direct", llama_server.url, "--streams", "2", "--requests", "6", "--max-tokens", "20")
        result = lmd("bench", *user, *load, environment=environment)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["bus"]["tokens"] == figures["direct"]["tokens"] == 120
    assert figures["ratio"]["tokens_per_s"] > 0
    assert figures["direct"]["first_token_ms"]["p50"] > 0
