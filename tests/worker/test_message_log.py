"""A flood of one client fills no log, and the operator learns how much was left out."""

from __future__ import annotations

import time

from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.core.line_limit import LINES, WINDOW_S
from llamacpp_mqtt_deploy.worker.message_log import TELL_EVERY_S, MessageLog


def test_a_few_lines_of_each_kind_are_written_and_the_rest_is_counted() -> None:
    messages = MessageLog()
    with capture_logs() as lines:
        for _ in range(LINES + 3):
            messages.info("request.refused", "ada", code="busy")
            messages.warning("message.ignored", "ada", topic="t")
        assert [line["event"] for line in lines].count("request.refused") == LINES
        assert [line["event"] for line in lines].count("message.ignored") == LINES
        assert {(line["log_level"], line["event"]) for line in lines} == {
            ("info", "request.refused"),
            ("warning", "message.ignored"),
        }
        lines.clear()
        messages.tell()
        assert lines == [], "the flood is not over"
        messages.tell(time.monotonic() + WINDOW_S)
    assert [(line["kind"], line["first_level"], line["lines"]) for line in lines] == [
        ("request.refused", "ada", 3),
        ("message.ignored", "ada", 3),
    ]
    assert lines[0]["message"] == "3 more suppressed"


def test_what_was_left_out_is_told_while_the_flood_is_still_of_interest() -> None:
    assert 0 < 2 * TELL_EVERY_S <= WINDOW_S
