"""Events that wait for the journal: in order, whole, and as if they had never been where the journal refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.events import EventWriter, encode
from llamacpp_mqtt_deploy.core.flow import KEEP_UP_S
from llamacpp_mqtt_deploy.io_loop import Timer
from llamacpp_mqtt_deploy.ports import Published
from llamacpp_mqtt_deploy.worker.responder import Responder
from tests.support.lone_job import Taker

_TOPIC = ',"_topic":"llm/reply/demo"'
"""What the outbox of these tests adds to an event."""


class Shares(Taker):
    """Refuses events, answers, or nothing; notes whose part of the outbox was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.full: set[str] = set()
        self.shares: list[str] = []
        self.places = 1000

    def publish(self, topic: str, payload: bytes, *, share: str = "event", **more: Any) -> Published:
        if share in self.full or len(self.events) >= self.places:
            return "full"
        self.shares.append(share)
        return super().publish(topic, payload, **more)

    def chunks(self) -> list[Any]:
        return [event.get("content") or event.get("reasoning") for event in self.events if event["type"] == "chunk"]


class Wakes:
    """Remembers what is to be called, and when."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None], Timer | None]] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> Timer | None:
        timer = Timer(call) if seconds > 0 else None
        self.calls.append((seconds, call, timer))
        return timer


def _responder(outbox: Shares, *, wake: Wakes | None = None, max_bytes: int = 4096, **more: Any) -> Responder:
    return Responder(
        outbox=outbox,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r1", session_id="demo", max_bytes=max_bytes),
        correlation=None,
        silent=False,
        wake=wake or Wakes(),
        **more,
    )


def _started(outbox: Shares, **more: Any) -> Responder:
    responder = _responder(outbox, **more)
    responder.start({"worker": "w", "created": 1})
    return responder


# --- held --------------------------------------------------------------------------------------------------------------


def test_events_wait_until_every_hold_is_released_and_keep_their_order_and_share() -> None:
    outbox = Shares()
    responder = _responder(outbox)
    responder.hold()
    responder.hold()
    responder.queued(position=1, reason="waiting")
    responder.queued(position=2, reason="waiting", share="answer")
    responder.start({"worker": "w", "created": 1})
    responder.release()
    assert outbox.events == []
    responder.release()
    assert outbox.kinds() == ["queued", "queued", "start"]
    assert outbox.shares == ["event", "answer", "event"]
    responder.piece("content", "a")
    assert outbox.chunks() == ["a"]


def test_an_answer_that_finds_no_place_after_the_wait_costs_the_stream_nothing() -> None:
    outbox = Shares()
    responder = _responder(outbox)
    responder.hold()
    responder.queued(position=1, reason="waiting", share="answer")
    responder.start({"worker": "w", "created": 1})
    responder.piece("content", "a")
    outbox.full = {"answer"}
    responder.release()
    assert outbox.kinds() == ["start", "chunk"]
    assert not responder.overflowed
    assert json.loads(responder.done({"finish_reason": "stop"}))["seq"] == 1


def test_a_request_that_the_journal_refused_has_told_nothing_at_all() -> None:
    outbox = Shares()
    responder = _responder(outbox)
    responder.hold()
    responder.hold()
    responder.start({"worker": "w", "created": 1})
    responder.piece("reasoning", "hm")
    responder.piece("content", "one")
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "{}"}])
    responder.withdraw()
    assert (responder.chunks, responder.unacknowledged(), responder.first_chunk_at) == (0, 0, None)
    assert responder.chunk_record() is None
    told = responder.close_text(content="one", reasoning="hm", catch_up=True)
    assert (told.content, told.reasoning, told.calls) == ("", "", False)
    end = json.loads(responder.error(code="internal", message="no", retryable=False, details={}))
    assert end["seq"] == 0
    responder.piece("content", "late")
    for _ in range(2):
        responder.release()
    assert outbox.events == []


def test_chunks_that_wait_are_taken_back_where_their_beginning_could_not_be_noted() -> None:
    outbox = Shares()
    responder = _responder(outbox)
    responder.hold()
    responder.start({"worker": "w", "created": 1})
    responder.piece("reasoning", "hm")
    responder.piece("content", "one")
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "{}"}])
    responder.withhold_text()
    responder.release()
    assert outbox.kinds() == ["start"]
    assert (responder.chunks, responder.unacknowledged(), responder.first_chunk_at) == (0, 0, None)
    assert responder.chunk_record() is None
    responder.piece("content", "two")
    responder.tool_calls([{"index": 1, "id": "d", "name": "g", "arguments": "{}"}])
    responder.ping(state="generating")
    assert outbox.kinds() == ["start", "ping"]
    told = responder.close_text(content="one two", reasoning="hm", catch_up=True)
    assert (told.content, told.reasoning, told.calls) == ("one two", "hm", True)
    end = json.loads(responder.done({"full_content": "x" * 5000, "finish_reason": "stop"}))
    assert (end["seq"], len(end["full_content"])) == (0, 5000), "whole, since no chunk told it"


def test_chunks_that_went_out_already_cannot_be_taken_back() -> None:
    outbox = Shares()
    responder = _started(outbox)
    responder.piece("content", "one ")
    responder.withhold_text()
    assert not responder.withheld
    responder.piece("content", "two")
    assert outbox.chunks() == ["one ", "two"]


@pytest.mark.parametrize("places, told", [(0, ""), (1, ""), (2, "one "), (3, "one two ")])
def test_what_finds_no_place_after_the_wait_is_not_told(places: int, told: str) -> None:
    outbox = Shares()
    responder = _responder(outbox)
    overflows: list[None] = []
    responder.on_overflow = lambda: overflows.append(None)
    responder.hold()
    responder.start({"worker": "w", "created": 1})
    for text in ("one ", "two ", "three"):
        responder.piece("content", text)
    outbox.places = places
    responder.release()
    assert overflows == [None]
    assert responder.close_text(content="one two three", reasoning="", catch_up=True).content == told
    chunks = max(0, places - 1)
    assert responder.chunks == responder.unacknowledged() == chunks
    assert (responder.first_chunk_at is None) is (chunks == 0)
    record = responder.chunk_record()
    assert (record is None) is (chunks == 0)


# --- told again --------------------------------------------------------------------------------------------------------


def test_a_snapshot_takes_no_place_of_a_stream() -> None:
    outbox = Shares()
    responder = _started(outbox)
    responder.piece("content", "one")
    outbox.full = {"answer"}
    assert responder.snapshot()
    assert not responder.overflowed
    outbox.full = set()
    assert responder.snapshot()
    assert outbox.kinds() == ["start", "chunk", "snapshot"]
    assert outbox.shares[-1] == "answer"


def _long(outbox: Shares, *, held: bool = False) -> Responder:
    responder = _responder(outbox, max_bytes=1024)
    if held:
        responder.hold()
    responder.start({"worker": "w", "created": 1})
    responder.piece("content", "word " * 500)
    return responder


def test_chunks_told_again_stop_where_there_is_no_place_and_cost_the_stream_nothing() -> None:
    outbox = Shares()
    responder = _long(outbox)
    told = outbox.chunks()
    assert len(told) > 3
    outbox.places = len(outbox.events) + 2
    assert responder.snapshot()
    assert outbox.chunks() == told + told[:2]
    assert not responder.overflowed
    assert outbox.shares[-2:] == ["answer"] * 2
    outbox.places = 1000
    responder.piece("content", "more")
    assert outbox.chunks()[-1] == "more"


def test_chunks_that_are_only_about_to_go_out_are_not_told_twice() -> None:
    outbox = Shares()
    responder = _long(outbox, held=True)
    assert responder.snapshot()
    responder.release()
    events = outbox.kinds()
    assert events.count("snapshot") == 0
    assert "".join(outbox.chunks()) == "word " * 500


def test_waiting_is_told_before_the_start_and_afterwards_only_where_it_waits_again() -> None:
    outbox = Shares()
    responder = _responder(outbox)
    responder.queued(position=2, reason="waiting")
    responder.queued(position=1, reason="waiting")
    responder.start({"worker": "w", "created": 1})
    responder.queued(position=1, reason="waiting")
    assert outbox.kinds() == ["queued", "queued", "start"]
    responder.queued(position=0, reason="engine_restarting", again=True)
    responder.start({"worker": "w", "created": 1})
    responder.piece("content", "one")
    responder.queued(position=0, reason="engine_restarting", again=True)
    responder.progress(processed=1, total=2, cached=0)
    assert outbox.kinds() == ["queued", "queued", "start", "queued", "start", "chunk"]


# --- the pace ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_text_that_came_too_soon_goes_out_after_its_pause_by_one_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, outbox, wake = Clock(monkeypatch), Shares(), Wakes()
    responder = _started(outbox, wake=wake, coalesce_min_s=0.5)
    responder.text("content", "one ")
    outbox.unacknowledged.pop()(True)
    clock.now += 0.2
    responder.text("content", "two ")
    responder.text("content", "three ")
    assert outbox.chunks() == ["one "]
    ((seconds, call, timer),) = wake.calls
    assert 0.3 <= seconds <= 0.302, "just after the pause, since a reader may come back before"
    clock.now += 0.301
    call()
    assert outbox.chunks() == ["one ", "two three "]
    assert timer is not None
    outbox.unacknowledged.pop()(True)
    clock.now += 0.1
    responder.text("content", "four")
    assert len(wake.calls) == 2, "a new one"


def test_an_alarm_is_taken_back_when_its_text_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, outbox, wake = Clock(monkeypatch), Shares(), Wakes()
    responder = _started(outbox, wake=wake, coalesce_min_s=0.5)
    responder.text("content", "one ")
    outbox.unacknowledged.pop()(True)
    responder.text("content", "two ")
    clock.now += 0.6
    responder.text("content", "three")
    ((_, _, timer),) = wake.calls
    assert timer is not None
    assert timer.call is None
    assert outbox.chunks() == ["one ", "two three"]
    outbox.unacknowledged.pop()(True)
    responder.text("content", "four")
    assert len(wake.calls) == 2


def test_text_whose_pause_grew_meanwhile_gets_another_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, outbox, wake = Clock(monkeypatch), Shares(), Wakes()
    streams = 1
    responder = _started(outbox, wake=wake, coalesce_min_s=0.5, active_streams=lambda: streams)
    responder.settle()
    responder.text("content", "one ")
    responder.settle()
    outbox.unacknowledged.pop()(True)
    responder.text("content", "two")
    responder.settle()
    streams = 8
    responder.settle()
    assert len(wake.calls) == 1
    clock.now += 0.501
    wake.calls[0][1]()
    assert outbox.chunks() == ["one "]
    assert len(wake.calls) == 2
    clock.now += wake.calls[1][0]
    wake.calls[1][1]()
    assert outbox.chunks() == ["one ", "two"]


def test_a_reader_rests_until_its_text_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, outbox = Clock(monkeypatch), Shares()
    responder = _started(outbox, coalesce_min_s=0.015)
    assert responder.settle() == 0.0
    responder.text("content", "one ")
    assert responder.settle() == 0.0
    responder.text("content", "two ")
    assert responder.settle() == 0.001, "the broker has not acknowledged"
    clock.now += 5.0
    assert responder.settle() == KEEP_UP_S, "nor does it look as if it would"
    outbox.unacknowledged.pop()(True)
    clock.now -= 4.995
    assert responder.settle() == pytest.approx(0.01)
    clock.now += 0.01
    assert responder.settle(pieces=2) == 0.015
    assert outbox.chunks() == ["one ", "two "]


def test_an_acknowledgement_wakes_nobody_where_nothing_waits() -> None:
    outbox, wake = Shares(), Wakes()
    responder = _started(outbox, wake=wake)
    responder.text("content", "one ")
    outbox.unacknowledged.pop()(True)
    assert wake.calls == []
    responder.text("content", "two ")
    responder.text("content", "three")
    outbox.unacknowledged.pop()(True)
    assert [seconds for seconds, *_ in wake.calls] == [0.0]


def test_a_chunk_is_no_longer_than_the_settings_say() -> None:
    outbox = Shares()
    responder = _started(outbox, coalesce_max_chars=5)
    responder.piece("content", "123456789012")
    responder.piece("content", "12345")
    assert outbox.chunks() == ["12345", "67890", "12", "12345"]


def test_a_long_text_keeps_to_a_limit_that_has_shrunk_and_a_short_one_fits_any() -> None:
    outbox, limit = Shares(), [4096]
    asked: list[None] = []

    def max_event_bytes() -> int:
        asked.append(None)
        return limit[0]

    responder = _started(outbox, max_event_bytes=max_event_bytes)
    limit[0] = 1024
    asked.clear()
    responder.piece("content", "x" * 100)
    assert asked == [], "not asked for each token"
    responder.piece("content", "x")
    responder.piece("content", "x" * 101)
    assert len(asked) == 1
    responder.piece("content", "y" * 3000)
    assert max(len(json.dumps(event)) for event in outbox.events) <= 1100
    assert "".join(outbox.chunks()) == "x" * 202 + "y" * 3000
    limit[0] = 900
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "z" * 2000}])
    calls = [event["tool_calls"] for event in outbox.events if "tool_calls" in event]
    assert "".join(call[0]["arguments"] for call in calls) == "z" * 2000
    assert max(len(encode(event)) for event in outbox.events if "tool_calls" in event) <= 900 + len(_TOPIC)


def test_the_end_of_the_text_brings_what_was_not_told_yet() -> None:
    outbox = Shares()
    responder = _started(outbox)
    responder.piece("reasoning", "hm ")
    responder.piece("content", "one ")
    told = responder.close_text(content="one two", reasoning="hm hm", catch_up=True)
    assert outbox.chunks() == ["hm ", "one ", "hm", "two"]
    assert (told.content, told.reasoning, told.calls) == ("one two", "hm hm", False)
    responder.piece("content", "late")
    assert outbox.chunks()[-1] == "two"


def test_an_answer_that_is_cut_short_ends_with_what_was_told() -> None:
    outbox = Shares()
    responder = _started(outbox)
    responder.piece("content", "one ")
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "{}"}])
    told = responder.close_text(content="one two", reasoning="hm hm", catch_up=False)
    assert (told.content, told.reasoning, told.calls) == ("one ", "", True)


def _silent(outbox: Shares, **more: Any) -> Responder:
    return Responder(
        outbox=outbox,
        topic="llm/reply/demo",
        writer=EventWriter(request_id="r1", session_id="demo", max_bytes=1024),
        correlation=None,
        silent=True,
        wake=Wakes(),
        **more,
    )


@pytest.mark.parametrize("how", ["silent", "withheld", "streamed"])
@pytest.mark.parametrize("end", ["done", "error"])
def test_an_end_holds_the_whole_text_where_no_chunk_told_it(how: str, end: str) -> None:
    outbox = Shares()
    responder = _silent(outbox) if how == "silent" else _responder(outbox, max_bytes=1024)
    responder.start({"worker": "w", "created": 1})
    if how == "withheld":
        responder.withhold_text()
    text = "x" * 3000
    if end == "done":
        event = json.loads(responder.done({"full_content": text, "finish_reason": "stop"}))
    else:
        details = {"partial_content": text}
        event = json.loads(responder.error(code="timeout", message="late", retryable=False, details=details))
    assert ("content_omitted" in event) is (how == "streamed")
    assert (text in event.values()) is (how != "streamed")


def test_tool_calls_that_were_told_stay_told_when_text_after_them_finds_no_place() -> None:
    outbox = Shares()
    responder = _started(outbox)
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "{}"}])
    outbox.full = {"event"}
    responder.piece("content", "lost")
    assert responder.overflowed
    told = responder.close_text(content="lost", reasoning="", catch_up=True)
    assert (told.content, told.calls) == ("", True)


def test_tool_calls_that_found_no_place_are_not_told() -> None:
    outbox = Shares()
    responder = _started(outbox)
    responder.piece("content", "one")
    outbox.full = {"event"}
    responder.tool_calls([{"index": 0, "id": "c", "name": "f", "arguments": "{}"}])
    told = responder.close_text(content="one", reasoning="", catch_up=True)
    assert (told.content, told.calls) == ("one", False)


def test_a_start_and_a_snapshot_keep_to_a_limit_that_has_shrunk() -> None:
    outbox, limit = Shares(), 4096
    responder = _responder(outbox, max_event_bytes=lambda: limit)
    limit = 1024
    responder.start({"worker": "w", "created": 1, "metadata": {"note": "m" * 2000}})
    limit = 4096
    responder.piece("content", "x" * 3000)
    limit = 1024
    assert responder.snapshot()
    start, chunk, *again = outbox.events
    assert (start["type"], "metadata" in start) == ("start", False)
    assert again == [chunk], "too large for one event, so told as it was"
