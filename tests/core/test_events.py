"""The order of events, the writer that keeps to it, and the reader that follows the client's rules."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.events import ORDER, EventReader, EventWriter, OutOfOrder, encode, split_to_bytes
from llamacpp_mqtt_deploy.schema.document import validate_event

PIECES = st.lists(st.tuples(st.sampled_from(["content", "reasoning"]), st.text(min_size=1, max_size=30)), max_size=30)


def _writer(max_bytes: int = 131072) -> EventWriter:
    return EventWriter(request_id="r1", session_id="demo", max_bytes=max_bytes)


def _done(writer: EventWriter, text: str) -> bytes:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cached_tokens": 0}
    return writer.done(
        {
            "full_content": text,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "usage": usage,
            "timings": {"queue_ms": 0.0, "total_ms": 1.0},
            "dropped_messages": 0,
        }
    )


def _stream(pieces: list[tuple[str, str]], max_bytes: int = 131072) -> list[dict[str, Any]]:
    writer = _writer(max_bytes)
    payloads = [writer.queued(position=1, reason="waiting"), writer.start({"model": "m", "worker": "w", "created": 1})]
    for kind, text in pieces:
        payloads += writer.chunks(kind, text)  # type: ignore[arg-type]
    payloads.append(_done(writer, "".join(text for kind, text in pieces if kind == "content")))
    return [json.loads(payload) for payload in payloads]


def test_every_phase_of_the_order_but_the_end_leads_to_the_end() -> None:
    for phase, following in ORDER.items():
        if phase != "ended":
            assert {"done", "error"} <= set(following)
        assert set(following.values()) <= set(ORDER)


def test_nothing_follows_the_terminal_event() -> None:
    writer = _writer()
    writer.error(code="busy", message="full", retryable=True, details={})
    assert not any(writer.allows(kind) for kind in ORDER["new"])
    with pytest.raises(OutOfOrder):
        writer.chunks("content", "late")


@given(PIECES)
def test_joined_chunks_are_the_full_content_and_numbers_have_no_hole(pieces: list[tuple[str, str]]) -> None:
    events = _stream(pieces)
    for event in events:
        validate_event(event)
    chunks = [event for event in events if event["type"] == "chunk"]
    assert [event["seq"] for event in chunks] == list(range(len(chunks)))
    assert events[-1]["seq"] == len(chunks)
    assert "".join(event.get("content", "") for event in chunks) == events[-1]["full_content"]


@given(st.text(min_size=1, max_size=400), st.integers(16, 100))
def test_long_text_is_cut_on_character_borders_within_the_limit(text: str, room: int) -> None:
    parts = split_to_bytes(text, room)
    assert "".join(parts) == text
    assert all(len(encode({"": part})) - len(encode({"": ""})) <= room or len(part) == 1 for part in parts)


def test_no_event_is_larger_than_the_limit() -> None:
    writer = _writer(max_bytes=1024)
    text = "\x00\u2028ä😀" * 2000
    payloads = [writer.start({"worker": "w", "created": 1}), *writer.chunks("content", text)]
    payloads.append(writer.snapshot(content=text, reasoning=text))
    payloads.append(_done(writer, text))
    assert max(map(len, payloads)) <= 1024
    assert json.loads(payloads[-1])["content_omitted"] is True
    assert "".join(json.loads(each)["content"] for each in payloads[1:-2]) == text


def test_a_lone_surrogate_of_an_engine_becomes_a_replacement_character() -> None:
    writer = _writer()
    writer.start({"worker": "w", "created": 1})
    assert json.loads(writer.chunks("content", "a\ud800b")[0])["content"] == "a\ufffdb"


@given(PIECES, st.data())
def test_a_reader_that_loses_and_repeats_events_reads_the_same_answer(
    pieces: list[tuple[str, str]], data: st.DataObject
) -> None:
    """QoS 1 repeats, brokers drop the newest, and a request sent again is answered with a snapshot."""
    events = _stream(pieces)
    reader = EventReader("r1")
    heard: list[str] = []

    def feed(event: dict[str, Any]) -> None:
        reading = reader.feed(event)
        if reading is not None:
            heard.append(reading.content)

    told: dict[str, str] = {"content": "", "reasoning": ""}
    for event in events[:-1]:
        if event["type"] == "chunk":
            kind = "content" if "content" in event else "reasoning"
            told[kind] += event[kind]
        fate = data.draw(st.sampled_from(["kept", "kept", "lost", "doubled"]))
        if event["type"] == "chunk" and fate == "lost":
            continue
        feed(event)
        if fate == "doubled":
            feed(event)
        if reader.hole:
            done = event["seq"] + 1
            snapshot = {"type": "snapshot", "request_id": "r1", "session_id": "demo", "next_seq": done} | told
            feed(snapshot)
            assert not reader.hole
    feed(events[-1])
    feed(events[-1])
    full = events[-1]["full_content"]
    assert reader.content == "".join(heard) == full
    assert reader.ended
    assert not reader.hole


def test_an_end_without_text_is_no_end_while_its_chunks_are_missing() -> None:
    reader = EventReader("r1")
    done = {"type": "done", "request_id": "r1", "seq": 3, "final": True, "content_omitted": True}
    assert reader.feed(done) is None
    assert (reader.ended, reader.hole, reader.cut_short) == (False, True, True)
    for seq in range(3):
        reader.feed({"type": "chunk", "request_id": "r1", "seq": seq, "content": f"{seq}"})
    assert not reader.hole
    assert reader.feed(done) is not None
    assert (reader.ended, reader.hole, reader.cut_short, reader.content) == (True, False, False, "012")


def test_an_end_that_never_had_text_or_chunks_is_one_only_where_it_was_asked_for() -> None:
    done = {"type": "done", "request_id": "r1", "seq": 0, "final": True, "content_omitted": True}
    wanting = EventReader("r1")
    wanting.feed(done)
    assert (wanting.ended, wanting.hole) == (False, True)
    content = EventReader("r1", expects_text=False)
    content.feed(done)
    assert (content.ended, content.hole) == (True, False)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
FIELDS = (
    "seq", "content", "reasoning", "tool_calls", "next_seq", "full_content", "full_reasoning", "partial_content",
    "content_omitted", "message", "usage", "index", "arguments",
)  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["chunk", "snapshot", "done", "error", "start", "queued"]),
            st.dictionaries(st.sampled_from(FIELDS), JSON),
            st.lists(st.dictionaries(st.sampled_from(["index", "id", "name", "arguments"]), JSON), max_size=2),
        ),
        max_size=8,
    )
)
def test_fields_of_a_wrong_type_never_end_the_reader(events: list[tuple[str, dict[str, Any], list[Any]]]) -> None:
    reader = EventReader("r1")
    for number, (kind, fields, deltas) in enumerate(events):
        reader.feed({"type": kind, "request_id": "r1", "seq": number, "tool_calls": deltas} | fields)
    assert isinstance(reader.content + reader.reasoning, str)
    assert all(isinstance(call["function"]["arguments"], str) for call in reader.tool_calls)


def test_a_reader_does_not_mix_in_another_answer() -> None:
    reader = EventReader("r1")
    reader.feed({"type": "chunk", "request_id": "r1", "seq": 0, "content": "one"})
    reader.feed({"type": "chunk", "request_id": "r2", "seq": 1, "content": "two"})
    reader.feed({"type": "snapshot", "request_id": "r1", "next_seq": 5, "content": "another start"})
    assert reader.content == "one"


def test_unknown_types_and_fields_are_ignored() -> None:
    reader = EventReader("r1")
    assert reader.feed({"type": "hologram", "request_id": "r1"}) is None
    assert reader.feed({"type": "start", "request_id": "r1", "colour": "blue"}) is not None


def test_tool_call_deltas_are_joined() -> None:
    reader = EventReader("r1")
    for seq, delta in enumerate(
        [{"index": 0, "id": "c", "name": "f", "arguments": "{"}, {"index": 0, "arguments": "}"}]
    ):
        reader.feed({"type": "chunk", "request_id": "r1", "seq": seq, "tool_calls": [delta]})
    assert reader.tool_calls == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
