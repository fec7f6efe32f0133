"""Routes with a format: whatever happens to a request, its client hears of it in that format, and once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.loading import ConfigurationError, load
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text
from llamacpp_mqtt_deploy.core.formats.route_rendering import RouteRendering
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Published
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.responder import Responder
from llamacpp_mqtt_deploy.worker.route_renderings import RenderedOutbox
from tests.support.answer_events import occasion
from tests.support.lone_job import Taker
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker

FIELDS = {"prompt": "message", "session_id": "sessionId", "request_id": "requestId"}


def chat(name: str, **more: Any) -> dict[str, Any]:
    route = {
        "request": "chat/in",
        "reply": "chat/out/{session}/{request_id}",
        "trust_payload_session": True,
        "fields": FIELDS,
        "format": name,
    } | more
    return {f"routes__chat__{key}": value for key, value in route.items()}


def say(bus: Bus, message: Any, request_id: str = "r1", session: str = "s1", **more: Any) -> None:
    body = {"sessionId": session, "requestId": request_id, "message": message} | more
    bus.sender.publish("chat/in", json.dumps(body).encode())


def told(bus: Bus, topic: str = "chat/out/s1/r1") -> list[bytes]:
    """What was published there so far."""
    while bus.listener.pull(0.0) is not None:
        pass
    return [each.payload for each in bus.listener.deliveries if each.topic == topic]


def wait_for(bus: Bus, count: int, topic: str = "chat/out/s1/r1") -> list[bytes]:
    eventually(lambda: len(told(bus, topic)) >= count)
    return told(bus, topic)


def end_of_all(bus: Bus, worker: WholeWorker) -> None:
    """Nothing is under way any more: whatever was to be said was said."""
    eventually(lambda: len(worker.daemon.parts.registry) == 0)
    say(bus, "the last one", "last", "last")
    wait_for(bus, 1, "chat/out/last/last")


# --- text --------------------------------------------------------------------------------------------------------------


def test_a_text_route_answers_with_the_whole_text_once(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("hm"), "It ", "is ", "noon.")
    worker = bus.worker(engine, **chat("text"))
    say(bus, "What time is it?", stream=True, full_content=False)
    wait_for(bus, 1)
    end_of_all(bus, worker)
    assert told(bus) == [b"It is noon."]


def test_an_empty_answer_is_an_empty_text_that_no_broker_keeps(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("hm"))
    worker = bus.worker(engine, **chat("text"))
    say(bus, "Say nothing")
    wait_for(bus, 1)
    end_of_all(bus, worker)
    answers = [each for each in bus.listener.deliveries if each.topic == "chat/out/s1/r1"]
    assert [(each.payload, each.retain) for each in answers] == [(b"", False)]
    late = bus.broker.client()
    late.subscribe("chat/#", "llm/#")
    eventually(lambda: late.waiting() != [])  # the status, which the broker keeps
    assert not [kept for kept in late.waiting() if kept.topic.startswith("chat/")]


def test_every_refusal_is_a_sentence(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play(gate, "done")
    bus.worker(engine, **chat("text"), limits__queue_size=1, limits__session_queue=1, limits__max_request_bytes=512)
    say(bus, "runs", "r1")
    assert gate.reached.wait(10)
    say(bus, "waits", "r2")
    say(bus, "one too many of this session", "r3")
    say(bus, "one too many of all", "r4", "s2")
    say(bus, 7, "r5")
    say(bus, "x" * 600, "r6")
    say(bus, "other words under a known id", "r1")
    refusals = {name: wait_for(bus, 1, f"chat/out/{place}")[0].decode() for name, place in REFUSED.items()}
    assert told(bus) == [refusals["duplicate"].encode()]
    for refusal in refusals.values():
        assert not refusal.startswith("{")
        assert " " in refusal
    assert "message: expected a text" in refusals["bad"]
    assert "600" in refusals["large"] or "bytes" in refusals["large"]
    gate.open()
    assert wait_for(bus, 2)[1] == b"done"
    assert wait_for(bus, 1, "chat/out/s1/r2") == [b"waits"]


REFUSED = {
    "session_busy": "s1/r3",
    "busy": "s2/r4",
    "bad": "s1/r5",
    "large": "s1/r6",
    "duplicate": "s1/r1",
}


def test_a_rate_limit_is_told_in_a_sentence(bus: Bus) -> None:
    bus.worker(**chat("text"), limits__max_requests_per_minute=1)
    say(bus, "first", "r1")
    wait_for(bus, 1)
    say(bus, "second", "r2")
    [refusal] = wait_for(bus, 1, "chat/out/s1/r2")
    assert refusal
    assert not refusal.startswith(b"{")


def test_a_text_that_is_asked_for_again_comes_again_from_the_journal(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine, **chat("text"))
    say(bus, "echo this")
    wait_for(bus, 1)
    say(bus, "echo this")
    assert wait_for(bus, 2) == [b"echo this", b"echo this"]
    end_of_all(bus, worker)
    assert len(engine.calls) == 2  # this one, and the last one


def test_a_text_that_runs_is_not_told_twice_to_a_client_that_asks_again(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("half ", gate, "whole")
    worker = bus.worker(engine, **chat("text"))
    say(bus, "go")
    assert gate.reached.wait(10)
    say(bus, "go")
    bus.ask("round trip", request_id="x1")
    bus.listener.until(request_id="x1")
    assert told(bus) == []
    gate.open()
    wait_for(bus, 1)
    end_of_all(bus, worker)
    assert told(bus) == [b"half whole"]


def test_a_text_that_is_too_long_for_a_message_is_cut_and_says_so(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play("\u20ac" * 1000)
    worker = bus.worker(engine, **chat("text"), limits__max_event_bytes=1024)
    say(bus, "go")
    [text] = wait_for(bus, 1)
    assert 1000 < len(text) <= 1024
    words, _, mark = text.decode().partition("\n")
    assert set(words) == {"\u20ac"}
    assert "cut: the answer has 3000 bytes" in mark
    eventually(lambda: worker.daemon.parts.store.undelivered() == [])


def test_an_object_with_the_whole_answer_has_the_names_of_its_clients(bus: Bus) -> None:
    names = {"content": "response", "request_id": "requestId", "session_id": "sessionId"}
    worker = bus.worker(**chat("json", answer_fields=names))
    say(bus, "echo this")
    wait_for(bus, 1)
    say(bus, 7, "r2")
    [refusal] = wait_for(bus, 1, "chat/out/s1/r2")
    end_of_all(bus, worker)
    assert [json.loads(part) for part in told(bus)] == [{"response": "echo this", "requestId": "r1", "sessionId": "s1"}]
    assert json.loads(refusal) == {
        "error": "message: expected a text that is not empty",
        "requestId": "r2",
        "sessionId": "s1",
    }


# --- objects -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("tokens", [{"token": "a"}, {"token": "b"}, {"token": "", "type": "complete"}]),
        ("text-chunks", ["a", "b"]),
        (
            "content",
            [
                {"content": "a", "session_id": "s1"},
                {"content": "b", "session_id": "s1"},
                {"done": True, "session_id": "s1"},
            ],
        ),
        ("typed-chunks", [{"chunk": "a", "type": "content"}, {"chunk": "b", "type": "content"}, {"type": "done"}]),
    ],
)
def test_a_format_that_streams_is_told_as_it_is_generated(bus: Bus, name: str, wanted: list[Any]) -> None:
    engine, first, second = ScriptedEngine(), Gate(), Gate()
    engine.play(Text("a"), first, Reasoning("hm"), Text("b"), second)
    worker = bus.worker(engine, **chat(name))
    say(bus, "go")
    assert len(wait_for(bus, 1)) == 1
    say(bus, "go")  # sent again: nothing is told twice
    first.open()
    assert len(wait_for(bus, 2)) == 2
    second.open()
    wait_for(bus, len(wanted))
    end_of_all(bus, worker)
    found = told(bus)
    assert [part.decode() if name.startswith("text") else json.loads(part) for part in found] == wanted
    eventually(lambda: worker.daemon.parts.store.undelivered() == [])


def test_a_cancelled_stream_does_not_look_whole(bus: Bus) -> None:
    route = chat(
        "tokens", request="chat/in/{session}", reply="chat/out/{session}", control="chat/control/{session}"
    ) | {"routes__chat__trust_payload_session": False}
    engine, gate = ScriptedEngine(), Gate()
    engine.play(Text("half"), gate)
    bus.worker(engine, **route)
    bus.sender.publish("chat/in/s1", b"go")
    wait_for(bus, 1, "chat/out/s1")
    bus.sender.publish("chat/control/s1", b"cancel")
    first, last = map(json.loads, wait_for(bus, 2, "chat/out/s1"))
    assert first == {"token": "half"}
    assert (last["type"], last["token"]) == ("error", "")
    # The ack of the cancel is an event of the protocol, of which this client knows nothing.
    bus.sender.publish("chat/control/s1", b"reset")
    bus.sender.publish("chat/control/s1", b"what?")
    bus.sender.publish("chat/in/s1", b"after")
    assert wait_for(bus, 4, "chat/out/s1")[2:] == [b'{"token":"after"}', b'{"token":"","type":"complete"}']


# --- after a restart ---------------------------------------------------------------------------------------------------


def _left(bus: Bus, *, streaming: bool = False, terminal: dict[str, Any] | None = None) -> None:
    key = EntryKey("chat", "s1", "r1")
    store = SqliteStore(bus.state / "state.db")
    store.open()
    payload = b'{"sessionId":"s1","requestId":"r1","message":"left behind"}'
    topic = "chat/out/s1/r1"
    store.accept([Entry(key=key, topic="chat/in", payload=payload, digest="d", reply_topic=topic)])
    if streaming:
        store.mark_streaming(key)
    if terminal is not None:
        store.finish(key, json.dumps(terminal).encode(), now=1.0)
    store.close()


@pytest.mark.parametrize(
    "name", ["text", "text-chunks", "tokens", "content", "chatbot", "typed-chunks", "typed-events"]
)
def test_a_request_that_died_with_the_worker_is_told_so_in_its_format(bus: Bus, name: str) -> None:
    _left(bus, streaming=True)
    worker = bus.worker(**chat(name))
    [sentence] = wait_for(bus, 1)
    assert b"died in the middle" in sentence
    assert sentence.startswith(b"{") == (not name.startswith("text"))
    assert b"request_id" not in sentence
    end_of_all(bus, worker)
    assert len(told(bus)) == 1


def test_an_end_that_no_broker_had_taken_is_told_in_its_format(bus: Bus) -> None:
    ids = {"request_id": "r1", "session_id": "s1", "seq": 0, "final": True}
    _left(bus, terminal={"type": "done", "full_content": "told late", "finish_reason": "stop"} | ids)
    worker = bus.worker(**chat("text"))
    assert wait_for(bus, 1) == [b"told late"]
    eventually(lambda: worker.daemon.parts.store.undelivered() == [])


def test_a_text_that_was_not_told_when_the_worker_died_is_generated_again(bus: Bus) -> None:
    _left(bus)
    bus.worker(**chat("text"))
    assert wait_for(bus, 1) == [b"left behind"]


# --- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [("format", "text"), ("prompt_template", "{x}"), ("empty_payload", "reset"), ("empty_payload", "error")],
)
def test_the_default_route_speaks_the_protocol(key: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match="clients of the protocol"):
        load(None, {f"routes.default.{key}": value}, environ={})
    other = load(None, {f"routes.other.{key}": value}, environ={}).settings.routes["other"]
    assert getattr(other, key) == value


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"answer_fields": '{"content": "response"}'}, "has no meaning"),
        ({"answer_fields": '{"text": "response"}', "format": "json"}, "expected names for content"),
        ({"answer_fields": '{"content": "error"}', "format": "json"}, "a name of its own"),
        ({"answer_fields": '{"content": ""}', "format": "json"}, "a name of its own"),
    ],
)
def test_names_of_an_answer_that_cannot_be_told_are_refused_at_start(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load(None, {f"routes.chat.{key}": value for key, value in settings.items()}, environ={})


class Stopping(Taker):
    """Takes so many messages, then none."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self.parts: list[tuple[bytes, str]] = []

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        on_done: Callable[[bool], None] | None = None,
        content_type: str = "",
        **_: Any,
    ) -> Published:
        if len(self.parts) == self.places:
            return "full"
        self.parts.append((payload, content_type))
        if on_done is not None:
            self.unacknowledged.append(on_done)
        return "queued"

    def acknowledge(self, delivery: Delivery) -> None:
        raise NotImplementedError


START = b'{"type":"start","request_id":"r1","session_id":"s1"}'
CHUNK = b'{"type":"chunk","request_id":"r1","session_id":"s1","seq":0,"content":"a"}'


def rendered(outbox: Stopping, name: str) -> RenderedOutbox:
    return RenderedOutbox(outbox, RouteRendering(name, occasion()))


def test_the_last_message_of_an_event_carries_its_acknowledgement() -> None:
    outbox, done = Stopping(9), list[bool]()
    assert rendered(outbox, "typed-events").publish("t", CHUNK, on_done=done.append) == "queued"
    assert [json.loads(part)["type"] for part, _ in outbox.parts] == ["message_start", "content_block_delta"]
    assert (len(outbox.unacknowledged), done) == (1, [])
    outbox.unacknowledged[0](True)
    assert done == [True]


def test_an_event_that_has_nothing_to_say_is_acknowledged_at_once() -> None:
    outbox, done = Stopping(9), list[bool]()
    assert rendered(outbox, "tokens").publish("t", START, on_done=done.append) == "queued"
    assert (outbox.parts, done) == ([], [True])


def test_what_found_no_place_of_an_end_goes_out_later_in_order_and_once() -> None:
    key = EntryKey("chat", "s1", "r1")
    store = SqliteStore(None)
    store.open()
    store.accept([Entry(key=key, topic="t", payload=b"{}", digest="d", reply_topic="chat/out/s1")])
    end = {"type": "done", "request_id": "r1", "session_id": "s1", "seq": 0, "final": True, "full_content": "whole"}
    terminal = json.dumps(end).encode()
    store.finish(key, terminal, now=1.0)
    outbox = Stopping(1)
    redelivery = Redelivery(
        outbox=outbox,
        store=store,
        max_event_bytes=lambda: 4096,
        new_rendering=lambda _key: RouteRendering("typed-events", occasion()),
    )
    redelivery.send(key, "chat/out/s1", terminal, None)
    redelivery.sweep()
    assert [json.loads(part)["type"] for part, _ in outbox.parts] == ["message_start"]
    assert [entry.key for entry in store.undelivered()] == [key]
    outbox.places = 9
    redelivery.sweep()
    redelivery.sweep()
    assert [json.loads(part)["type"] for part, _ in outbox.parts] == [
        "message_start",
        "content_block_delta",
        "message_stop",
    ]
    [done] = outbox.unacknowledged
    done(True)
    redelivery.sweep()
    assert store.undelivered() == []
    store.close()


def test_what_a_client_has_heard_already_is_not_told_again_to_one_that_asks_again() -> None:
    outbox, done = Stopping(9), list[bool]()
    rendering = rendered(outbox, "tokens")
    rendering.publish("t", CHUNK)
    assert rendering.publish("t", CHUNK, on_done=done.append, share="answer") == "queued"
    rendering.publish("t", CHUNK.replace(b'"seq":0', b'"seq":1').replace(b'"a"', b'"b"'))
    assert [json.loads(part)["token"] for part, _ in outbox.parts] == ["a", "b"]
    assert done == [True]


def test_a_full_outbox_is_said_to_whoever_publishes() -> None:
    for places in (0, 1):
        done = list[bool]()
        assert rendered(Stopping(places), "typed-events").publish("t", CHUNK, on_done=done.append) == "full"
        assert done == []


def test_messages_say_what_they_are() -> None:
    for name, content_type in (("text-chunks", "text/plain; charset=utf-8"), ("tokens", "application/json")):
        outbox = Stopping(9)
        rendered(outbox, name).publish("t", CHUNK)
        assert [kind for _, kind in outbox.parts] == [content_type]


def test_a_route_of_events_has_the_outbox_to_itself(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of the protocol's own route passes through a renderer."""
    made: list[tuple[str, object]] = []
    make = Responder.__init__

    def noted(responder: Responder, **given: Any) -> None:
        made.append((given["topic"], given["outbox"]))
        make(responder, **given)

    monkeypatch.setattr(Responder, "__init__", noted)
    worker = bus.worker(**chat("tokens"))
    bus.ask("hello", request_id="r1")
    bus.listener.terminal("r1")
    say(bus, "hello", "r2")
    wait_for(bus, 2, "chat/out/s1/r2")
    assert made[0] == ("llm/reply/demo", worker.daemon.parts.link)
    assert isinstance(made[1][1], RenderedOutbox)
