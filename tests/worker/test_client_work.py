"""What clients ask for and the disk may hold up: in order, in turn, bounded."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from tests.support.waiting import eventually


def test_sixteen_calls_of_a_client_wait_and_no_more() -> None:
    work = ClientWork()
    done: list[int] = []
    for number in range(16):
        assert work.has_place("ada")
        assert work.run("ada", partial(done.append, number))
    assert not work.has_place("ada")
    assert not work.run("ada", partial(done.append, 16))
    assert work.has_place("bob")
    work.start()
    work.close(10)
    assert done == list(range(16))
    assert not work.has_place("bob")
    assert not work.run("bob", lambda: None)


def test_a_thousand_clients_fill_it_up() -> None:
    work = ClientWork()
    taken = sum(work.run(f"level{number}", lambda: None) for number in range(1100))
    assert taken == 1024


def test_a_call_is_made_at_once_and_one_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    work, done = ClientWork(), threading.Event()
    looks_s: list[float] = []
    wait = work._changed.wait

    def look_in_a_minute(timeout_s: float) -> bool:
        looks_s.append(timeout_s)
        return wait(60.0)

    monkeypatch.setattr(work._changed, "wait", look_in_a_minute)
    assert time.monotonic() - work.beat_at < 10
    work.start()
    eventually(lambda: work._changed._waiters)  # type: ignore[attr-defined]
    began = work.beat_at = time.monotonic() - 100

    def fails() -> None:
        raise RuntimeError("a defect")

    with capture_logs() as lines:
        assert work.run("ada", fails)
        assert work.run("ada", done.set)
        assert done.wait(10)
    assert [line["event"] for line in lines] == ["client_work.failed"]
    eventually(lambda: work.beat_at > began and work._changed._waiters)  # type: ignore[attr-defined]
    work.close(10)
    assert not work._thread.is_alive()
    assert set(looks_s) == {1.0}, "the watchdog wants to see it each second"


def test_work_that_never_began_closes_at_once_and_keeps_no_program_alive() -> None:
    work = ClientWork()
    work.close(60)
    assert work._thread.daemon
