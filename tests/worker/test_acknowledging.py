"""The engine starts while the journal still writes the request, and nobody hears of it before the journal has it."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Finished
from llamacpp_mqtt_deploy.ports import Delivery, EntryKey, StoreError
from llamacpp_mqtt_deploy.testing.loopback import LoopbackLink
from llamacpp_mqtt_deploy.testing.loopback_broker import LoopbackBroker
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.acknowledging import Acknowledger
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker


class HeldWrite:
    """A write of the store that is over when the test says so."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._problem: StoreError | None = None
        self._callbacks: list[Callable[[StoreError | None], None]] = []

    def end(self, problem: StoreError | None = None) -> None:
        self._problem = problem
        self._over.set()
        for callback in self._callbacks:
            callback(problem)

    def done(self) -> bool:
        return self._over.is_set()

    def hurry(self) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        assert self._over.wait(timeout_s)
        if self._problem is not None:
            raise self._problem

    def on_done(self, callback: Callable[[StoreError | None], None]) -> None:
        self._callbacks.append(callback)


class HeldJournal:
    """Holds the accepts of a worker; the entries reach the real store when the test lets them."""

    def __init__(self, worker: WholeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes: list[HeldWrite] = []
        self.unhurried: list[bool] = []
        self._entries: list[Sequence[Any]] = []
        self._accept_now = worker.daemon.parts.store.accept_soon
        monkeypatch.setattr(worker.daemon.parts.store, "accept_soon", self._accept_soon)

    def _accept_soon(self, entries: Sequence[Any], *, unhurried: bool = False) -> HeldWrite:
        self._entries.append(entries)
        self.unhurried.append(unhurried)
        self.writes.append(HeldWrite())
        return self.writes[-1]

    def let_through(self, number: int = 0) -> None:
        self._accept_now(self._entries[number]).wait(10)
        self.writes[number].end()

    def fail(self, number: int = 0) -> None:
        self.writes[number].end(StoreError("disk full"))


def _replies(bus: Bus, request_id: str) -> list[str]:
    return [event["type"] for event in bus.listener.of(request_id)]


def test_the_engine_starts_while_the_journal_writes_and_nothing_is_told_before_it_has(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(slots=1)
    gate = Gate()
    engine.play("first", gate, " last")
    worker = bus.worker(engine)
    journal = HeldJournal(worker, monkeypatch)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10), "the engine waits for the journal"
    assert _replies(bus, "r1") == [], "told of a request that a crash would lose"
    assert bus.broker.unacknowledged(worker.client_id) == 1, "acknowledged before a crash would leave it in the journal"
    journal.let_through()
    bus.listener.until(type="chunk", request_id="r1")
    gate.open()
    assert bus.listener.terminal("r1")["type"] == "done"
    assert bus.listener.read("r1").content == "first last"


def test_a_whole_answer_waits_for_a_journal_that_another_program_holds(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play("all", " of", " it")
    bus.worker(engine)
    with closing(sqlite3.connect(bus.state / "state.db", isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        bus.ask("hi", request_id="r1")
        eventually(lambda: len(engine.calls) == 1 and not engine.busy)
        assert _replies(bus, "r1") == []
        shell.execute("ROLLBACK")
    bus.listener.terminal("r1")
    assert bus.listener.read("r1").content == "all of it"
    assert _replies(bus, "r1")[0] == "start"


def test_a_failed_accept_stops_the_engine_and_is_told_as_a_refusal(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(slots=1)
    gate = Gate()
    engine.play("never told", gate, " nor this")
    worker = bus.worker(engine)
    journal = HeldJournal(worker, monkeypatch)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    journal.fail()
    error = bus.listener.terminal("r1")
    assert error["type"] == "error"
    assert _replies(bus, "r1") == ["error"], "a request that was not accepted was told of"
    assert error.get("partial_content", "") == ""
    assert error["code"] == "internal"
    eventually(lambda: bus.broker.unacknowledged(worker.client_id) == 0)
    # The slot is free again, and the same id may be used.
    monkeypatch.undo()
    bus.ask("again", request_id="r1")
    bus.listener.until(type="done", request_id="r1")


def test_acknowledgements_keep_the_order_of_receipt() -> None:
    broker = LoopbackBroker()
    told: list[bytes] = []

    class Outbox(LoopbackLink):
        def acknowledge(self, delivery: Delivery) -> None:
            told.append(delivery.payload)

    acknowledger = Acknowledger(Outbox(broker))
    first = acknowledger.take([Delivery(topic="t", payload=b"1", qos=1)])
    second = acknowledger.take([Delivery(topic="t", payload=b"2", qos=1), Delivery(topic="t", payload=b"3", qos=1)])
    third = acknowledger.take([Delivery(topic="t", payload=b"4", qos=1)])
    acknowledger.ready(second)
    assert told == []
    acknowledger.ready(first)
    assert told == [b"1", b"2", b"3"]
    acknowledger.ready(third)
    assert told == [b"1", b"2", b"3", b"4"]


class Wordless(ScriptedEngine):
    """Neither answers nor says that it is slow, as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(slots=1)
        self.may = threading.Event()

    @override
    def pump(self, call: EngineCall, **arguments: Any) -> Finished:
        assert self.may.wait(20)
        return super().pump(call, **arguments)


def test_a_request_is_acknowledged_soon_also_where_its_engine_says_nothing_at_all(bus: Bus) -> None:
    engine = Wordless()
    engine.play("at last")
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1")
    eventually(lambda: worker.daemon.parts.registry.running() == 1)
    eventually(lambda: bus.broker.unacknowledged(worker.client_id) == 0, 5)
    assert worker.daemon.parts.store.find(EntryKey("default", "demo", "r1")) is not None
    engine.may.set()
    assert bus.listener.terminal("r1")["type"] == "done"
    assert bus.listener.read("r1").content == "at last"


def test_only_a_request_that_begins_at_once_beside_others_may_wait_for_the_next_commit(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(slots=2)
    gates = [Gate(), Gate()]
    for gate in gates:
        engine.play(gate, "an answer")
    worker = bus.worker(engine)
    journal = HeldJournal(worker, monkeypatch)
    bus.ask("hi", session="a", request_id="r1")  # the worker is at rest, and so are its processors
    assert gates[0].reached.wait(10)
    bus.ask("hi", session="b", request_id="r2")
    assert gates[1].reached.wait(10)
    bus.ask("hi", session="c", request_id="r3")  # has to wait, and is told so
    eventually(lambda: journal.unhurried == [False, True, False])
    for number in range(3):
        journal.let_through(number)
    for gate in gates:
        gate.open()
    for request_id in ("r1", "r2", "r3"):
        assert bus.listener.terminal(request_id)["type"] == "done"
    assert _replies(bus, "r3")[0] == "queued"
