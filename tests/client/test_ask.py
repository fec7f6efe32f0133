"""`lmd ask` as a person and as a script run it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.client.terminal import Terminal, lmd
from tests.client.worker import PlayedWorker
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker


def test_on_a_pipe_only_the_answer_is_printed(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        result = lmd("ask", "--port", str(broker.port), "one two\x1b[31m", environment=environment)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"one two\x1b[31m\n", b"")
        session = worker.requests[0][0]
        assert session.startswith("cli/ask-")
        eventually(lambda: (session, {"action": "delete"}) in worker.controls)


def test_the_prompt_may_come_from_stdin_alone_or_among_words(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port):
        port = str(broker.port)
        assert (
            lmd("ask", "--port", port, environment=environment, stdin="größer\n".encode()).stdout == "größer\n".encode()
        )
        assert lmd("ask", "--port", port, "Sum:", "-", environment=environment, stdin=b"1 2\n").stdout == b"Sum: 1 2\n"
        assert lmd("ask", "--port", port, environment=environment, stdin=b"\xff").returncode == 2
        assert lmd("ask", "--port", port, environment=environment).returncode == 2


def test_every_flag_becomes_its_field(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        flags = "--temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --max-tokens 7 --seed 1 --stop a --stop b --no-thinking"
        more = (
            '--model m --system S --timeout 30 --priority batch --new --sentence --session work --raw metadata={"a":1}'
        )
        result = lmd("ask", "--port", str(broker.port), *flags.split(), *more.split(), "hi", environment=environment)
        assert result.returncode == 0, result.stderr
        session, payload = worker.requests[0]
    request = json.loads(payload)
    assert session == "work"
    assert request.pop("request_id")
    assert request == {
        "prompt": "hi", "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "max_tokens": 7, "seed": 1,
        "stop": ["a", "b"], "thinking": False, "model": "m", "system_prompt": "S", "timeout_s": 30.0, "priority": "batch",
        "new": True, "stream": "sentence", "metadata": {"a": 1},
    }  # fmt: skip


def test_a_word_that_is_not_utf_8_is_asked_as_it_can_be_read(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        result = lmd("ask", "--port", str(broker.port), "caf\udce9", environment=environment)
        assert (result.returncode, result.stderr) == (0, b"")
        assert json.loads(worker.requests[0][1])["prompt"] == "caf\ufffd"


@pytest.mark.parametrize(
    "flags,told",
    [
        (["--max-tokens", "99999999999999999999999"], "lmd ask: max_tokens: cannot be written as JSON"),
        (["--system", "\udcff"], "lmd ask: system_prompt: cannot be written as JSON"),
        (["--raw", "temperature=NaN"], "temperature: expected JSON"),
        (["--raw", "temperature=1e400"], "temperature: expected JSON"),
        (["--raw", "request_id=5"], "lmd ask: request_id 5: letters"),
        (["--raw", "prompt=5"], "prompt: use the prompt itself instead"),
        (["--raw", 'session="q"'], "session: use --session instead"),
        (["--raw", "stream=false"], "stream: use --no-stream or --sentence instead"),
        (["--raw", 'timeout_s="5"'], "timeout_s: use --timeout instead"),
    ],
)
def test_a_field_that_cannot_be_is_named(
    flags: list[str], told: str, broker: Mosquitto, environment: dict[str, str]
) -> None:
    result = lmd("ask", "--port", str(broker.port), *flags, "hi", environment=environment)
    assert result.returncode == 2
    assert told in result.stderr.decode()
    assert b"Traceback" not in result.stderr


def test_with_json_each_event_is_a_line(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port):
        result = lmd("ask", "--port", str(broker.port), "--json", "one two", environment=environment)
    assert [json.loads(line)["type"] for line in result.stdout.splitlines()] == ["start", "chunk", "chunk", "done"]


@pytest.mark.parametrize("retryable,code", [(True, 5), (False, 1)])
def test_an_error_event_sets_the_exit_code(
    broker: Mosquitto, environment: dict[str, str], retryable: bool, code: int
) -> None:
    def refuse(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        text = "Full\x1b]0;title\x07."
        worker.say(session, request, type="error", seq=0, final=True, code="busy", message=text, retryable=retryable)

    with PlayedWorker(broker.port, play=refuse):
        result = lmd("ask", "--port", str(broker.port), "hi", environment=environment)
    assert (result.returncode, result.stdout) == (code, b"")
    assert result.stderr == b"lmd ask: busy: Full]0;title.\n"


def test_a_missing_broker_and_a_missing_worker_have_codes_of_their_own(
    broker: Mosquitto, environment: dict[str, str]
) -> None:
    result = lmd("ask", "--port", str(free_port()), "hi", environment=environment)
    assert result.returncode == 3
    assert b"Nothing listens" in result.stderr
    result = lmd("ask", "--port", str(broker.port), "hi", environment=environment)
    assert result.returncode == 4
    assert b"no worker is online under llm/status/#" in result.stderr


def test_the_user_name_becomes_the_first_level_of_the_session(
    guarded: Mosquitto, environment: dict[str, str], tmp_path: Path
) -> None:
    password_file = tmp_path / "password"
    password_file.write_text("alice-secret\n")
    flags = ["--port", str(guarded.port), "--username", "alice", "--password-file", str(password_file)]
    with PlayedWorker(guarded.port, username="worker") as worker:
        assert lmd("ask", *flags, "hi", environment=environment).stdout == b"hi\n"
        assert lmd("ask", *flags, "--session", "kitchen", "hi", environment=environment).stdout == b"hi\n"
        assert worker.requests[0][0].startswith("alice/ask-")
        assert worker.requests[1][0] == "alice/kitchen"
        result = lmd("ask", *flags, "--session", "bob/x", "hi", environment=environment)
    assert result.returncode == 3
    assert b"may not publish to llm/request/bob/x" in result.stderr


def test_the_password_of_the_configured_user_is_not_sent_for_another(
    guarded: Mosquitto, environment: dict[str, str]
) -> None:
    environment |= {"LMD_MQTT__USERNAME": "worker", "LMD_MQTT__PASSWORD": "worker-secret"}
    result = lmd("ask", "--port", str(guarded.port), "--username", "alice", "hi", environment=environment)
    assert result.returncode == 3
    assert b"'alice'" in result.stderr
    assert b"worker-secret" not in result.stderr


def test_a_reader_that_leaves_early_is_no_traceback(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port):
        command = (
            f"{sys.executable} -m llamacpp_mqtt_deploy ask --port {broker.port} --json 'one two three' | head -c 1"
        )
        result = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False, env=environment)
    assert result.stdout == b"{"
    assert b"Traceback" not in result.stderr


def test_without_a_stream_an_answer_in_pieces_is_printed_whole(broker: Mosquitto, environment: dict[str, str]) -> None:
    words = [f"word{number} " for number in range(100)]

    def small_events(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        for number, word in enumerate(words):
            if number != 40 or len(worker.requests) == 2:
                worker.say(session, request, type="chunk", seq=number, content=word)
        worker.say(
            session, request, type="done", seq=100, final=True, content_omitted=True, finish_reason="stop", usage={},
            timings={},
        )  # fmt: skip

    with PlayedWorker(broker.port, play=small_events) as worker:
        result = lmd("ask", "--no-stream", "--port", str(broker.port), "hi", environment=environment)
        assert len(worker.requests) == 2
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == "".join(words) + "\n"


def test_an_answer_whose_text_cannot_be_had_is_no_success(broker: Mosquitto, environment: dict[str, str]) -> None:
    def no_text(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(
            session, request, type="done", seq=0, final=True, content_omitted=True, finish_reason="stop", usage={},
            timings={},
        )  # fmt: skip

    with PlayedWorker(broker.port, play=no_text) as worker:
        result = lmd("ask", "--no-stream", "--port", str(broker.port), "hi", environment=environment)
        assert len(worker.requests) > 1
    assert (result.returncode, result.stdout) == (4, b"")
    assert b"The answer is incomplete" in result.stderr


# --- on a terminal -----------------------------------------------------------------------------------------------------


def test_on_a_terminal_a_model_cannot_steer_it(broker: Mosquitto, environment: dict[str, str]) -> None:
    def think(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="queued", position=2, reason="waiting")
        worker.say(session, request, type="start", model="played")
        worker.say(session, request, type="chunk", seq=0, reasoning="Hm\x1b[2J.")
        worker.say(session, request, type="chunk", seq=1, content="red \x1b[31m\x9b31m\tend")
        worker.done(session, request, "red \x1b[31m\x9b31m\tend", seq=2)

    with (
        PlayedWorker(broker.port, play=think),
        Terminal(["ask", "--port", str(broker.port), "hi"], environment=environment) as terminal,
    ):
        assert terminal.wait() == 0
    assert "waiting, place 2 in the queue" in terminal.text
    assert "\x1b[2mHm[2J.\x1b[0m" in terminal.text
    assert "red [31m31m\tend" in terminal.text
    assert "2 tokens · 25.0 tokens/s · first token 12 ms" in terminal.text
    assert "\x1b[31m" not in terminal.text


def test_ctrl_c_cancels_on_the_worker_and_prints_what_came(broker: Mosquitto, environment: dict[str, str]) -> None:
    def until_cancelled(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="partial")

        def finish() -> None:
            eventually(lambda: any(control["action"] == "cancel" for _, control in worker.controls))
            worker.say(session, request, type="chunk", seq=1, content=" text")
            worker.done(session, request, "partial text", seq=2, reason="cancelled")

        threading.Thread(target=finish, daemon=True).start()

    with (
        PlayedWorker(broker.port, play=until_cancelled),
        Terminal(["ask", "--port", str(broker.port), "hi"], environment=environment) as terminal,
    ):
        terminal.shows("partial")
        terminal.interrupt()
        assert terminal.wait() == 130
    assert "partial text" in terminal.text.replace("^C", "")
    assert "Traceback" not in terminal.text


def test_a_terminal_that_is_closed_cancels_on_the_worker(broker: Mosquitto, environment: dict[str, str]) -> None:
    def begin(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="partial")

    with (
        PlayedWorker(broker.port, play=begin) as worker,
        Terminal(["ask", "--port", str(broker.port), "hi"], environment=environment) as terminal,
    ):
        terminal.shows("partial")
        terminal.signal(signal.SIGHUP)
        eventually(lambda: any(control["action"] == "cancel" for _, control in worker.controls))
        terminal.signal(signal.SIGHUP)
        assert terminal.wait(3) == 143
    assert "Traceback" not in terminal.text


def test_ctrl_c_twice_leaves_at_once(broker: Mosquitto, environment: dict[str, str]) -> None:
    def hang(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="chunk", seq=0, content="partial")

    with (
        PlayedWorker(broker.port, play=hang) as worker,
        Terminal(["ask", "--port", str(broker.port), "hi"], environment=environment) as terminal,
    ):
        terminal.shows("partial")
        terminal.interrupt()
        eventually(lambda: worker.controls)
        terminal.interrupt()
        assert terminal.wait(3) == 130
    assert "Traceback" not in terminal.text
