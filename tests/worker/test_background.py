"""A slow disk holds up what has to be written, and nothing else."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from llamacpp_mqtt_deploy.worker.background import Background
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker

PACED: dict[str, Any] = {
    "streaming__mode": "simulated",
    "streaming__chunk_chars": 4,
    "streaming__chunk_interval_s": 0.02,
}


class HeldStore:
    """Holds one method of the worker's store, for calls that `matches` says, until `open`."""

    def __init__(self, worker: WholeWorker, patch: pytest.MonkeyPatch, method: str, matches: str | None = None) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        store = worker.daemon.parts.store
        real = getattr(store, method)

        def slow(*args: Any, **more: Any) -> Any:
            if matches is None or args[0].request_id == matches:
                self.reached.set()
                assert self.open.wait(60)
            return real(*args, **more)

        patch.setattr(store, method, slow)


def _keeps_its_pace(bus: Bus, request_id: str) -> None:
    """A stream of some seconds whose chunks must come while the store is held."""
    bus.ask("a word " * 120, request_id=request_id, session="other")
    for _ in range(10):
        bus.listener.until(type="chunk", request_id=request_id, timeout_s=5.0)
        seq = max(event["seq"] for event in bus.listener.of(request_id) if event["type"] == "chunk")
        bus.listener.until(type="chunk", request_id=request_id, seq=seq + 5, timeout_s=5.0)


def test_the_end_of_one_clients_paced_answer_on_a_slow_disk_does_not_hold_up_anothers_stream(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker(ScriptedEngine(), **PACED)
    held = HeldStore(worker, monkeypatch, "finish", matches="slow")
    bus.ask("short", request_id="slow", session="one")
    assert held.reached.wait(10)
    _keeps_its_pace(bus, "r2")
    held.open.set()
    assert bus.listener.terminal("slow")["full_content"] == "short"
    assert bus.listener.terminal("r2", timeout_s=30.0)["type"] == "done"


@pytest.mark.parametrize("method", ["mark_delivered", "purge"])
def test_a_slow_sweep_or_purge_does_not_hold_up_a_stream(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.service.daemon._PURGE_EVERY_S", 0.2)
    worker = bus.worker(ScriptedEngine(), **PACED)
    held = HeldStore(worker, monkeypatch, method)
    bus.ask("short", request_id="r1", session="one")
    bus.listener.terminal("r1")
    assert held.reached.wait(10)
    _keeps_its_pace(bus, "r2")
    held.open.set()


def test_a_time_limit_that_ends_a_waiting_request_on_a_slow_disk_does_not_hold_up_a_stream(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine, **PACED)
    held = HeldStore(worker, monkeypatch, "finish", matches="late")
    bus.ask("a word " * 60, request_id="r1", session="one")
    bus.ask("late", request_id="late", session="one", timeout_s=0.3)
    assert held.reached.wait(10)
    _keeps_its_pace(bus, "r2")
    held.open.set()
    assert bus.listener.terminal("late")["code"] == "timeout"


def test_a_background_that_hangs_is_told_to_the_watchdog(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bus.worker()
    assert worker.daemon._watchdog.trouble() is None
    held = HeldStore(worker, monkeypatch, "mark_delivered")
    bus.ask("hi", request_id="r1")
    assert held.reached.wait(10)
    worker.daemon.parts.background.beat_at = time.monotonic() - 21
    assert worker.daemon._watchdog.trouble() == "the background thread hangs"
    held.open.set()
    eventually(lambda: worker.daemon._watchdog.trouble() is None)


def test_work_is_done_in_order_once_under_its_name_and_what_fails_ends_nothing() -> None:
    done: list[str] = []
    background = Background()

    def fails() -> None:
        raise RuntimeError("a defect")

    assert background.run("a", lambda: done.append("a"))
    assert background.run("b", fails)
    assert background.run("a", lambda: done.append("a again"))
    assert background.run("c", lambda: done.append("c"))
    background.start()
    background.close(10)
    assert done == ["a", "c"]
    assert not background.run("d", lambda: None)


def test_work_beyond_the_bound_is_refused_but_not_what_waits_already() -> None:
    background = Background()
    assert all(background.run(number, lambda: None) for number in range(10_000))
    assert [background.run(name, lambda: None) for name in ("one more", 0, 9_999)] == [False, True, True]


def test_what_comes_later_is_done_at_once_and_the_beat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    background, done = Background(), threading.Event()
    looks_s: list[float] = []
    wait = background._changed.wait

    def look_in_a_minute(timeout_s: float) -> bool:
        looks_s.append(timeout_s)
        return wait(60.0)

    monkeypatch.setattr(background._changed, "wait", look_in_a_minute)
    assert time.monotonic() - background.beat_at < 10
    background.start()
    eventually(lambda: background._changed._waiters)  # type: ignore[attr-defined]
    began = background.beat_at = time.monotonic() - 100
    assert background.run("a", done.set)
    assert done.wait(10)
    eventually(lambda: background.beat_at > began and background._changed._waiters)  # type: ignore[attr-defined]
    background.close(10)
    assert not background._thread.is_alive()
    background.close(10)
    assert set(looks_s) == {1.0}, "the watchdog wants to see it each second"


def test_a_background_that_never_ran_closes_at_once_and_keeps_no_program_alive() -> None:
    background = Background()
    background.close(60)
    assert background._thread.daemon
