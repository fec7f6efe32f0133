"""A stored end is made to fit whatever the broker takes, and its text stays within reach."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.events import EventReader, encode
from llamacpp_mqtt_deploy.core.fitting import fitted, refitted
from llamacpp_mqtt_deploy.schema.document import validate_event

USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cached_tokens": 0}
TIMINGS = {"queue_ms": 1.0, "total_ms": 2.0}
CALL = {"id": "c0", "type": "function", "function": {"name": "look", "arguments": '{"at": "' + "ä" * 700 + '"}'}}


def _done(content: str, *, reasoning: str = "", calls: list[Any] | None = None, seq: int = 0, **more: Any) -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
    event = {"type": "done", "request_id": "r1", "session_id": "demo", "seq": seq, "final": True}
    event |= {"full_content": content, "message": message} | ({"full_reasoning": reasoning} if reasoning else {})
    event |= {"finish_reason": "stop", "usage": USAGE, "timings": TIMINGS, "dropped_messages": 0}
    return encode(event | more)


def _read(events: list[bytes]) -> EventReader:
    reader = EventReader("r1")
    for event in events:
        reader.feed(json.loads(event))
    return reader


@given(st.text(max_size=3000), st.text(max_size=2000), st.sampled_from([1024, 2000, 16384, 40000]))
def test_what_fits_is_left_alone_and_what_does_not_is_joined_from_chunks(
    content: str, reasoning: str, limit: int
) -> None:
    terminal = _done(content, reasoning=reasoning, calls=[CALL])
    events = fitted(terminal, limit)
    assert max(map(len, events)) <= limit
    assert (events == [terminal]) is (len(terminal) <= limit)
    reader = _read(events)
    assert (reader.ended, reader.hole) == (True, False)
    assert (reader.content, reader.reasoning) == (content, reasoning)
    end = json.loads(events[-1])
    if events != [terminal]:
        assert reader.tool_calls == [CALL]
        assert (end["seq"], end["content_omitted"]) == (len(events) - 1, True)


def test_chunks_of_an_end_have_the_same_borders_under_a_little_smaller_limit() -> None:
    terminal = _done("word " * 20_000)
    assert fitted(terminal, 40_000)[:-1] == fitted(terminal, 20_000)[:-1]
    assert fitted(terminal, 4000)[:-1] == fitted(terminal, 1500)[:-1]


def test_an_end_that_fits_to_the_byte_goes_out_alone() -> None:
    terminal = _done("x" * 2000)
    assert fitted(terminal, len(terminal)) == [terminal]
    assert len(fitted(terminal, len(terminal) - 1)) > 1


def _first(limit: int) -> int:
    return len(json.loads(fitted(_done("x" * 60_000), limit)[0])["content"])


def test_chunks_of_an_end_have_one_of_two_sizes_unless_the_limit_is_below_both() -> None:
    assert [_first(limit) for limit in (1000, 1024, 16_383)] == [600, 624, 624]
    assert [_first(limit) for limit in (16_384, 50_000)] == [15_984, 15_984]


@given(st.text(min_size=2000, max_size=9000), st.integers(0, 3))
def test_a_limit_that_shrinks_on_the_way_cuts_the_rest_and_goes_on_counting(content: str, sent: int) -> None:
    events = fitted(_done(content * 9, reasoning="hm" * 4000, calls=[CALL]), 16384)
    sent = min(sent, len(events) - 1)
    rest = refitted(events[sent:], sent, 1024)
    assert max(map(len, rest)) <= 1024
    reader = _read([*events[:sent], *rest])
    assert reader.ended
    assert (reader.content, reader.reasoning) == (content * 9, "hm" * 4000)
    assert reader.tool_calls == [CALL]


def test_text_that_chunks_have_told_is_left_out_of_the_end() -> None:
    (event,) = fitted(_done("x" * 2000, seq=7), 1024)
    end = json.loads(event)
    validate_event(end)
    assert (end["seq"], end["content_omitted"], "full_content" in end) == (7, True, False)


def test_partial_text_of_an_error_is_told_in_chunks_too_and_its_message_stays() -> None:
    error = {"type": "error", "request_id": "r1", "session_id": "demo", "seq": 0, "final": True, "code": "timeout"}
    error |= {"message": "too late", "retryable": False, "partial_content": "x" * 2000}
    events = fitted(encode(error), 1024)
    assert _read(events).content == "x" * 2000
    end = json.loads(events[-1])
    validate_event(end)
    assert (end["message"], end["seq"]) == ("too late", len(events) - 1)


def test_an_answer_without_text_gives_up_the_metadata_before_it_says_that_text_is_missing() -> None:
    (event,) = fitted(_done("", metadata={"note": "m" * 2000}), 1024)
    end = json.loads(event)
    assert (end["full_content"], "metadata" in end, "content_omitted" in end) == ("", False, False)


def test_a_long_explanation_is_cut_at_last() -> None:
    error = {"type": "error", "request_id": "r1", "session_id": "demo", "final": True, "code": "bad_request"}
    error |= {"message": "m" * 3000, "retryable": False, "fields": {"prompt": "f" * 3000}, "metadata": {"a": 1}}
    (event,) = fitted(encode(error), 1024)
    end = json.loads(event)
    assert len(event) <= 1024
    assert (end["code"], end["message"]) == ("bad_request", "m" * 200)
