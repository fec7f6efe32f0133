"""`lmd chat` on a terminal and on a pipe."""

from __future__ import annotations

import contextlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.client.terminal import Terminal, lmd, screen
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


def test_pasted_lines_are_one_prompt(broker: Mosquitto, environment: dict[str, str]) -> None:
    with (
        PlayedWorker(broker.port) as worker,
        Terminal(["chat", "--port", str(broker.port), "-s", "desk"], environment=environment) as terminal,
    ):
        terminal.shows("> ")
        terminal.paste("def f():\n    return 1\n\nWhat is this?")
        eventually(lambda: worker.requests)
        terminal.enter("and that?")
        eventually(lambda: len(worker.requests) == 2)
        terminal.end_of_input()
        assert terminal.wait() == 0
    prompts = [json.loads(payload)["prompt"] for _, payload in worker.requests]
    assert prompts == ["def f():\n    return 1\n\nWhat is this?", "and that?"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_paste_in_another_encoding_is_a_prompt(errors: str, broker: Mosquitto, environment: dict[str, str]) -> None:
    environment |= {"PYTHONIOENCODING": f"utf-8:{errors}"}  # as the locale has it: of a language, or C
    with (
        PlayedWorker(broker.port) as worker,
        Terminal(["chat", "--port", str(broker.port), "-s", "desk"], environment=environment) as terminal,
    ):
        terminal.shows("> ")
        terminal.enter("\udcff one")
        eventually(lambda: worker.requests or terminal.code is not None)
        assert [json.loads(payload)["prompt"] for _, payload in worker.requests] == ["\ufffd one"]
        terminal.end_of_input()
        assert terminal.wait() == 0


def test_a_session_that_is_continued_shows_what_was_said_before(broker: Mosquitto, environment: dict[str, str]) -> None:
    flags = ["chat", "--port", str(broker.port), "-s", "desk"]
    with PlayedWorker(broker.port) as worker:
        worker.history["desk"] = [{"role": "user", "content": f"thing {number}"} for number in range(12)]
        with Terminal(flags, environment=environment) as terminal:
            terminal.shows("user: thing 11")
            terminal.shows("> ")
            assert "(2 earlier messages; /history shows them)" in terminal.text
            assert "thing 1\x1b" not in terminal.text
            terminal.end_of_input()
            terminal.wait()
        with Terminal([*flags, "--new"], environment=environment) as terminal:
            terminal.shows("> ")
            assert "thing" not in terminal.text
            terminal.end_of_input()
            assert terminal.wait() == 0


def test_the_greeting_leads_back_to_the_same_session_from_anywhere(
    broker: Mosquitto, environment: dict[str, str]
) -> None:
    environment |= {"LMD_MQTT__ROOT": "house", "LMD_MQTT__HOST": "127.0.0.1"}
    with Terminal(["chat", "--port", str(broker.port), "-s", "desk"], environment=environment) as terminal:
        terminal.shows(f"lmd chat --host 127.0.0.1 --port {broker.port} --root house --session desk")
        terminal.shows("> ")
        terminal.end_of_input()
        assert terminal.wait() == 0


def test_nothing_that_a_worker_sends_steers_the_terminal_or_ends_the_chat(
    broker: Mosquitto, environment: dict[str, str]
) -> None:
    evil = "a\x1b[2J\x07\x9b31m\u202eb\u2066c"

    def play(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        worker.say(session, request, type="queued", position=evil, reason=[evil])
        worker.say(session, request, type="start", model=f"{evil}\n{evil}", warnings=5)
        worker.say(session, request, type="progress", processed={}, total=evil)
        worker.say(session, request, type="ping", state=evil)
        worker.say(session, request, type="chunk", seq=0, content=5, reasoning=["x"], tool_calls=7)
        worker.say(
            session, request, type="chunk", seq=1, reasoning=evil, tool_calls=[1, {"index": "x", "arguments": 1}]
        )
        worker.say(session, request, type="chunk", seq=2, content=f"{evil} said")
        worker.say(
            session, request, type="done", seq=3, final=True, full_content=f"{evil} said", finish_reason=evil,
            message={"tool_calls": 3}, usage={"completion_tokens": evil}, warnings=5,
            timings={"tokens_per_second": "fast", "first_token_ms": [], "total_ms": 1e300},
        )  # fmt: skip

    with (
        PlayedWorker(broker.port, play=play) as worker,
        Terminal(["chat", "--port", str(broker.port), "-s", "desk"], environment=environment) as terminal,
    ):
        history: list[Any] = [
            {"role": evil, "content": evil},
            {"role": 5, "content": [{"type": "text", "text": f"part {evil}"}, 7]},
            5,
            None,
            {"content": {"a": evil}},
        ]
        worker.history["desk"] = history
        terminal.shows("> ")
        for number in range(1, 3):
            terminal.enter("hello")
            eventually(lambda number=number: terminal.text.count("said") == number)  # type: ignore[misc]
        recalled = terminal.text.count("part a")
        assert recalled == 1, "a session that is continued shows its last turns"
        terminal.enter("/history")
        eventually(lambda: terminal.text.count("part a") > recalled)
        terminal.end_of_input()
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.text
    for sign in ("\x1b[2J", "\x07", "\x9b", "\u202e", "\u2066"):
        assert sign not in terminal.text


def test_no_word_is_broken_at_the_edge_of_the_terminal(broker: Mosquitto, environment: dict[str, str]) -> None:
    words = [f"word-number-{number}" for number in range(60)]

    def play(worker: PlayedWorker, session: str, request: dict[str, Any]) -> None:
        text = " ".join(words)
        pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
        for number, piece in enumerate(pieces):
            worker.say(session, request, type="chunk", seq=number, content=piece)
        worker.done(session, request, text, seq=len(pieces))

    with (
        PlayedWorker(broker.port, play=play),
        Terminal(["ask", "--port", str(broker.port), "hello"], environment=environment) as terminal,
    ):
        assert terminal.wait() == 0
    answer = terminal.text[terminal.text.index("word") :].partition("word-number-59")
    lines = screen((answer[0] + answer[1]).replace("\r", ""), 100)
    assert len(lines) > 8
    assert " ".join(lines).split() == words
