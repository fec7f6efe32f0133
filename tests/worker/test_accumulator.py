"""An answer as it grows, and the figures and fields of its end."""

from __future__ import annotations

from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, PromptProgress, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.core.toolcalls import MAX_ARGUMENTS_CHARS, MAX_CALLS
from llamacpp_mqtt_deploy.worker.accumulator import AnswerAccumulator, Told, done_fields, usage_fields


def _done(answer: AnswerAccumulator, told: Told, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "finish_reason": "stop",
        "with_text": True,
        "timings": {},
        "metadata": None,
        "warnings": (),
    }
    return done_fields(answer, told=told, **(given | more))


def test_text_and_thinking_are_counted_in_bytes_and_deltas() -> None:
    answer = AnswerAccumulator()
    begun = [answer.begun]
    answer.add_text("ab", 1.0)
    begun.append(answer.begun)
    answer.add_reasoning("é", 2.0, 3)
    answer.add_text("\ud800", 3.0, 2)  # half a surrogate pair
    answer.add_reasoning("xyz", 4.0)
    assert begun == [False, True]
    assert (answer.text(), answer.thoughts()) == ("ab\ud800", "éxyz")
    assert (answer.size, answer.pieces) == (2 + 2 + 1 + 3, 7)
    assert (answer.first_at, answer.last_at) == (1.0, 4.0)


# --- tool calls --------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_call_are_joined_and_told_as_they_came() -> None:
    answer = AnswerAccumulator()
    told = [
        answer.add_call(ToolCall(1, "c", "look", '{"a"'), 1.0),
        answer.add_call(ToolCall(1, "later", "other", ": 1}"), 2.0),
        answer.add_call(ToolCall(0, None, None, "{}"), 3.0),
    ]
    assert told == [
        {"index": 1, "id": "c", "name": "look", "arguments": '{"a"'},
        {"index": 1, "id": "later", "name": "other", "arguments": ": 1}"},
        {"index": 0, "arguments": "{}"},
    ]
    assert answer.tool_calls() == [
        {"id": "call_0", "type": "function", "function": {"name": "", "arguments": "{}"}},
        {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}},
    ]
    assert (answer.pieces, answer.first_at) == (3, 1.0)


def test_an_answer_has_so_many_calls_and_arguments_and_no_more() -> None:
    answer = AnswerAccumulator()
    for number in range(MAX_CALLS):
        answer.add_call(ToolCall(number, "c", "look", ""), 1.0)
    answer.add_call(ToolCall(5, None, None, "x" * MAX_ARGUMENTS_CHARS), 1.0)
    with pytest.raises(EngineFailed, match="more than 128 tools"):
        answer.add_call(ToolCall(MAX_CALLS, "c", "look", ""), 1.0)
    with pytest.raises(EngineFailed, match="characters of arguments"):
        answer.add_call(ToolCall(5, None, None, "x"), 1.0)


@pytest.mark.parametrize(
    "content, arguments, with_calls, message",
    [
        ("hi", "{}", True, ("hi", True)),
        ("", "{}", True, (None, True)),
        ("", "{}", False, ("", False)),
        ("", '{"half', True, ("", False)),
        ("hi", '{"half', True, ("hi", False)),
    ],
)
def test_a_message_holds_the_calls_that_were_told_whole(
    content: str, arguments: str, with_calls: bool, message: tuple[str | None, bool]
) -> None:
    answer = AnswerAccumulator()
    answer.add_call(ToolCall(0, "c", "look", arguments), 1.0)
    made = answer.message(content, with_calls=with_calls)
    assert made["role"] == "assistant"
    assert (made["content"], "tool_calls" in made) == message


# --- figures -----------------------------------------------------------------------------------------------------------


def test_tokens_are_the_engines_own_count_where_it_tells_and_the_deltas_where_not() -> None:
    answer = AnswerAccumulator()
    assert answer.usage() == TokenUsage(0, 0, 0)
    answer.progress = PromptProgress(5, 9, 4)
    answer.add_text("a", 1.0, 3)
    assert answer.usage() == TokenUsage(prompt_tokens=9, completion_tokens=3, cached_tokens=4)
    answer.finished = Finished("stop", TokenUsage(7, 8, 6, 5))
    assert answer.usage() == TokenUsage(7, 8, 6, 5)
    fields = {"prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15, "cached_tokens": 6}
    assert usage_fields(answer.usage()) == fields | {"reasoning_tokens": 5}
    assert usage_fields(TokenUsage(7, 8, 6)) == fields
    assert usage_fields(TokenUsage(7, 8, 6, 0)) == fields | {"reasoning_tokens": 0}


def test_the_speed_is_the_engines_own_figure_where_it_has_one() -> None:
    answer = AnswerAccumulator(finished=Finished("stop", TokenUsage(1, 9), tokens_per_second=12.3456))
    assert answer.tokens_per_second() == 12.35
    answer.finished = Finished("stop", TokenUsage(1, 9), tokens_per_second=0.0)
    assert answer.tokens_per_second() is None


@pytest.mark.parametrize("completion_tokens, speed", [(9, 4.0), (0, 1.0), (1, 0.0)])
def test_a_speed_is_measured_from_the_first_token_on(completion_tokens: int, speed: float) -> None:
    answer = AnswerAccumulator(finished=Finished("stop", TokenUsage(1, completion_tokens)))
    for now in (10.0, 11.0, 12.0):
        answer.add_text("a", now)
    assert answer.tokens_per_second() == speed


def test_the_speed_of_an_answer_that_came_at_once_cannot_be_told() -> None:
    for last_at, speed in ((0.0009, None), (0.001, 1000.0), (0.0025, 400.0)):
        answer = AnswerAccumulator()
        assert answer.tokens_per_second() is None
        answer.add_text("a", 0.0)
        answer.add_text("b", last_at)
        assert answer.tokens_per_second() == speed


def test_a_speed_has_two_decimals() -> None:
    answer = AnswerAccumulator()
    answer.add_text("a", 0.0)
    answer.add_text("b", 3.0)
    assert answer.tokens_per_second() == 0.33


# --- the fields of done ------------------------------------------------------------------------------------------------


def test_an_end_tells_what_was_told_and_leaves_out_what_there_is_not() -> None:
    answer = AnswerAccumulator(dropped_messages=2)
    answer.add_text("more than was told", 1.0)
    fields = _done(answer, Told("more", "", calls=True), timings={"queue_ms": 1.0, "first_token_ms": None})
    assert fields == {
        "full_content": "more",
        "message": {"role": "assistant", "content": "more"},
        "finish_reason": "stop",
        "usage": usage_fields(TokenUsage(0, 1, 0)),
        "timings": {"queue_ms": 1.0},
        "dropped_messages": 2,
    }


def test_an_end_without_the_text_says_so_and_tells_the_rest() -> None:
    answer = AnswerAccumulator(finished=Finished("stop", TokenUsage(1, 2), stop_sequence="END"))
    fields = _done(
        answer, Told("x", "y", calls=True), with_text=False, metadata={"k": 1}, warnings=("odd",), timings={}
    )
    assert fields == {
        "content_omitted": True,
        "finish_reason": "stop",
        "stop_sequence": "END",
        "usage": usage_fields(TokenUsage(1, 2)),
        "timings": {},
        "dropped_messages": 0,
        "warnings": ["odd"],
        "metadata": {"k": 1},
    }


def test_thinking_and_calls_come_with_the_text() -> None:
    answer = AnswerAccumulator(finished=Finished("tool_calls", TokenUsage(1, 2)))
    answer.add_call(ToolCall(0, "c", "look", "{}"), 1.0)
    fields = _done(answer, Told("", "hm", calls=True), metadata={})
    assert (fields["full_reasoning"], fields["full_content"], fields["metadata"]) == ("hm", "", {})
    assert fields["message"]["tool_calls"][0]["id"] == "c"
    assert "stop_sequence" not in fields
    assert "tool_calls" not in _done(answer, Told("", "hm", calls=False))["message"]
