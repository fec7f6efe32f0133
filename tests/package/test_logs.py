"""The log: its forms, its level at run time, and what must never get into it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import threading
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.config.settings import LoggingSettings

HOSTILE = 'a\nlevel=error event=forged\r\x1b[31m\x9b31m\x07\x7f\x00\u2028\u2029\u202eevil\u2066\u200f\ufeff"quote"\\'
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


pytestmark = pytest.mark.usefixtures("log_as_it_was")

Say = Callable[..., str]


@pytest.fixture
def say() -> Say:
    """Writes one line in a form and returns what came out."""

    def write(form: str, event: str = "request.finished", method: str = "info", **fields: Any) -> str:
        stream = io.StringIO()
        content = bool(fields.pop("log_content", False))
        logs.setup(
            LoggingSettings.model_validate({"format": form, "log_content": content, "level": "debug"}),
            stream=stream,
            environ={},
        )
        getattr(structlog.get_logger("llamacpp_mqtt_deploy.worker.generation"), method)(event, **fields)
        return stream.getvalue()

    return write


def test_a_json_line_has_time_level_event_module_and_fields(say: Say) -> None:
    line = json.loads(say("json", session="kitchen", chunks=3))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "request.finished",
        "logger": "worker.generation",
        "session": "kitchen",
        "chunks": 3,
    }


def test_a_console_line_shows_the_same_in_columns_and_without_colour_off_a_terminal(say: Say) -> None:
    line = say("console", session="kitchen")
    assert "request.finished" in line
    assert "session=kitchen" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_text_can_forge_a_line_or_steer_a_terminal(say: Say, form: str) -> None:
    out = say(form, event=HOSTILE, session=HOSTILE, nested={"a": [HOSTILE]}, raw=HOSTILE.encode())
    assert out.count("\n") == 1
    assert out.endswith("\n")
    assert not RAW.search(out)


def test_the_one_control_character_that_json_leaves_in_ascii_is_escaped(say: Say) -> None:
    assert '"session":"a\\u007fb"' in say("json", session="a\x7fb")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(["json", "console"]), text=st.text(st.characters()), number=st.integers())
def test_any_text_stays_one_printable_line(say: Say, form: str, text: str, number: int) -> None:
    out = say(form, session=text, number=number)
    assert out.count("\n") == 1
    assert not RAW.search(out)
    if form == "json":
        json.loads(out)


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_with_hostile_text_cannot_forge_a_line(say: Say, form: str) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        out = say(form, method="exception")
    assert "ValueError" in out
    assert not RAW.search(out)
    first, *rest = out.rstrip("\n").split("\n")
    assert "request.finished" in first
    assert all(line.startswith("    | ") for line in rest)


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_are_masked_by_type_by_name_and_by_value(say: Say, form: str) -> None:
    logs.hide("s3cret-value", None, "")
    out = say(
        form,
        password="hunter2-a",
        api_key="hunter2-b",
        headers={"Authorization": "Bearer hunter2-c"},
        engine_api_key=SecretStr("hunter2-d"),
        typed=SecretStr("hunter2-e"),
        error="GET /v1 with Bearer hunter2-f failed",
        page="the engine quotes s3cret-value back",
        completion_tokens=17,
        first_token_ms=5,
    )
    assert "hunter2" not in out
    assert "s3cret-value" not in out
    assert "17" in out


def test_what_people_typed_is_logged_only_on_request(say: Say) -> None:
    assert "my diary" not in say("json", prompt="my diary", answer="my diary", messages=["my diary"])
    assert json.loads(say("json", prompt="my diary"))["prompt"] == "(8 long, not logged)"
    assert "my diary" in say("json", prompt="my diary", log_content=True)


def test_the_level_changes_at_run_time_for_loggers_in_use() -> None:
    stream = io.StringIO()
    logs.setup(LoggingSettings(format="json"), stream=stream, environ={})
    log = structlog.get_logger("x")
    log.debug("one.hidden")
    bound = log.bind(session="s")
    logs.set_level("debug")
    log.debug("two.shown")
    bound.debug("three.shown")
    logs.set_level("error")
    log.warning("four.hidden")
    bound.error("five.shown")
    assert logs.level() == "error"
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == [
        "two.shown",
        "three.shown",
        "five.shown",
    ]
    with pytest.raises(ValueError, match="expected one of debug, info"):
        logs.set_level("loud")


def test_what_cannot_be_rendered_does_not_raise(say: Say) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert json.loads(say("json", value=Broken()))["event"] == "request.finished"
    assert "log.failed" in say("console", value=Broken())
    assert "2" in say("json", number=2**70, half="\ud800")
    loop: list[Any] = []
    loop.append(loop)
    assert say("json", loop=loop)


def test_a_closed_stream_does_not_raise() -> None:
    stream = io.StringIO()
    logs.setup(LoggingSettings(format="json"), stream=stream, environ={})
    stream.close()
    structlog.get_logger("x").info("nobody.reads")


def test_libraries_are_heard_from_warning_on(say: Say) -> None:
    stream = io.StringIO()
    logs.setup(LoggingSettings(format="json", level="debug"), stream=stream, environ={})
    logging.getLogger("urllib3.connectionpool").debug("GET /v1/secret-path")
    logging.getLogger("urllib3.connectionpool").warning("pool is full: %s", "x")
    logs.setup(LoggingSettings(format="json", level="debug"), stream=stream, environ={})
    logging.getLogger("paho").error("bad packet")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [
        ("urllib3.connectionpool", "pool is full: x"),
        ("paho", "bad packet"),
    ]


def test_a_thread_that_dies_is_logged_with_its_name() -> None:
    stream = io.StringIO()
    logs.setup(LoggingSettings(format="json"), stream=stream, environ={})

    def fail() -> None:
        raise LookupError("gone")

    thread = threading.Thread(target=fail, name="generation-1")
    thread.start()
    thread.join(10)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["thread"], line["level"]) == ("thread.died", "generation-1", "critical")
    assert "LookupError: gone" in line["exception"]


def test_lines_for_the_journal_begin_with_their_priority(tmp_path: Path) -> None:
    file = tmp_path / "stderr"
    with file.open("w") as stream:
        found = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        logs.setup(LoggingSettings(level="debug"), stream=stream, environ=environ)
        log = structlog.get_logger("x")
        for method in ("debug", "info", "warning", "error", "critical"):
            getattr(log, method)("x.happened")
    assert re.findall(r"^<(\d)>\{", file.read_text(), re.MULTILINE) == ["7", "6", "4", "3", "2"]


def test_a_redirected_stream_is_not_taken_for_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        logs.setup(LoggingSettings(), stream=stream, environ={"JOURNAL_STREAM": "1:1"})
        structlog.get_logger("x").info("x.happened")
    assert (tmp_path / "stderr").read_text().startswith("{")


def test_auto_is_columns_with_colour_on_a_terminal() -> None:
    reader, writer = os.openpty()
    tty.setraw(writer)
    try:
        with os.fdopen(writer, "w") as stream:
            logs.setup(LoggingSettings(), stream=stream, environ={})
            structlog.get_logger("x").info("x.happened", session="s")
            out = os.read(reader, 4096).decode()
    finally:
        os.close(reader)
    assert "\x1b[" in out
    assert not out.startswith("{")


# --- what an operator can ask for ----------------------------------------------------------------------------------------


def test_the_last_warnings_and_errors_are_kept_as_harmless_lines(say: Say) -> None:
    say("json", event="link.lost", method="warning", reason=HOSTILE, tries=3)
    say("console", event="request.finished", method="info", outcome="stop")
    say("json", event="journal.failed", method="error", problem="The disk is full.")
    first, second = logs.problems()
    assert (first["level"], first["event"], second["event"]) == ("warning", "link.lost", "journal.failed")
    assert second["text"] == "problem=The disk is full."
    assert "tries=3" in first["text"]
    assert first["ts"].endswith("Z")
    assert not any(RAW.search(text) or "\n" in text for kept in (first, second) for text in kept.values())
    assert logs.problems(1) == [second]


def test_a_kept_problem_holds_no_secret_and_no_content(say: Say) -> None:
    logs.hide("hunter2-hunter2")
    say("json", event="a", method="error", prompt="my diary", note="x" * 495 + "hunter2-hunter2", password="pw")
    logs.hide("late-secret")
    (kept,) = logs.problems()
    assert not any(hidden in kept["text"] for hidden in ("my diary", "hunter2", "hunte", "pw"))
    say("json", event="b", method="error", note="late-secret")
    assert logs.problems()[-1]["text"] == f"note={logs.MASK}"


def test_many_problems_of_one_kind_neither_fill_the_memory_nor_hide_the_others(say: Say) -> None:
    say("json", event="journal.failed", method="error", problem="The disk is full.")
    for number in range(500):
        say("json", event="request.finished", method="warning", number=number, note="x" * 10_000)
    kept = logs.problems()
    assert [problem["event"] for problem in kept] == ["journal.failed", *["request.finished"] * 10]
    assert kept[-1]["text"].startswith("number=499")
    assert max(len(problem["text"]) for problem in kept) <= 503
    for number in range(500):
        say("json", event=f"event{number}", method="warning")
    assert len(logs.problems()) == logs.KEPT_PROBLEMS


def test_what_an_exception_said_is_kept_without_its_stack(say: Say) -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        say("json", event="step.failed", method="exception")
    (kept,) = logs.problems()
    assert kept["text"] == "ValueError: no such thing"


def test_whoever_asks_for_problems_reads_no_prompts_also_where_the_log_has_them(say: Say) -> None:
    line = say("json", event="a", method="error", log_content=True, prompt="my diary", answer="Dear me", code="timeout")
    assert "my diary" in line
    say("json", event="request.finished", method="warning", log_content=True, message="bad: my diary", outcome="x")
    assert [kept["text"] for kept in logs.problems()] == ["code=timeout", "outcome=x"]
