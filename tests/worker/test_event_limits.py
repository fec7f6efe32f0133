"""Ends fit what the broker takes at the moment when they are sent, and no text is lost on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import Reasoning
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus
from tests.worker.test_redelivery import Outbox

LONG = "word " * 1500
KEY = EntryKey("default", "demo", "r1")


def _sizes(bus: Bus) -> int:
    return max(len(delivery.payload) for delivery in bus.listener.deliveries if "/reply/" in delivery.topic)


@pytest.mark.parametrize("how", ["stream: false", "mode off"])
def test_an_answer_without_a_stream_that_does_not_fit_goes_out_in_chunks_before_its_end(bus: Bus, how: str) -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("hm " * 1000), LONG)
    bus.worker(engine, limits__max_event_bytes=2048, streaming__mode="off" if how == "mode off" else "native")
    bus.ask("hi", request_id="r1", stream=how == "mode off")
    done = bus.listener.terminal("r1")
    assert (done["content_omitted"], "full_content" in done) == (True, False)
    reader = bus.listener.read("r1")
    assert (reader.content, reader.reasoning, reader.hole) == (LONG, "hm " * 1000, False)
    assert {event["type"] for event in bus.listener.of("r1")} == {"chunk", "done"}
    assert _sizes(bus) <= 2048
    first = [delivery.payload for delivery in bus.listener.deliveries if "/reply/" in delivery.topic]
    bus.listener.deliveries.clear()
    bus.listener.events.clear()
    bus.ask("hi", request_id="r1", stream=how == "mode off")
    bus.listener.terminal("r1")
    again = [delivery.payload for delivery in bus.listener.deliveries if "/reply/" in delivery.topic]
    assert again == first, "a client that lost a part of it can take the rest from the repetition"


def test_without_full_content_there_are_no_chunks_either(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(LONG)
    bus.worker(engine, limits__max_event_bytes=2048)
    bus.ask("hi", request_id="r1", stream=False, full_content=False)
    assert bus.listener.terminal("r1")["seq"] == 0
    assert [event["type"] for event in bus.listener.of("r1")] == ["done"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_limit_that_shrinks_while_a_request_runs_costs_no_end(bus: Bus, stream: bool) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("one ", gate, LONG)
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1", stream=stream)
    assert gate.reached.wait(10)
    eventually(lambda: worker.daemon.parts.link.info().unacknowledged == 0)  # or it would be published again
    bus.broker.max_payload_bytes = 2048
    bus.broker.drop_connection(worker.client_id)
    # The old state is told until the loss is noticed.
    eventually(lambda: worker.daemon.parts.link.info().reconnects == 1)
    eventually(lambda: worker.daemon.parts.link.info().state == "online")
    gate.open()
    assert bus.listener.terminal("r1")["content_omitted"] is True
    assert bus.listener.read("r1").content == "one " + LONG
    assert _sizes(bus) <= 2048


def test_what_was_stored_under_a_larger_limit_fits_the_broker_of_the_next_life(bus: Bus) -> None:
    store = SqliteStore(bus.state / "state.db")
    store.open()
    store.accept([Entry(key=KEY, topic="llm/request/demo", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
    store.finish(KEY, _done(seq=0), now=1.0)
    store.close()
    bus.broker.max_payload_bytes = 2048
    bus.worker()
    bus.listener.terminal("r1")
    assert bus.listener.read("r1").content == LONG


def _done(*, seq: int) -> bytes:
    event: dict[str, Any] = {"type": "done", "request_id": "r1", "session_id": "demo", "seq": seq, "final": True}
    event |= {"full_content": LONG, "message": {"role": "assistant", "content": LONG}, "finish_reason": "stop"}
    event |= {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cached_tokens": 0}}
    return json.dumps(event | {"timings": {"queue_ms": 1.0, "total_ms": 1.0}, "dropped_messages": 0}).encode()


class _Shrinking(Outbox):
    """An outbox whose connection has a limit."""

    limit = 100_000

    def publish(self, topic: str, payload: bytes, **more: Any) -> Any:
        self.says = "unfit" if len(payload) > self.limit else "queued"
        return super().publish(topic, payload, **more)


def _redelivery() -> tuple[_Shrinking, SqliteStore, Redelivery]:
    outbox, store = _Shrinking(), SqliteStore(None)
    store.open()
    store.accept([Entry(key=KEY, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
    return outbox, store, Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: outbox.limit)


def test_an_end_that_the_link_gave_up_as_too_large_is_sent_again_smaller() -> None:
    outbox, store, redelivery = _redelivery()
    store.finish(KEY, _done(seq=7), now=1.0)
    redelivery.send(KEY, "llm/reply/demo", _done(seq=7), None)
    outbox.limit = 2048  # connected again, and the limit is another one: the link gives up what is larger
    outbox.give_up_all()
    redelivery.sweep()
    assert [entry.key for entry in store.undelivered()] == [KEY], "nobody has it yet"
    smaller = json.loads(outbox.sent[-1])
    assert (smaller["seq"], smaller["content_omitted"], smaller["finish_reason"]) == (7, True, "stop")
    outbox.acknowledge_all()
    redelivery.sweep()
    assert store.undelivered() == []


def test_an_end_that_is_refused_for_another_reason_than_its_size_is_given_up() -> None:
    outbox, store, redelivery = _redelivery()
    store.finish(KEY, _done(seq=7), now=1.0)
    redelivery.send(KEY, "llm/reply/demo", _done(seq=7), None)
    outbox.give_up_all()
    redelivery.sweep()
    assert len(outbox.sent) == 1
    assert store.undelivered() == []


def test_chunks_that_find_no_place_go_on_where_they_stopped() -> None:
    outbox, _, redelivery = _redelivery()
    outbox.limit = 1024
    publish, places = outbox.publish, [3]

    def full(*args: Any, **more: Any) -> Any:
        places[0] -= 1
        return publish(*args, **more) if places[0] >= 0 else "full"

    outbox.publish = full  # type: ignore[method-assign]
    redelivery.send(KEY, "llm/reply/demo", _done(seq=0), None)
    assert len(outbox.sent) == 3
    places[0] = 100
    redelivery.sweep()
    told = [json.loads(payload) for payload in outbox.sent]
    assert [event["seq"] for event in told] == list(range(len(told)))
    assert "".join(event.get("content", "") for event in told) == LONG
    assert told[-1]["final"] is True
