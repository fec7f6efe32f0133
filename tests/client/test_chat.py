"""`lmd chat` on a terminal and on a pipe."""

from __future__ import annotations

import contextlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.client.terminal import Terminal, lmd
from tests.client.worker import PlayedWorker, answer_in_words
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker


def test_each_line_of_a_pipe_is_a_prompt_of_one_session(broker: Mosquitto, environment: dict[str, str]) -> None:
    with PlayedWorker(broker.port) as worker:
        result = lmd("chat", "--port", str(broker.port), environment=environment, stdin=b"one\n\ntwo three\n//four")
        assert (result.returncode, result.stdout) == (0, b"one\ntwo three\n/four\n")
        assert len({session for session, _ in worker.requests}) == 1
        assert worker.requests[0][0].startswith("cli/chat-")


def test_on_a_pipe_the_first_failure_is_the_exit_code(broker: Mosquitto, environment: dict[str, str]) -> None:
    def sometimes(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if request["prompt"] == "fail":
            worker.say(session, request, type="error", seq=0, final=True, code="busy", message="Full.", retryable=True)
        else:
            answer_in_words(worker, session, request)

    with PlayedWorker(broker.port, play=sometimes):
        result = lmd("chat", "--port", str(broker.port), environment=environment, stdin=b"one\nfail\ntwo\n")
    assert (result.returncode, result.stdout) == (5, b"one\ntwo\n")


def test_a_person_is_told_that_no_worker_is_online(broker: Mosquitto, environment: dict[str, str]) -> None:
    with (
        PlayedWorker(broker.port, online=False, play=lambda *_: None) as worker,
        Terminal(["chat", "--port", str(broker.port), "-s", "desk"], environment=environment) as terminal,
    ):
        terminal.shows("Session desk (no worker is online)")
        terminal.enter("hello")
        terminal.shows("No worker is online; waiting a moment for one.")
        worker.done("desk", json.loads(worker.requests[0][1]), "late", seq=0)
        terminal.shows("late")
        terminal.end_of_input()
        terminal.wait()


def test_a_conversation_on_a_terminal(broker: Mosquitto, environment: dict[str, str], tmp_path: Path) -> None:
    def play(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        if request["prompt"] == "long":
            worker.say(session, request, type="chunk", seq=0, content="beginning")
        else:
            answer_in_words(worker, session, request)

    with (
        PlayedWorker(broker.port, play=play) as worker,
        Terminal(["chat", "--port", str(broker.port), "-s", "desk"], environment=environment) as terminal,
    ):
        worker.history["desk"] = [{"role": "user", "content": "from\x1b[2J before"}]
        terminal.shows("Session desk with played")
        terminal.shows("> ")
        terminal.enter("/help")
        terminal.shows("/history")
        terminal.enter("/history")
        terminal.shows("user: from[2J before")
        terminal.enter("/system Be brief.")
        terminal.shows("The system prompt is set.")
        terminal.enter("alpha \\")
        terminal.shows("... ")
        terminal.enter("beta")
        terminal.shows("alpha \r\nbeta")
        assert json.loads(worker.requests[0][1])["system_prompt"] == "Be brief."
        terminal.enter("/nonsense")
        terminal.shows("There is no command /nonsense")
        terminal.enter("long")
        terminal.shows("beginning")
        terminal.interrupt()
        eventually(lambda: any(control["action"] == "cancel" for _, control in worker.controls))
        request = json.loads(worker.requests[-1][1])
        worker.done("desk", request, "beginning", seq=1, reason="cancelled")
        terminal.shows("(cancelled)")
        terminal.enter("/cancel")
        terminal.shows("Cancelled.")
        worker.running = 0
        terminal.enter("/cancel")
        terminal.shows("Nothing was running or waiting.")
        terminal.enter("/new")
        terminal.shows("a new conversation begins")
        # At the prompt: in the moment before it a Ctrl-C has nothing to end.
        eventually(lambda: "> " in terminal.text.partition("a new conversation begins")[2])
        for _ in range(3):
            # CPython's readline notices a signal that comes between its prompt and its wait only with the next key.
            terminal.interrupt()
            with contextlib.suppress(AssertionError):
                eventually(lambda: "Ctrl-D or /quit leaves" in terminal.text, 5.0)
                break
        terminal.shows("Ctrl-D or /quit leaves")
        terminal.end_of_input()
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.text
    history = tmp_path / "llamacpp-mqtt-deploy" / "chat_history"
    assert "alpha" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
