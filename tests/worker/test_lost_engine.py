"""An engine that goes away before the first chunk is started again, after pauses in which a request can still be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Opened
from llamacpp_mqtt_deploy.core.errors import EngineLost
from llamacpp_mqtt_deploy.stopping import StopSignal
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine, Step
from llamacpp_mqtt_deploy.worker.jobs import Job
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


class Pauses:
    """Between the starts of a request no time passes; other waits of the worker last as long as ever."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.meanwhile: Callable[[StopSignal], object] = lambda _: None
        self.jobs: Callable[[], Iterable[Job]] = list

    def wait(self, signal: StopSignal, timeout_s: float, *, otherwise: Callable[[StopSignal, float], bool]) -> bool:
        if not any(job.stop is signal for job in self.jobs()):
            return otherwise(signal, timeout_s)
        self.seconds.append(timeout_s)
        self.meanwhile(signal)
        return signal.is_set()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    pauses = Pauses()
    real = StopSignal.wait
    monkeypatch.setattr(StopSignal, "wait", lambda signal, timeout_s: pauses.wait(signal, timeout_s, otherwise=real))
    return pauses


def test_the_pauses_before_new_starts_double_up_to_two_seconds(bus: Bus, pauses: Pauses) -> None:
    engine = ScriptedEngine()
    for _ in range(6):
        engine.play(EngineLost("gone"))
    worker = bus.worker(engine, limits__max_starts=7)
    pauses.jobs = worker.daemon.parts.registry.all
    bus.ask("hi", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert pauses.seconds == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_a_request_that_is_cancelled_in_the_pause_is_not_started_again(bus: Bus, pauses: Pauses) -> None:
    engine = ScriptedEngine()
    engine.play(EngineLost("gone"))
    worker = bus.worker(engine)
    pauses.jobs = worker.daemon.parts.registry.all
    pauses.meanwhile = lambda signal: signal.set("cancelled")
    bus.ask("hi", request_id="r1")
    assert bus.listener.terminal("r1")["finish_reason"] == "cancelled"
    assert len(engine.calls) == len(pauses.seconds) == 1


def test_a_request_that_waits_for_a_lost_engine_stays_in_the_journal_when_the_worker_stops(bus: Bus) -> None:
    def crash(_: EngineCall) -> Iterator[Step]:
        yield Opened("m")
        engine.become("unreachable", "nobody listens")
        yield EngineLost("gone")

    engine = ScriptedEngine(crash)
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1")
    eventually(lambda: len(engine.calls) == 2)
    assert worker.stop() == 0
    store = SqliteStore(bus.state / "state.db")
    store.open()
    left = [entry.key.request_id for entry in store.unfinished()]
    store.close()
    assert left == ["r1"]
