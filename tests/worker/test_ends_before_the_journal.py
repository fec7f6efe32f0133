"""An end is told when the journal has it: no crash ends its request anew, and no history that is asked for then lacks the turn."""

from __future__ import annotations

import shutil
import sqlite3
from functools import partial
from typing import Any

import pytest

from llamacpp_mqtt_deploy.ports import EntryKey, Store, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker import unstored_ends
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker

KEY = EntryKey("default", "demo", "r1")


def _lock(bus: Bus) -> sqlite3.Connection:
    """An open shell of another program."""
    lock = sqlite3.connect(bus.state / "state.db", timeout=5, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    return lock


def _waits(worker: WholeWorker, key: EntryKey = KEY) -> None:
    eventually(lambda: worker.daemon.parts.redelivery.unstored(key) is not None)


def _ended(bus: Bus, request_id: str = "r1") -> bool:
    return any(event.get("final") for event in bus.listener.of(request_id))


def _refuse(monkeypatch: pytest.MonkeyPatch, store: Store, *keys: EntryKey) -> None:
    """The disk has no place for the ends of these."""
    finish = store.finish

    def refusing(key: EntryKey, *args: Any, **kwargs: Any) -> None:
        if key in keys:
            raise StoreError("no space left")
        finish(key, *args, **kwargs)

    monkeypatch.setattr(store, "finish", refusing)


@pytest.mark.parametrize("mode", ["native", "simulated"])
def test_an_end_waits_while_another_program_locks_the_database(bus: Bus, mode: str) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("the ", gate, "answer")
    worker = bus.worker(engine, streaming__mode=mode)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.listener.until(type="chunk" if mode == "native" else "start", request_id="r1")
    lock = _lock(bus)
    gate.open()
    _waits(worker)
    assert not _ended(bus)
    lock.execute("ROLLBACK")
    assert bus.listener.terminal("r1")["full_content"] == "the answer"
    bus.control("history")
    messages = bus.listener.until(type="ack", action="history", status="ok")["messages"]
    assert [message["content"] for message in messages] == ["hi", "the answer"]
    assert bus.listener.read("r1").content == "the answer"


def test_the_next_prompt_of_the_session_waits_and_knows_the_answer(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    engine.play("the answer")
    worker = bus.worker(engine)
    with monkeypatch.context() as full_disk:
        _refuse(full_disk, worker.daemon.parts.store, KEY)
        bus.ask("hi", request_id="r1")
        _waits(worker)
        bus.ask("and then?", request_id="r2")
        bus.listener.until(type="queued", request_id="r2")
        assert not _ended(bus)
    bus.listener.terminal("r2")
    asked = [message["content"] for message in engine.calls[-1].messages]
    assert asked == ["hi", "the answer", "and then?"]
    finals = [event["request_id"] for event in bus.listener.events if event.get("final")]
    assert finals == ["r1", "r2"]


def test_others_are_answered_while_an_end_waits_for_the_disk(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bus.worker(ScriptedEngine(slots=1))
    _refuse(monkeypatch, worker.daemon.parts.store, KEY)
    bus.ask("hi", request_id="r1")
    _waits(worker)
    for number in range(5):
        bus.ask("hello", session="other", request_id=f"o{number}")
        assert bus.listener.terminal(f"o{number}")["full_content"] == "hello"
    assert not _ended(bus)


def test_an_end_that_the_disk_does_not_take_for_long_is_told_all_the_same(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unstored_ends, "TELL_AFTER_S", 0.5)
    worker = bus.worker()
    parts = worker.daemon.parts
    with monkeypatch.context() as full_disk:
        _refuse(full_disk, parts.store, KEY)
        bus.ask("hi", request_id="r1")
        assert bus.listener.terminal("r1")["full_content"] == "hi"
        eventually(lambda: parts.registry.find(KEY) is None)
        assert parts.redelivery.unstored(KEY) is not None
    eventually(lambda: parts.store.unfinished() == [])
    assert bus.listener.read("r1").content == "hi"


def test_a_kill_after_an_end_was_told_unstored_brings_no_other_end(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(unstored_ends, "TELL_AFTER_S", 0.5)
    engine, gate = ScriptedEngine(), Gate()
    bus.worker(engine)
    bus.ask("one", request_id="r0")
    bus.listener.terminal("r0")
    engine.play("the ", gate, "answer")
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.listener.until(type="chunk", request_id="r1")  # the journal has it: the engine may be the quicker one
    lock = _lock(bus)
    gate.open()
    bus.listener.terminal("r1")
    told = [delivery.payload for delivery in bus.listener.deliveries if b'"r1"' in delivery.payload][-1]
    # What a kill at this moment leaves on the disk.
    left = tmp_path_factory.mktemp("killed") / "left"
    shutil.copytree(bus.state, left)
    lock.execute("ROLLBACK")
    store = SqliteStore(left / "state.db")
    store.open()
    assert store.unfinished() == []
    found = store.find(KEY)
    assert found is not None
    assert found.terminal == told
    assert [message["content"] for message in store.history(("default", "demo"))] == ["one", "one", "hi", "the answer"]
    store.close()
    eventually(lambda: not (bus.state / "state.db.ends").exists())


def test_a_request_that_the_journal_refuses_while_it_runs_is_refused_and_not_told_to_be_done(bus: Bus) -> None:
    worker = bus.worker()
    lock = _lock(bus)
    bus.ask("hi", request_id="r1", metadata={"n": 1})
    end = bus.listener.terminal("r1")
    assert (end["code"], end["metadata"]) == ("internal", {"n": 1})
    assert "not accepted" in end["message"]
    assert worker.daemon.parts.redelivery.unstored(KEY) is None
    lock.execute("ROLLBACK")
    eventually(lambda: not worker.daemon.parts.store.trouble())
    bus.ask("again", request_id="r2")
    bus.listener.terminal("r2")
    bus.control("history")
    messages = bus.listener.until(type="ack", action="history", status="ok")["messages"]
    assert [message["content"] for message in messages] == ["again", "again"]
    assert [event["type"] for event in bus.listener.of("r1")] == ["error"]


def test_an_end_that_was_not_told_before_a_stop_leaves_its_request_to_the_next_life(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker(limits__drain_timeout_s=0.2)
    with monkeypatch.context() as full_disk:
        _refuse(full_disk, worker.daemon.parts.store, KEY)
        bus.ask("hi", request_id="r1")
        _waits(worker)
        worker.stop()
        assert not _ended(bus)
    bus.worker()
    bus.listener.terminal("r1")
    bus.ask("more", session="other", request_id="r2")
    bus.listener.terminal("r2")
    assert [event["type"] for event in bus.listener.of("r1") if event.get("final")] == ["error"]


def test_a_cancelled_request_in_the_queue_ends_once_when_the_disk_takes_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play("one", gate)
    worker = bus.worker(engine)
    key = EntryKey("default", "demo", "r2")
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.ask("two", request_id="r2")
    bus.listener.until(type="queued", request_id="r2")
    with monkeypatch.context() as full_disk:
        _refuse(full_disk, worker.daemon.parts.store, key)
        bus.control("cancel", request_id="r2")
        _waits(worker, key)
        assert not _ended(bus, "r2")
        gate.open()
        bus.listener.terminal("r1")
    assert bus.listener.terminal("r2")["finish_reason"] == "cancelled"
    bus.ask("three", request_id="r3")
    assert bus.listener.terminal("r3")["full_content"] == "three"


def test_the_oldest_ends_are_told_when_too_many_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unstored_ends, "_MAX_UNSTORED", 2)
    store = SqliteStore(None)
    store.open()
    told: list[str] = []
    ends = unstored_ends.UnstoredEnds(store)
    for number in ("1", "2", "3"):
        key = EntryKey("default", "demo", number)
        ends.add(key, b"end", now=1.0, history=None, chunks=None, then=partial(told.append, number), since=0.0)
    assert told == ["1"]
    assert {key.request_id for key in ends.waiting()} == {"2", "3"}


def test_a_worker_that_stops_tells_no_end_that_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(None)
    store.open()
    told: list[str] = []
    _refuse(monkeypatch, store, KEY)
    redelivery = Redelivery(outbox=None, store=store, max_event_bytes=lambda: 1024)  # type: ignore[arg-type]  # nothing is sent
    redelivery.store_later(KEY, b"end", now=1.0, history=None, then=lambda: told.append("r1"), since=float("-inf"))
    redelivery.last_call()
    redelivery.sweep()
    assert told == []
