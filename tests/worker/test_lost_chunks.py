"""Text that does not fit into one event is not out of reach for a client that lost a part of it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.chunk_record import omits_text, packed, unpacked, written
from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.events import EventReader, EventWriter, encode
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores import schema
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus
from tests.worker.test_redelivery import Outbox

LONG = "wörd \U0001f600 " * 300
KEY = EntryKey("default", "demo", "r1")


def _replies(bus: Bus) -> list[bytes]:
    bus.listener.of("r1")
    return [delivery.payload for delivery in bus.listener.deliveries if "/reply/" in delivery.topic]


def _chunks_and_end(bus: Bus) -> list[bytes]:
    return [payload for payload in _replies(bus) if json.loads(payload)["type"] in ("chunk", "done", "error")]


def _forget_all(bus: Bus) -> None:
    bus.listener.deliveries.clear()
    bus.listener.events.clear()


def _read(payloads: list[bytes]) -> EventReader:
    reader = EventReader("r1")
    for payload in payloads:
        reader.feed(json.loads(payload))
    return reader


def _play(engine: ScriptedEngine, *more: Any) -> None:
    call = ToolCall(0, "c0", "look", json.dumps({"where": "here " * 300}))
    engine.play(Reasoning("hm " * 500), LONG, "the end", *more, call, Finished("tool_calls", TokenUsage(1, 2)))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("full_content", [True, False])
def test_an_ended_answer_sent_again_brings_its_chunks_as_they_were(
    bus: Bus, full_content: bool, restarted: bool
) -> None:
    engine = ScriptedEngine()
    _play(engine)
    worker = bus.worker(engine, limits__max_event_bytes=1024)
    bus.ask("hi", request_id="r1", full_content=full_content)
    assert bus.listener.terminal("r1")["content_omitted"] is True
    told = _chunks_and_end(bus)
    assert len(told) > 5
    if restarted:
        eventually(lambda: not worker.daemon.parts.store.undelivered())
        worker.stop()
    _forget_all(bus)
    if restarted:
        bus.worker(ScriptedEngine(), limits__max_event_bytes=1024)
    bus.ask("hi", request_id="r1", full_content=full_content)
    bus.listener.terminal("r1")
    assert _replies(bus) == told
    reader = _read(told[: len(told) // 2] + told[len(told) // 2 + 2 :] + told)
    assert (reader.content, reader.reasoning, reader.hole) == (LONG + "the end", "hm " * 500, False)
    assert json.loads(reader.tool_calls[0]["function"]["arguments"]) == {"where": "here " * 300}


def test_a_running_answer_sent_again_brings_its_chunks_instead_of_a_snapshot_without_text(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    _play(engine, gate)
    bus.worker(engine, limits__max_event_bytes=1024)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    eventually(lambda: _read(_chunks_and_end(bus)).content == LONG + "the end")
    told = _chunks_and_end(bus)
    _forget_all(bus)
    bus.ask("hi", request_id="r1")
    eventually(lambda: _read(_chunks_and_end(bus)).content == LONG + "the end")
    assert _replies(bus) == told
    gate.open()
    bus.listener.terminal("r1")
    assert _read(_chunks_and_end(bus)).content == LONG + "the end"


def test_an_answer_that_fits_into_a_snapshot_comes_as_one(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("short", gate)
    bus.worker(engine)
    bus.ask("hi", request_id="r1")
    bus.listener.until(type="chunk")
    bus.ask("hi", request_id="r1")
    assert bus.listener.until(type="snapshot")["content"] == "short"
    gate.open()


def test_an_error_in_the_middle_of_a_long_answer_keeps_what_was_told(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play(LONG, gate)
    bus.worker(engine, limits__max_event_bytes=1024)
    bus.ask("hi", request_id="r1", timeout_s=1.5)
    assert bus.listener.terminal("r1")["code"] == "timeout"
    told = _chunks_and_end(bus)
    _forget_all(bus)
    bus.ask("hi", request_id="r1", timeout_s=1.5)
    bus.listener.terminal("r1")
    assert _replies(bus) == told
    assert _read(told).content == LONG


@pytest.mark.parametrize("full_content", [True, False])
def test_an_end_that_nobody_took_before_the_crash_comes_with_its_chunks(bus: Bus, full_content: bool) -> None:
    """Who kills the worker at the end takes the last chunks with it: they are in the journal."""
    store = _store(bus.state / "state.db")
    writer = EventWriter(request_id="r1", session_id="demo", max_bytes=1024)
    text = LONG if full_content else "two words"
    chunks = writer.chunks("content", text)
    record = packed([("content", json.loads(chunk)["content"]) for chunk in chunks])
    store.finish(KEY, _done(writer), now=1.0, chunks=record)
    store.close()
    bus.worker(limits__max_event_bytes=1024)
    bus.listener.terminal("r1")
    assert _chunks_and_end(bus)[:-1] == chunks
    assert bus.listener.read("r1").content == text


def test_a_short_answer_leaves_no_chunks_in_the_journal(bus: Bus) -> None:
    worker = bus.worker()
    bus.ask("short", request_id="r1")
    bus.listener.terminal("r1")
    assert worker.daemon.parts.store.chunks(KEY) is None


def _done(writer: EventWriter) -> bytes:
    fields: dict[str, Any] = {"content_omitted": True, "finish_reason": "stop", "dropped_messages": 0}
    fields |= {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "cached_tokens": 0}}
    return writer.done(fields | {"timings": {"queue_ms": 1.0, "total_ms": 1.0}})


def _store(path: Path | None) -> SqliteStore:
    store = SqliteStore(path)
    store.open()
    entry = Entry(key=KEY, topic="llm/request/demo", payload=b"{}", digest="d", reply_topic="llm/reply/demo")
    store.accept([entry])
    return store


# --- on the way ------------------------------------------------------------------------------------------------------


class _Shares(Outbox):
    """Remembers whose part of the outbox was taken; gives so many places to answers."""

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.answers = answers
        self.shares: list[str] = []

    def publish(self, topic: str, payload: bytes, *, share: str = "event", **more: Any) -> Any:
        if share == "answer":
            if self.answers == 0:
                return "full"
            self.answers -= 1
        self.shares.append(share)
        return super().publish(topic, payload, **more)


def _ended(parts: int) -> tuple[SqliteStore, list[bytes], bytes]:
    store = _store(None)
    writer = EventWriter(request_id="r1", session_id="demo", max_bytes=1024)
    chunks = [chunk for number in range(parts) for chunk in writer.chunks("content", f"{number} ")]
    terminal = _done(writer)
    store.finish(KEY, terminal, now=1.0, chunks=packed([("content", f"{number} ") for number in range(parts)]))
    return store, chunks, terminal


def test_repeated_chunks_take_no_place_of_what_others_hear_for_the_first_time() -> None:
    store, chunks, terminal = _ended(5)
    outbox = _Shares(answers=2)
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 1024)
    redelivery.send(KEY, "llm/reply/demo", terminal, None, again=True)
    assert outbox.sent == chunks[:2], "the rest waits"
    redelivery.send(KEY, "llm/reply/demo", terminal, None, again=True)
    assert outbox.sent == chunks[:2], "asked for twice, it waits once"
    outbox.answers = 100
    redelivery.sweep()
    assert outbox.sent == [*chunks, terminal]
    assert outbox.shares == ["answer"] * 5 + ["event"]


def test_a_broker_that_takes_the_old_chunks_no_more_gets_the_end() -> None:
    store, _, terminal = _ended(1)
    outbox = Outbox()
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 50)
    publish = outbox.publish

    def small(topic: str, payload: bytes, **more: Any) -> Any:
        return "unfit" if b'"chunk"' in payload else publish(topic, payload, **more)

    outbox.publish = small  # type: ignore[method-assign]
    redelivery.send(KEY, "llm/reply/demo", terminal, None, again=True)
    assert [json.loads(payload)["type"] for payload in outbox.sent] == ["done"]


def test_ends_that_wait_for_the_outbox_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.redelivery._MAX_WAITING_BYTES", 5000)
    store = SqliteStore(None)
    store.open()
    outbox = Outbox()
    outbox.says = "full"
    redelivery = Redelivery(outbox=outbox, store=store, max_event_bytes=lambda: 100_000)
    ends: list[bytes] = []
    for number in range(20):
        key = EntryKey("default", "demo", f"r{number}")
        store.accept([Entry(key=key, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
        ends.append(encode({"type": "done", "request_id": key.request_id, "full_content": "x" * 1000}))
        store.finish(key, ends[-1], now=1.0)
        redelivery.send(key, "llm/reply/demo", ends[-1], None)
    assert sum(waiting.size() for waiting in redelivery._waiting.values()) <= 5000
    outbox.says = "queued"
    redelivery.sweep()
    assert outbox.sent == ends


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_record_gives_the_bytes_that_were_published() -> None:
    writer = EventWriter(request_id="r1", session_id="a/b", max_bytes=1024)
    delta = {"index": 0, "id": "c0", "name": "look", "arguments": "{}"}
    events = (
        writer.chunks("reasoning", "h\u00fcm \ud800") + writer.chunks("content", "\x00\n") + writer.tool_calls([delta])
    )
    record = packed([("reasoning", "h\u00fcm \ud800"), ("content", "\x00\n"), ("tool_calls", [delta])])
    assert written(unpacked(record), request_id="r1", session_id="a/b") == events


@pytest.mark.parametrize("broken", [b"{}", b'{"chunks": [[7, "x"]]}', b'{"chunks": 5}', b"no JSON", b'{"chunks": [1]}'])
def test_what_is_no_record_is_refused_with_one_kind_of_error(broken: bytes) -> None:
    with pytest.raises(ValueError):
        unpacked(broken)


def test_no_text_can_pass_for_an_end_without_text() -> None:
    assert not omits_text(encode({"type": "done", "full_content": '"content_omitted":true'}))


def test_chunks_go_with_their_request(tmp_path: Path) -> None:
    store = _store(tmp_path / "state.db")
    store.finish(KEY, b"end", now=1000.0, chunks=b"x" * 10_000)
    assert store.chunks(KEY) == b"x" * 10_000
    held = sqlite3.connect(tmp_path / "state.db").execute("SELECT bytes FROM entries").fetchone()[0]
    assert held == 10_003, "what a level may hold counts them too"
    store.mark_delivered([KEY])
    store.purge(now=5000.0, remember_s=600.0, ttl_s=1e9, max_sessions=10)
    assert store.chunks(KEY) is None
    assert sqlite3.connect(tmp_path / "state.db").execute("SELECT count(*) FROM chunks").fetchone()[0] == 0


@pytest.mark.parametrize("version", [1, 2])
def test_an_older_database_opens_and_takes_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    with monkeypatch.context() as older:
        older.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:version])
        db = sqlite3.connect(tmp_path / "state.db")
        schema.migrate(db)
        db.close()
    store = _store(tmp_path / "state.db")
    store.finish(KEY, b"end", now=1.0, chunks=b"record")
    assert store.chunks(KEY) == b"record"
    store.close()
