"""A journal that an earlier life left is taken up entry by entry; one bad entry costs nobody but itself."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from llamacpp_mqtt_deploy.ports import Entry, EntryKey, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.jobmaker import JobMaker
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def _entry(request_id: str, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "key": EntryKey("default", "demo", request_id),
        "topic": "llm/request/demo",
        "payload": json.dumps({"prompt": "left behind", "request_id": request_id}).encode(),
        "digest": "d",
        "accepted_at": time.time() - 5,
        "reply_topic": "llm/reply/demo",
    }
    return Entry(**fields | changes)


def _leave(
    bus: Bus, entries: Sequence[Entry], *, streaming: Sequence[EntryKey] = (), started: Sequence[EntryKey] = ()
) -> None:
    store = SqliteStore(bus.state / "state.db")
    store.open()
    store.accept(entries)
    for key in streaming:
        store.mark_streaming(key)
    for key in started:
        store.mark_started(key)
    store.close()


def _unended(bus: Bus) -> list[str]:
    store = SqliteStore(bus.state / "state.db")
    store.open()
    left = [entry.key.request_id for entry in (*store.unfinished(), *store.undelivered())]
    store.close()
    return left


def test_a_bad_entry_is_put_aside_with_an_end_and_the_others_run(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = JobMaker.make

    def picky(maker: JobMaker, *, entry: Entry, **more: Any) -> Any:
        if entry.key.request_id == "bad":
            raise RuntimeError("a defect with this entry")
        return make(maker, entry=entry, **more)

    monkeypatch.setattr(JobMaker, "make", picky)
    _leave(bus, [_entry("bad"), _entry("good")])
    worker = bus.worker()
    assert bus.listener.terminal("bad")["code"] == "internal"
    assert bus.listener.terminal("good")["full_content"] == "left behind"
    eventually(lambda: len(worker.daemon.parts.registry) == 0)
    assert worker.stop() == 0
    assert _unended(bus) == []
    assert "recovery.entry_failed" in capsys.readouterr().out


def test_an_entry_that_failed_in_the_line_leaves_no_place_and_no_session_behind(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave(bus, [_entry("bad")])
    worker = bus.worker(wait=False)
    registry = worker.daemon.parts.registry

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(registry, "positions", broken)
    assert bus.listener.terminal("bad")["code"] == "internal"
    monkeypatch.undo()
    eventually(lambda: len(registry) == 0)
    bus.listener.until(state="online", instance=worker.daemon.parts.presence.instance)
    bus.ask("next", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


def test_an_entry_for_which_no_end_can_be_made_is_not_tried_again(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    send = Redelivery.send

    def picky(redelivery: Redelivery, key: EntryKey, *more: Any, **named: Any) -> None:
        if key.request_id == "bad":
            raise RuntimeError("a defect with this end")
        send(redelivery, key, *more, **named)

    monkeypatch.setattr(Redelivery, "send", picky)
    ended = _entry("bad", state="ended", terminal=b"{}", payload=b"")
    begun, bad = _entry("begun"), _entry("bad", key=EntryKey("default", "other", "bad"))
    _leave(bus, [ended, bad, begun], streaming=[bad.key, begun.key])
    worker = bus.worker()
    assert bus.listener.terminal("begun")["code"] == "interrupted"
    eventually(lambda: worker.daemon.parts.store.undelivered() == [])
    assert worker.stop() == 0
    assert _unended(bus) == []


def test_a_full_disk_at_the_start_ends_what_was_begun_all_the_same(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave(bus, [_entry("begun"), _entry("good")], streaming=[_entry("begun").key])

    def full(*_: object, **__: object) -> None:
        raise StoreError("no space left")

    finish = SqliteStore.finish
    monkeypatch.setattr(SqliteStore, "finish", full)
    worker = bus.worker()
    assert bus.listener.terminal("begun")["code"] == "interrupted"
    monkeypatch.setattr(SqliteStore, "finish", finish)
    assert bus.listener.terminal("good")["type"] == "done"
    eventually(lambda: worker.daemon.parts.store.unfinished() == [])


def test_metadata_under_another_name_is_echoed_after_a_crash_too(bus: Bus) -> None:
    key = EntryKey("game", "demo", "r1")
    payload = b'{"message": "hi", "requestId": "r1", "extra": {"tags": {"k": 1}}}'
    entry = _entry("r1", key=key, topic="game/request/demo", payload=payload, reply_topic="game/reply/demo")
    _leave(bus, [entry], streaming=[key])
    bus.worker(
        routes__game__request="game/request/{session}",
        routes__game__reply="game/reply/{session}",
        routes__game__fields={"prompt": "message", "request_id": "requestId", "metadata": "extra.tags"},
    )
    end = bus.listener.terminal("r1")
    assert (end["code"], end["metadata"]) == ("interrupted", {"k": 1})


def test_a_limit_of_starts_that_was_lowered_at_a_reload_ends_a_request_that_waits_with_as_many(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play(gate, "first")
    often = EntryKey("default", "demo", "often")
    _leave(bus, [_entry("first"), _entry("often")], started=[often, often])
    worker = bus.worker(engine, limits__max_starts=3)
    assert gate.reached.wait(10)
    worker.daemon._loaded.overrides.update({"limits.max_starts": "2"})  # type: ignore[attr-defined]
    bus.admin("reload")
    assert bus.listener.until(action="reload")["changed"] == ["limits.max_starts"]
    gate.open()
    error = bus.listener.terminal("often")
    assert (error["code"], "2 times" in error["message"]) == ("engine_lost", True)
    assert len(engine.calls) == 1


def test_a_request_that_is_taken_up_is_answered_where_its_client_waits(bus: Bus) -> None:
    """Its reply topic was made of ids in the payload, or named there."""
    key = EntryKey("game", "demo", "r1")
    topic = "game/assistant_response/demo/c1/r1"
    entry = _entry(
        "r1", key=key, topic="game/input", payload=b'{"message": "hi", "session_id": "demo"}', reply_topic=topic
    )
    _leave(bus, [entry])
    bus.worker(
        routes__game__request="game/input",
        routes__game__reply="game/assistant_response/{session}",
        routes__game__trust_payload_session=True,
        routes__game__fields={"prompt": "message"},
    )
    end = bus.listener.terminal("r1")
    assert (end["type"], end["_topic"]) == ("done", topic)
