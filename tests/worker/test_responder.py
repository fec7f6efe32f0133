"""The responder lets text go as the broker keeps up, and leaves none lying."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.flow import MOST_CHARS_AT_ONCE, MOST_IN_FLIGHT
from llamacpp_mqtt_deploy.ports import Delivery, Published
from llamacpp_mqtt_deploy.worker.responder import Responder


class SlowBroker:
    """Takes publishes and acknowledges when it is told to."""

    def __init__(self, *, places: int = 1000) -> None:
        self.places = places
        self.events: list[dict[str, Any]] = []
        self.pending: list[Callable[[bool], None]] = []
        self.taken = threading.Semaphore(0)

    def publish(
        self, topic: str, payload: bytes, *, on_done: Callable[[bool], None] | None = None, **_: Any
    ) -> Published:
        if len(self.events) >= self.places:
            return "full"
        self.events.append(json.loads(payload))
        if on_done is not None:
            self.pending.append(on_done)
        self.taken.release()
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError

    def acknowledge_next(self) -> None:
        self.pending.pop(0)(True)

    def chunks(self) -> list[Any]:
        return [event.get("content") or event.get("tool_calls") for event in self.events if event["type"] == "chunk"]


def _responder(
    broker: SlowBroker, woken: list[Callable[[], None]] | None = None, *, max_bytes: int = 4096, held: bool = False
) -> Responder:
    wake = (lambda _s, call: woken.append(call)) if woken is not None else (lambda _s, call: call())
    responder = Responder(
        outbox=broker,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r", session_id="demo", max_bytes=max_bytes),
        correlation=None,
        silent=False,
        wake=wake,
    )
    if held:
        responder.hold()
    responder.start({"worker": "w", "created": 1})
    return responder


def test_text_collects_until_the_piece_before_it_is_acknowledged() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    for word in ("one ", "two ", "three "):
        responder.text("content", word)
    assert broker.chunks() == ["one "]
    broker.acknowledge_next()
    assert broker.chunks() == ["one ", "two three "]
    responder.text("content", "four")
    responder.flush()
    assert broker.chunks() == ["one ", "two three ", "four"]


def test_what_one_read_brought_goes_out_as_one_chunk() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    responder.settle()
    for word in ("one ", "two ", "three "):
        responder.text("content", word)
    assert broker.chunks() == []
    responder.settle()
    assert broker.chunks() == ["one two three "]


def test_text_left_by_a_slow_broker_goes_out_with_its_acknowledgement_while_the_engine_is_silent() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    responder.settle()
    responder.text("content", "one ")
    responder.settle()
    responder.text("content", "two ")
    responder.settle()  # waits a moment, and reads on
    assert broker.chunks() == ["one "]
    broker.acknowledge_next()
    assert broker.chunks() == ["one ", "two "]


def test_sentences_that_the_broker_does_not_acknowledge_wait_beyond_a_number_and_keep_their_borders() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    sentences = [f"Sentence {number}. " for number in range(200)]
    for sentence in sentences:
        responder.piece("content", sentence)
        responder.settle()
    assert broker.chunks() == sentences[:MOST_IN_FLIGHT]
    for _ in range(MOST_IN_FLIGHT):
        broker.acknowledge_next()
    assert broker.chunks() == sentences
    assert [event["seq"] for event in broker.events if event["type"] == "chunk"] == list(range(200))


def test_sentences_that_still_wait_go_out_before_the_end() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    for number in range(200):
        responder.piece("content", f"Sentence {number}. ")
    told = responder.close_text(content="", reasoning="", catch_up=False)
    assert len(broker.chunks()) == 200
    assert told.content == "".join(broker.chunks())


def test_a_long_text_that_has_waited_for_the_broker_goes_out_in_parts_as_it_acknowledges() -> None:
    broker = SlowBroker()
    responder = _responder(broker, max_bytes=100_000)
    text = "".join(f"{number:07} " for number in range(100_000))
    responder.text("content", "first")
    for start in range(0, len(text), 1000):
        responder.text("content", text[start : start + 1000])
    assert broker.chunks() == ["first"]
    most = 0
    while broker.pending:
        most = max(most, sum(map(len, broker.chunks())) - sum(map(len, broker.chunks()[: -len(broker.pending)])))
        broker.acknowledge_next()
    assert most <= MOST_CHARS_AT_ONCE
    assert "".join(broker.chunks()) == "first" + text


def test_a_reader_rests_after_a_chunk_where_the_engine_is_quick_and_reads_on_where_it_is_slow() -> None:
    broker = SlowBroker()
    responder = Responder(
        outbox=broker,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r", session_id="demo", max_bytes=4096),
        correlation=None,
        silent=False,
        wake=lambda _s, _call: None,
        coalesce_min_s=0.01,
    )
    responder.start({"worker": "w", "created": 1})
    responder.settle()
    responder.text("content", "one ")
    assert responder.settle(pieces=2) == 0.01
    broker.acknowledge_next()
    responder._flow.sent_at = -1.0
    responder.text("content", "two ")
    assert responder.settle() == 0.0
    assert broker.chunks() == ["one ", "two "]


def test_many_streams_at_once_send_fewer_chunks_each() -> None:
    broker = SlowBroker()
    active_streams = 8
    responder = Responder(
        outbox=broker,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r", session_id="demo", max_bytes=4096),
        correlation=None,
        silent=False,
        wake=lambda _s, _call: None,
        coalesce_min_s=0.01,
        active_streams=lambda: active_streams,
    )
    responder.start({"worker": "w", "created": 1})
    responder.settle()
    assert responder._flow.interval_s == 0.02
    active_streams = 1
    responder.settle()
    assert responder._flow.interval_s == 0.01


def test_pieces_of_a_tool_call_are_joined_like_text_and_keep_their_order() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    responder.text("content", "look: ")
    responder.tool_call({"index": 0, "id": "c", "name": "f", "arguments": "{"})
    responder.tool_call({"index": 0, "arguments": '"a": 1'})
    responder.tool_call({"index": 0, "arguments": "}"})
    responder.tool_call({"index": 1, "id": "d", "name": "g", "arguments": "{}"})
    broker.acknowledge_next()
    assert broker.chunks() == [
        "look: ",
        [
            {"index": 0, "id": "c", "name": "f", "arguments": '{"a": 1}'},
            {"index": 1, "id": "d", "name": "g", "arguments": "{}"},
        ],
    ]


def test_an_acknowledgement_only_wakes_and_never_publishes_in_the_links_thread() -> None:
    broker = SlowBroker()
    woken: list[Callable[[], None]] = []
    responder = _responder(broker, woken)
    responder.text("content", "one ")
    responder.text("content", "two ")
    broker.acknowledge_next()
    assert broker.chunks() == ["one "]
    woken.pop()()
    assert broker.chunks() == ["one ", "two "]


def test_a_snapshot_tells_the_reasoning_and_the_content_that_were_published_so_far() -> None:
    broker = SlowBroker()
    responder = _responder(broker)
    assert responder.snapshot()
    responder.text("reasoning", "hm, ")
    broker.acknowledge_next()
    responder.text("content", "Hello")
    responder.text("content", " (waits)")
    assert responder.snapshot()
    empty, full = (event for event in broker.events if event["type"] == "snapshot")
    assert (empty["content"], empty.get("reasoning", ""), empty["next_seq"]) == ("", "", 0)
    assert (full["content"], full["reasoning"], full["next_seq"]) == ("Hello", "hm, ", 2)
    responder.close()
    assert not responder.snapshot()


def test_a_stream_that_tells_only_its_end_has_no_snapshot() -> None:
    broker = SlowBroker()
    responder = Responder(
        outbox=broker,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r", session_id="demo", max_bytes=4096),
        correlation=None,
        silent=True,
        wake=lambda _s, _call: None,
    )
    responder.start({"worker": "w", "created": 1})
    assert not responder.snapshot()
    assert broker.events == []


def test_text_that_waits_goes_out_before_the_end_and_nothing_after_it() -> None:
    for fields in ({"finish_reason": "stop"}, None):
        broker = SlowBroker()
        responder = _responder(broker)
        responder.text("content", "one ")
        responder.text("content", "two")
        if fields is not None:
            end = responder.done(fields)
        else:
            end = responder.error(code="timeout", message="late", retryable=True, details={})
        assert broker.chunks() == ["one ", "two"]
        assert json.loads(end)["seq"] == 2
        before = len(broker.events)
        responder.text("content", "too late")
        responder.ping(state="generating")
        responder.flush()
        assert len(broker.events) == before


def test_the_time_of_the_first_chunk_stays_and_that_of_the_latest_event_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    broker = SlowBroker()
    responder = _responder(broker)
    times: list[tuple[float | None, float | None]] = [(responder.first_chunk_at, responder.last_event_at)]
    for text in ("one ", "two"):
        responder.piece("content", text)
        times.append((responder.first_chunk_at, responder.last_event_at))
    (none, start), (first, first_too), (still_first, second) = times
    assert none is None
    assert first == first_too == still_first
    assert start is not None
    assert first is not None
    assert second is not None
    assert start < first < second


@given(places=st.integers(1, 12), held=st.booleans(), more=st.integers(0, 3))
def test_after_an_event_that_the_outbox_refused_only_the_end_goes_out_and_it_has_the_next_number(
    places: int, held: bool, more: int
) -> None:
    broker = SlowBroker(places=places)
    responder = _responder(broker, [], max_bytes=400, held=held)
    overflows: list[None] = []
    responder.on_overflow = lambda: overflows.append(None)
    answer = "one two three " * 100  # does not fit into one event
    responder.piece("reasoning", "hm, ")
    responder.piece("content", answer)
    if held:
        responder.release()
    broker.places += more  # the broker takes events again: too late for this stream
    responder.piece("content", "four")
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "{}"}])
    responder.ping(state="generating")
    assert not responder.snapshot() or not overflows
    told = responder.close_text(content=answer + "four", reasoning="hm, ", catch_up=True)
    end = json.loads(responder.error(code="interrupted", message="full", retryable=True, details={}))

    chunks = [event for event in broker.events if event["type"] == "chunk"]
    assert [chunk["seq"] for chunk in chunks] == list(range(len(chunks)))
    assert end["seq"] == responder.chunks == len(chunks)
    assert told.content == "".join(chunk.get("content", "") for chunk in chunks)
    assert told.reasoning == "".join(chunk.get("reasoning", "") for chunk in chunks)
    assert told.calls == any("tool_calls" in chunk for chunk in chunks)
    assert responder.unacknowledged() == len(chunks)
    assert (responder.first_chunk_at is not None) == bool(chunks)
    assert len(overflows) == responder.overflowed
    assert len(broker.events) <= places or not overflows


@pytest.mark.parametrize("how", ["done", "error"])
def test_an_end_keeps_to_the_limit_that_the_broker_has_by_then(how: str) -> None:
    broker, limit = SlowBroker(), 4096
    responder = Responder(
        outbox=broker,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r", session_id="demo", max_bytes=limit),
        correlation=None,
        silent=False,
        wake=lambda _s, call: call(),
        max_event_bytes=lambda: limit,
    )
    responder.start({"worker": "w", "created": 1})
    responder.text("content", "x" * 600)
    limit = 512
    if how == "done":
        end = responder.done({"full_content": "x" * 600, "finish_reason": "stop"})
    else:
        end = responder.error(code="timeout", message="late", retryable=True, details={"partial_content": "x" * 600})
    assert len(end) <= limit
    assert json.loads(end)["content_omitted"]
