"""Home Assistant's reader of events makes of any delivery what the package's reader and the JavaScript client make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.client import retry
from llamacpp_mqtt_deploy.core.events import EventReader
from tests.custom_integration.integration import FOLDER, PURE, module
from tests.support.answer_events import Answered, answers
from tests.support.lost_deliveries import deliveries

AnswerReader = module("answer_reader").AnswerReader
rules = module("resend_rules")
parse_status = module("worker_status").parse_status


def same(events: list[Any], request_id: str) -> None:
    """Both readers, event by event."""
    ours, theirs = AnswerReader(request_id), EventReader(request_id)
    for event in events:
        news, reading = ours.feed(event), theirs.feed(event)
        assert (news is None) == (reading is None)
        if news is not None and reading is not None:
            assert (news.content, news.reasoning) == (reading.content, reading.reasoning)
        assert (ours.next_seq, ours.content, ours.reasoning) == (theirs.next_seq, theirs.content, theirs.reasoning)
        assert ours.cut_short == theirs.cut_short
        assert (ours.end or {}).get("type") == (theirs.terminal or {}).get("type")


@given(deliveries())
def test_any_loss_and_repetition_is_read_as_by_the_package(events: list[dict[str, Any]]) -> None:
    same(events, "r")


@settings(max_examples=60)
@given(answers())
def test_any_legal_order_of_events_is_read_as_by_the_package(answered: Answered) -> None:
    same(answered.events, "r1")
    reader = AnswerReader("r1")
    for event in answered.events:
        reader.feed(event)
    if answered.done["type"] == "done":  # an error does not bring the text that was lost
        assert (reader.content, reader.reasoning) == (answered.content, answered.reasoning)
        assert reader.tool_calls == answered.calls


def chunk(seq: int, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "chunk", "request_id": "r", "seq": seq, "content": content, **more}


def done(seq: int, **more: Any) -> dict[str, Any]:
    return {"type": "done", "request_id": "r", "seq": seq, "final": True, "finish_reason": "stop", **more}


OMITTED = {"type": "snapshot", "request_id": "r", "content": "", "next_seq": 3, "content_omitted": True}
SNAPSHOT = {"type": "snapshot", "request_id": "r", "content": "abc", "next_seq": 3}


# The cases of tests/js/reader.test.mjs: events, the text, whether a chunk lacks, the end.
@pytest.mark.parametrize(
    "events,content,lacks,end",
    [
        ([chunk(0, "a"), chunk(0, "a"), chunk(1, "b"), done(2, full_content="ab"), chunk(2, "x")], "ab", False, "done"),
        ([chunk(0, "a"), chunk(2, "c")], "a", True, None),
        ([chunk(0, "a"), chunk(2, "c"), SNAPSHOT, chunk(3, "d")], "abcd", False, None),
        ([chunk(0, "a"), chunk(2, "c"), OMITTED], "a", False, None),
        (
            [
                chunk(0, "a"),
                chunk(2, "c"),
                OMITTED,
                chunk(0, "a"),
                chunk(1, "b"),
                chunk(2, "c"),
                done(3, content_omitted=True),
            ],
            "abc",
            False,
            "done",
        ),
        ([chunk(0, "a"), chunk(2, "c"), done(3, content_omitted=True)], "a", True, None),
        ([done(5, full_content="größer 🌊")], "größer 🌊", False, "done"),
        ([chunk(0, "a"), SNAPSHOT | {"content": "zzzz", "next_seq": 4}, chunk(4, "e")], "ae", False, None),
        (
            [chunk(0, "a"), done(3) | {"type": "error", "code": "engine_lost", "partial_content": "abc"}],
            "abc",
            False,
            "error",
        ),
        ([{"type": "rejected", "request_id": "r", "code": "duplicate_request"}], "", False, "rejected"),
        ([chunk(0, "a"), {"type": "rejected", "request_id": "r", "code": "duplicate_request"}], "a", False, None),
        (
            [chunk(0, 7), chunk(1, {}, tool_calls=[{"index": "x"}, 7]), chunk(2, "a"), {"request_id": "r"}],
            "a",
            False,
            None,
        ),
    ],
)
def test_the_cases_of_the_javascript_client(events: list[Any], content: str, lacks: bool, end: str | None) -> None:
    reader = AnswerReader("r")
    nothing: list[Any] = [None, 7, "x", [], {}, {"request_id": "other"}]
    assert all(reader.feed(foreign) is None for foreign in nothing)
    told = "".join(news.content for event in events if (news := reader.feed(event)) is not None)
    assert told == reader.content == content
    assert reader.lacks is lacks
    assert (reader.end or {}).get("type") == end


def test_calls_of_tools_are_put_together_from_their_pieces() -> None:
    reader = AnswerReader("r")
    reader.feed(chunk(0, None, tool_calls=[{"index": 0, "id": "c1", "name": "light", "arguments": '{"a"'}]))
    reader.feed(chunk(1, None, tool_calls=[{"index": 0, "arguments": ":1}"}]))
    call = {"id": "c1", "type": "function", "function": {"name": "light", "arguments": '{"a":1}'}}
    assert reader.tool_calls == [call]
    reader.feed(
        done(2, full_content="", message={"role": "assistant", "content": "", "tool_calls": [call | {"id": "c2"}]})
    )
    assert [call["id"] for call in reader.tool_calls] == ["c2"], "the end knows them all, after a snapshot too"


def test_what_an_answer_may_take_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("answer_reader"), "MAX_ANSWER_CHARS", 10)
    reader = AnswerReader("r")
    reader.feed(chunk(0, "12345"))
    reader.feed(chunk(1, None, tool_calls=[{"index": 0, "arguments": "123456"}]))
    assert reader.end is not None
    assert reader.end["code"] == "too_long"
    many = AnswerReader("r")
    many.feed(chunk(0, None, tool_calls=[{"index": index, "arguments": ""} for index in range(1000)]))
    assert len(many.tool_calls) == module("answer_reader").MAX_TOOL_CALLS


# --- the rules -----------------------------------------------------------------------------------------------------------

EVENTS = st.lists(st.sampled_from(["hear", "hole", "offline", "back", "nothing"]), max_size=60)
_SAME = {"WaitUntil": "Pause", "Send": "Deliver", "GiveUp": "Abandon"}


@given(EVENTS, st.one_of(st.none(), st.floats(0.1, 500)), st.floats(0.5, 60), st.booleans())
def test_it_sends_again_and_gives_up_when_the_package_does(
    events: list[str], timeout_s: float | None, heartbeat_s: float, cut_short: bool
) -> None:
    theirs = retry.RetryRules(heartbeat_s=heartbeat_s, timeout_s=timeout_s)
    ours = rules.ResendRules(heartbeat_s=heartbeat_s, timeout_s=timeout_s)
    now, hole, away = 0.0, False, False
    for event in [*events, *["nothing"] * 40]:
        match event:
            case "hear" | "hole" if not away and ours.was_sent:
                hole = event == "hole"
                for each in (theirs, ours):
                    each.heard(now, progress=not hole)
            case "offline":
                theirs.offline(now)
                ours.away(now)
                away = True
            case "back" if away:
                theirs.back()
                ours.back()
                away = False
        step = theirs.decide(now, hole=hole, worker_online=True, cut_short=cut_short and hole)
        move = ours.decide(now, lacks=hole, cut_short=cut_short and hole)
        assert type(move).__name__ == _SAME[type(step).__name__]
        assert getattr(move, "until", None) == getattr(step, "until", None)
        assert getattr(move, "why", None) == getattr(step, "why", None)
        match step:
            case retry.Send():
                theirs.sent(now)
                ours.sent(now)
            case retry.WaitUntil(until):
                now = until if event == "nothing" else min(until, now + 0.5)
            case retry.GiveUp():
                return


@given(EVENTS)
def test_it_ends_in_bounded_time_whatever_happens(events: list[str]) -> None:
    ours = rules.ResendRules(heartbeat_s=1.0)
    now = 0.0
    for event in events:
        now += 0.5
        match event:
            case "hear" | "hole":
                ours.heard(now, progress=event == "hear")
            case "offline":
                ours.away(now, "no_worker")
            case "back":
                ours.back()
    sends = 0
    while not isinstance(move := ours.decide(now, lacks=False), rules.Abandon):
        if isinstance(move, rules.Deliver):
            ours.sent(now)
            sends += 1
        else:
            assert move.until > now
            now = move.until
    assert sends <= rules.RESEND_LIMIT + 1
    assert now <= 1000


def test_whoever_answers_is_there_whatever_the_status_says() -> None:
    """Another worker of a pool has taken the answer over."""
    ours = rules.ResendRules(heartbeat_s=15)
    ours.sent(0.0)
    ours.away(1.0, "no_worker")
    ours.heard(30.0, progress=True)
    assert ours.decide(62.0, lacks=False) == rules.Pause(75.0)
    ours.away(63.0, "offline")
    ours.heard(64.0, progress=True)
    assert ours.decide(123.0, lacks=False) == rules.Abandon("offline"), "without a broker nothing is heard"


# --- the status ----------------------------------------------------------------------------------------------------------

STATUS = {
    "state": "online", "protocol": 1, "instance": "i", "ts": 1.0, "every_s": 10, "heartbeat_s": 7, "models": ["a", "b"],
    "capabilities": {"tools": True, "vision": True, "thinking": False, "json_schema": True},
    "limits": {"max_request_bytes": 5, "max_event_bytes": 6},
}  # fmt: skip


def test_a_status_is_read() -> None:
    status = parse_status(json.dumps(STATUS))
    assert (status.online, status.every_s, status.heartbeat_s, status.models) == (True, 10.0, 7.0, ("a", "b"))
    assert (status.vision, status.max_request_bytes) == (True, 5)
    assert parse_status(json.dumps(STATUS | {"state": "draining"})).online
    assert not parse_status(json.dumps(STATUS | {"state": "offline"})).online


@pytest.mark.parametrize(
    "payload",
    ["", "x", "[]", "7", "null", "[" * 5000, '{"protocol": 1}', json.dumps(STATUS | {"protocol": 2}), " " * 70000],
)
def test_what_is_no_status_is_none(payload: str) -> None:
    assert parse_status(payload) is None


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(STATUS, JSON)))
def test_fields_of_a_wrong_type_never_break_a_status(fields: Mapping[str, Any]) -> None:
    status = parse_status(json.dumps(STATUS | dict(fields)))
    assert status is None or (status.every_s > 0 and status.heartbeat_s > 0)


# --- what is held to Python 3.11 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PURE)
def test_the_reading_part_needs_no_home_assistant(name: str) -> None:
    program = (
        "import sys; from tests.custom_integration.integration import module; "
        f"module({name!r}); print([name for name in sys.modules if name.split('.')[0] in ('homeassistant', 'voluptuous')])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout.strip() == "[]"
