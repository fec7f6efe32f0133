"""The order of events, the writer that keeps to it, and the reader that follows the client's rules."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.events import (
    ORDER,
    EventReader,
    EventWriter,
    OutOfOrder,
    encode,
    interrupted,
    rejected,
    shrunk,
    split_to_bytes,
)
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
    sizes = [len(encode({"": part})) - len(encode({"": ""})) for part in parts]
    assert max(sizes) <= room
    for size, following in zip(sizes, parts[1:], strict=False):
        assert size + len(encode({"": following[0]})) - len(encode({"": ""})) > room, "as few parts as can be"


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


def test_every_event_says_what_the_protocol_says() -> None:
    writer = _writer()
    common = {"request_id": "r1", "session_id": "demo"}
    told = [
        writer.queued(position=2, reason="waiting"),
        writer.start({"model": "m", "worker": "w", "created": 1}),
        writer.progress(processed=3, total=5, cached=1),
        writer.ping(state="prompt"),
        *writer.chunks("reasoning", "hm"),
        *writer.chunks("content", "a"),
        writer.snapshot(content="a", reasoning="hm"),
        writer.error(code="busy", message="full", retryable=True, details={"retry_after_s": 5.0}),
    ]
    assert [json.loads(each) for each in told] == [
        {"type": "queued", **common, "position": 2, "reason": "waiting"},
        {"type": "start", **common, "protocol": 1, "model": "m", "worker": "w", "created": 1},
        {"type": "progress", **common, "processed": 3, "total": 5, "cached": 1},
        {"type": "ping", **common, "state": "prompt"},
        {"type": "chunk", **common, "seq": 0, "reasoning": "hm"},
        {"type": "chunk", **common, "seq": 1, "content": "a"},
        {"type": "snapshot", **common, "content": "a", "next_seq": 2, "reasoning": "hm"},
        {"type": "error", **common, "seq": 2, "final": True, "code": "busy", "message": "full", "retryable": True}
        | {"retry_after_s": 5.0},
    ]
    for each in told:
        validate_event(json.loads(each))
    done = json.loads(_done(_writer(), ""))
    assert (done["type"], done["seq"], done["final"]) == ("done", 0, True)


def test_a_snapshot_without_thinking_speaks_of_none() -> None:
    writer = _writer()
    writer.start({"worker": "w", "created": 1})
    assert "reasoning" not in json.loads(writer.snapshot(content="", reasoning=""))


@pytest.mark.parametrize("metadata", [None, {}, {"a": 1}])
def test_the_end_of_an_interrupted_request_has_no_number(metadata: dict[str, Any] | None) -> None:
    end = json.loads(
        interrupted(
            request_id="r1", session_id="demo", code="interrupted", message="died", retryable=True, metadata=metadata
        )
    )
    validate_event(end)
    assert end == {"type": "error", "request_id": "r1", "session_id": "demo", "final": True, "code": "interrupted"} | {
        "message": "died",
        "retryable": True,
    } | ({} if metadata is None else {"metadata": metadata})


def test_a_rejected_delivery_ends_nothing() -> None:
    event = json.loads(rejected(request_id="r1", session_id="demo", code="duplicate_request", message="taken"))
    validate_event(event)
    reader = EventReader("r1")
    assert reader.feed(event) is not None
    assert (reader.rejected, reader.ended) == (event, False)


def test_what_json_cannot_hold_is_replaced_and_the_rest_stays() -> None:
    odd = {
        "text": "a\ud800",
        "inside": ({"b": ["\udfff"]}, True, None, 1.5),
        "least": -(2**63),
        "most": 2**64 - 1,
        "below": -(2**63) - 1,
        "above": 2**64,
    }
    assert json.loads(encode(odd)) == {
        "text": "a\ufffd",
        "inside": [{"b": ["\ufffd"]}, True, None, 1.5],
        "least": -(2**63),
        "most": 2**64 - 1,
        "below": None,
        "above": None,
    }


def _longest(payloads: list[bytes], kind: str) -> int:
    return max(len(json.loads(each)[kind]) for each in payloads)


def test_a_chunk_keeps_four_hundred_bytes_for_names_and_numbers() -> None:
    """The borders are part of the promise: a chunk that is published again has the same ones."""
    writer = _writer(max_bytes=1024)
    writer.start({"worker": "w", "created": 1})
    assert [len(json.loads(each)["content"]) for each in writer.chunks("content", "x" * 1300)] == [624, 624, 52]
    assert writer.chunks("content", "") == []
    (whole,) = writer.tool_calls([{"index": 0, "arguments": "x" * 598}])
    assert json.loads(whole)["tool_calls"] == [{"index": 0, "arguments": "x" * 598}]
    parts = [json.loads(each)["tool_calls"][0] for each in writer.tool_calls([{"index": 0, "arguments": "x" * 599}])]
    assert [len(part["arguments"]) for part in parts] == [598, 1]


def test_calls_that_fit_into_one_chunk_together_come_together() -> None:
    writer = _writer(max_bytes=1024)
    writer.start({"worker": "w", "created": 1})
    calls = [{"index": n, "arguments": ""} for n in range(2)]
    room = 624 - len(encode({"": calls}))
    assert len(writer.tool_calls([calls[0] | {"arguments": "x" * room}, calls[1]])) == 1
    assert len(writer.tool_calls([calls[0] | {"arguments": "x" * (room + 1)}, calls[1]])) == 2


def test_longest_ids_fit_into_what_a_chunk_keeps_for_them() -> None:
    kinds: tuple[Literal["content", "reasoning"], ...] = ("content", "reasoning")
    for kind in kinds:
        writer = EventWriter(request_id="r" * 64, session_id="s" * 64 + "/" + "t" * 64, max_bytes=1024)
        writer.start({"worker": "w", "created": 1})
        writer.next_seq = 10**9
        assert max(map(len, writer.chunks(kind, "\x00" * 2000))) <= 1024


def test_however_small_the_limit_is_a_chunk_carries_sixteen_bytes() -> None:
    writer = _writer(max_bytes=100)
    writer.start({"worker": "w", "created": 1})
    assert _longest(writer.chunks("content", "x" * 40), "content") == 16
    parts = writer.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "y" * 40}])
    calls = [json.loads(each)["tool_calls"][0] for each in parts]
    assert [call["arguments"] for call in calls] == ["y" * 16, "y" * 16, "y" * 8]
    assert (calls[0]["id"], calls[0]["name"]) == ("c", "f")
    assert all(set(call) == {"index", "arguments"} for call in calls[1:])


def test_a_call_without_arguments_is_told_however_small_the_limit_is() -> None:
    writer = _writer(max_bytes=100)
    writer.start({"worker": "w", "created": 1})
    calls = [{"index": n, "id": "c", "name": "f", "arguments": ""} for n in range(2)]
    assert [json.loads(each)["tool_calls"] for each in writer.tool_calls(calls)] == [[call] for call in calls]


def test_an_event_that_fits_to_the_byte_is_left_whole() -> None:
    fields = {"worker": "w", "created": 1, "metadata": {"a": "x" * 300}}
    size = len(_writer().start(fields))
    assert "metadata" in json.loads(_writer(size).start(fields))
    assert "metadata" not in json.loads(_writer(size - 1).start(fields))
    for less, there in ((0, True), (1, False)):
        writer = _writer()
        writer.start({"worker": "w", "created": 1})
        writer.max_bytes = len(writer.snapshot(content="x" * 300, reasoning="y" * 300)) - less
        told = json.loads(writer.snapshot(content="x" * 300, reasoning="y" * 300))
        assert (told["content"] == "x" * 300, told.get("reasoning") == "y" * 300) == (there, there)
        assert told.get("content_omitted", False) is not there
    end = json.loads(_done(_writer(), "x" * 300))
    size = len(encode(end))
    assert json.loads(shrunk(end, size)) == end
    assert json.loads(shrunk(end, size - 1))["content_omitted"] is True


def test_an_end_is_kept_whole_only_where_that_was_asked_for() -> None:
    for whole in (True, False):
        end = json.loads(_writer(1024).done({"full_content": "x" * 2000}, whole=whole))
        assert ("full_content" in end) is whole
        end = json.loads(
            _writer(1024).error(
                code="timeout", message="", retryable=False, details={"partial_content": "x" * 2000}, whole=whole
            )
        )
        assert ("partial_content" in end) is whole
    assert "full_content" not in json.loads(_writer(1024).done({"full_content": "x" * 2000}))
    error = _writer(1024).error(code="timeout", message="", retryable=False, details={"partial_content": "x" * 2000})
    assert "partial_content" not in json.loads(error)


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


def test_a_reader_begins_with_nothing() -> None:
    reader = EventReader("r1")
    assert (reader.content, reader.reasoning, reader.tool_calls, reader.next_seq) == ("", "", [], 0)
    assert (reader.ended, reader.hole, reader.cut_short, reader.rejected) == (False, False, False, None)
    assert reader.expects_text


def _chunk(seq: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "chunk", "request_id": "r1", "seq": seq, **fields}


def test_a_chunk_that_came_before_is_not_read_again_and_one_that_is_ahead_shows_a_hole() -> None:
    reader = EventReader("r1")
    assert reader.feed(_chunk(0, content="a")) is not None
    assert reader.feed(_chunk(0, content="a")) is None
    assert not reader.hole
    assert reader.feed(_chunk(2, content="c")) is None
    assert (reader.hole, reader.content, reader.next_seq) == (True, "a", 1)
    assert reader.feed(_chunk(1, content="b")) is not None
    assert (reader.hole, reader.content, reader.next_seq) == (False, "ab", 2)
    assert reader.feed(_chunk("2", content="c")) is None


def test_a_snapshot_of_what_is_known_already_says_that_nothing_is_missing() -> None:
    reader = EventReader("r1")
    reader.feed(_chunk(0, content="a"))
    reader.feed(_chunk(2, content="c"))
    snapshot = {"type": "snapshot", "request_id": "r1", "content": "a", "next_seq": 1}
    assert reader.feed(snapshot | {"next_seq": 0}) is None
    assert reader.hole
    assert reader.feed(snapshot) is not None
    assert (reader.hole, reader.content, reader.next_seq) == (False, "a", 1)


def test_a_snapshot_without_text_fills_no_hole() -> None:
    reader = EventReader("r1")
    reader.feed(_chunk(1, content="b"))
    snapshot = {"type": "snapshot", "request_id": "r1", "content": "", "content_omitted": True, "next_seq": 2}
    reading = reader.feed(snapshot)
    assert reading is not None
    assert (reading.event, reader.hole, reader.next_seq) == (snapshot, True, 0)


def test_a_snapshot_and_an_end_bring_the_text_that_was_missing() -> None:
    reader = EventReader("r1")
    reader.feed(_chunk(0, reasoning="h"))
    reader.feed(_chunk(1, content="a"))
    snapshot = {"type": "snapshot", "request_id": "r1", "content": "ab", "reasoning": "hm", "next_seq": 4}
    reading = reader.feed(snapshot)
    assert reading is not None
    assert (reading.content, reading.reasoning) == ("b", "m")
    assert (reader.content, reader.reasoning, reader.next_seq) == ("ab", "hm", 4)
    end = {"type": "done", "request_id": "r1", "seq": 9, "full_content": "abc", "full_reasoning": "hmm"}
    reading = reader.feed(end)
    assert reading is not None
    assert (reading.content, reading.reasoning) == ("c", "m")
    assert (reader.content, reader.reasoning, reader.terminal) == ("abc", "hmm", end)


def test_an_error_ends_a_request_with_or_without_its_text() -> None:
    for told, text in (({}, "a"), ({"partial_content": "ab"}, "ab")):
        reader = EventReader("r1")
        reader.feed(_chunk(0, content="a"))
        reader.feed({"type": "error", "request_id": "r1", "seq": 7, "code": "timeout", **told})
        assert (reader.ended, reader.hole, reader.content) == (True, False, text)


def test_an_end_that_cannot_say_how_many_chunks_there_were_is_not_believed_without_its_text() -> None:
    done = {"type": "done", "request_id": "r1", "content_omitted": True}
    for seq in (None, "0"):
        reader = EventReader("r1", expects_text=False)
        assert reader.feed(done | {"seq": seq}) is None
        assert reader.cut_short


def test_deltas_of_several_calls_are_joined_by_their_number() -> None:
    reader = EventReader("r1")
    deltas = [
        {"index": 1, "id": "b", "name": "g", "arguments": "2"},
        {"arguments": "1", "id": "a", "name": "f"},
        "odd",
        {"index": "0", "arguments": "lost"},
        {"index": 0, "id": "late", "name": "late", "arguments": "1"},
    ]
    reading = reader.feed(_chunk(0, tool_calls=deltas))
    assert reading is not None
    assert len(reading.tool_calls) == 4
    assert reader.tool_calls == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "11"}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "2"}},
    ]
