"""What is new in each event, the order of blocks, and the lines that both end up in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.formats.asked import BodyFields, model_of, session_of
from llamacpp_mqtt_deploy.core.formats.blocks import BlockBegun, BlockEnded, BlockGrown, BlockOrder
from llamacpp_mqtt_deploy.core.formats.framing import ndjson, sse_event
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.rendering import error_headers
from llamacpp_mqtt_deploy.core.formats.telling import Tokens, Untold


def told(*events: dict[str, Any]) -> list[Spoken]:
    untold = Untold()
    return [piece for event in events for piece in untold.feed(event)]


def calls(*deltas: dict[str, Any]) -> dict[str, Any]:
    return {"type": "chunk", "tool_calls": list(deltas)}


def done(*whole: tuple[str, str, str], **fields: Any) -> dict[str, Any]:
    made = [
        {"id": each, "type": "function", "function": {"name": name, "arguments": args}} for each, name, args in whole
    ]
    return {"type": "done", "message": {"tool_calls": made}, **fields}


# --- what is new -----------------------------------------------------------------------------------------------------


def test_an_end_without_chunks_tells_everything() -> None:
    assert told(done(("a", "f", "{}"), full_content="Hi", full_reasoning="hm")) == [
        Reasoning("hm"), Text("Hi"), ToolCall(0, "a", "f", "{}"),
    ]  # fmt: skip


def test_an_end_repeats_nothing_that_was_told() -> None:
    chunks = [{"type": "chunk", "content": "Hi"}, calls({"index": 0, "id": "a", "name": "f", "arguments": "{}"})]
    assert len(told(*chunks)) == len(told(*chunks, done(("a", "f", "{}"), full_content="Hi"))) == 2


def test_text_of_another_answer_is_not_mixed_in() -> None:
    assert told({"type": "chunk", "content": "Hi"}, {"type": "snapshot", "content": "Hello"}) == [Text("Hi")]


def test_a_snapshot_tells_what_was_lost_and_no_more() -> None:
    assert told({"type": "chunk", "content": "He"}, {"type": "snapshot", "content": "Hello", "reasoning": "hm"}) == [
        Text("He"), Reasoning("hm"), Text("llo"),
    ]  # fmt: skip


def test_a_call_of_which_a_snapshot_may_have_lost_a_part_waits_for_the_end() -> None:
    first = calls({"index": 0, "id": "a", "name": "f", "arguments": '{"x'})
    later = calls({"index": 0, "arguments": "1}"}, {"index": 1, "arguments": "}"})
    end = done(("a", "f", '{"x": 1}'), ("b", "g", "{}"))
    assert told(first, {"type": "snapshot", "content": ""}, later) == [ToolCall(0, "a", "f", '{"x')]
    assert told(first, {"type": "snapshot", "content": ""}, later, end)[1:] == [
        ToolCall(0, None, None, '": 1}'), ToolCall(1, "b", "g", "{}"),
    ]  # fmt: skip


def test_a_call_is_told_when_its_name_is_known_and_gets_an_id_where_it_has_none() -> None:
    parts = (
        {"index": 3, "arguments": "{"},
        {"index": 3, "name": "f", "arguments": "}"},
        {"index": 3, "arguments": " "},
    )
    assert told(*(calls(part) for part in parts), done(("call_3", "f", "{} "))) == [
        ToolCall(0, "call_3", "f", "{}"), ToolCall(0, None, None, " "),
    ]  # fmt: skip


def test_calls_are_numbered_in_the_order_of_their_appearance() -> None:
    parts = [calls({"index": index, "id": f"c{index}", "name": "f", "arguments": "{}"}) for index in (4, 2)]
    assert [(piece.index, piece.id) for piece in told(*parts) if isinstance(piece, ToolCall)] == [(0, "c4"), (1, "c2")]


@pytest.mark.parametrize(
    "event",
    [
        {"type": "chunk", "content": 5, "reasoning": None, "tool_calls": "x"},
        {"type": "chunk", "tool_calls": [5, {"index": "0", "name": "f"}, {"index": 0, "name": 5, "arguments": 5}]},
        {"type": "done", "message": 5, "full_content": None},
        {"type": "done", "message": {"tool_calls": [5, {"function": 5}]}},
        {"type": "snapshot"},
        {"type": "hologram"},
        {},
    ],
)
def test_fields_of_a_wrong_type_tell_nothing(event: dict[str, Any]) -> None:
    assert told(event) == []


def test_tokens_that_are_no_numbers_count_as_none() -> None:
    assert Tokens.of({"usage": {"prompt_tokens": "x", "completion_tokens": -1}}) == Tokens(0, 0, 0, 0)
    assert Tokens.of({"usage": 5}) == Tokens.of({}) == Tokens(0, 0, 0, 0)


# --- blocks ----------------------------------------------------------------------------------------------------------


def blocks(*pieces: Spoken) -> list[str]:
    """The steps of these pieces in short: `+` begins, `=` grows, `-` ends."""
    order = BlockOrder()
    return _short([*order.feed(pieces), *order.end()])


def _short(steps: Sequence[Any]) -> list[str]:
    out = []
    for step in steps:
        match step:
            case BlockBegun():
                out.append(f"+{step.number}{type(step.first).__name__[0]}")
            case BlockGrown():
                out.append(f"={step.number}{step.text}")
            case BlockEnded():
                out.append(f"-{step.number}{step.text}")
    return out


def test_text_after_text_is_one_block_and_thinking_is_another() -> None:
    assert blocks(Reasoning("r"), Text("a"), Text("b"), Reasoning("s")) == [
        "+0R", "=0r", "-0r", "+1T", "=1a", "=1b", "-1ab", "+2R", "=2s", "-2s",
    ]  # fmt: skip


def test_a_call_that_is_not_whole_keeps_everything_else_waiting() -> None:
    order = BlockOrder()
    order.feed([ToolCall(0, "a", "f", "{")])
    assert order.feed([Text("later"), ToolCall(1, "b", "g", "{}")]) == []
    assert _short(order.feed([ToolCall(0, None, None, "}")])) == [
        "=0}", "-0{}", "+1T", "=1later", "-1later", "+2T", "=2{}",
    ]  # fmt: skip


def test_what_still_waits_at_the_end_comes_block_by_block() -> None:
    cut: list[Spoken] = [
        ToolCall(0, "a", "f", "{"),
        ToolCall(1, "b", "g", "{"),
        Text("x"),
        ToolCall(1, None, None, "}"),
        Text("y"),
    ]
    assert blocks(*cut) == ["+0T", "=0{", "-0{", "+1T", "=1{", "=1}", "-1{}", "+2T", "=2x", "=2y", "-2xy"]


def test_blanks_after_a_whole_call_open_no_block() -> None:
    assert blocks(ToolCall(0, "a", "f", "{}"), Text("x"), ToolCall(0, None, None, "\n")) == [
        "+0T", "=0{}", "-0{}", "+1T", "=1x", "-1x",
    ]  # fmt: skip


def test_an_empty_answer_has_no_blocks() -> None:
    assert blocks() == []


# --- lines, bodies, headers, paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nasty", ["\n", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_no_kind_of_line_end_is_left_in_a_line(nasty: str) -> None:
    assert len(ndjson({nasty: f"a{nasty}b"}).decode().splitlines()) == 1
    assert len(sse_event("x", {"y": nasty}).decode().splitlines()) == 3


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    assert ndjson({"a": "\ud800"}).decode() == '{"a":"\ufffd"}\n'


@pytest.mark.parametrize("value,session", [(None, None), (5, "5"), ("a.b-c_D", "a.b-c_D")])
def test_a_session_is_one_level_of_a_topic(value: Any, session: str | None) -> None:
    assert session_of(BodyFields({"s": value}), "s") == session


@pytest.mark.parametrize("value", ["", "a/b", "a b", "+", "#", "a\n", "a" * 65, -1, 1.5, True, [], {}])
def test_what_is_no_session_is_refused(value: Any) -> None:
    with pytest.raises(Exception, match="s: expected 1 to 64 letters"):
        session_of(BodyFields({"s": value}), "s")


def test_the_name_of_a_model_is_bounded() -> None:
    with pytest.raises(Exception, match="at most 256"):
        model_of(BodyFields({"model": "m" * 257}))


@pytest.mark.parametrize(
    "after_s,header", [(0, "1"), (0.2, "1"), (59.1, "60"), (float("inf"), "1"), ("x", "1"), (True, "1")]
)
def test_the_time_to_wait_is_whole_seconds_whatever_the_worker_said(after_s: Any, header: str) -> None:
    assert error_headers({"code": "busy", "retry_after_s": after_s})["Retry-After"] == header


def test_a_path_speaks_one_dialect() -> None:
    paths = [route.path for route in HTTP_ROUTES]
    assert len(paths) == len(set(paths))
