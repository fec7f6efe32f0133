"""Threads that wait are woken one by one, and none is forgotten."""

from __future__ import annotations

import functools
import threading

import pytest

from llamacpp_mqtt_deploy.worker.waiting_threads import WaitingThreads
from tests.support.waiting import eventually


class Pool:
    """Three threads that wait, numbered in the order in which they began to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.waiting = WaitingThreads(self.lock)
        self.woken: list[int] = []
        self.threads = [threading.Thread(target=self._wait, args=(number,), daemon=True) for number in range(3)]
        for number, thread in enumerate(self.threads, start=1):
            thread.start()
            eventually(functools.partial(self._are_waiting, number))

    def _are_waiting(self, count: int) -> bool:
        return len(self.waiting) == count

    def _wait(self, number: int) -> None:
        with self.lock:
            self.waiting.wait(30.0)
            self.woken.append(number)

    def wake(self, count: int) -> None:
        with self.lock:
            self.waiting.wake(count)


def test_who_began_to_wait_last_is_woken_first_and_alone() -> None:
    pool = Pool()
    pool.wake(1)
    pool.threads[2].join(10)
    assert (pool.woken, len(pool.waiting)) == ([2], 2)
    pool.wake(5)
    for thread in pool.threads:
        thread.join(10)
    assert sorted(pool.woken) == [0, 1, 2]


def test_a_wait_ends_after_its_time_and_leaves_nothing_behind() -> None:
    lock = threading.Lock()
    waiting = WaitingThreads(lock)
    with lock:
        waiting.wait(0.01)
        assert lock.locked()
        assert len(waiting) == 0
        waiting.wake(1)


@pytest.mark.parametrize("count", [0, 1])
def test_waking_where_nobody_waits_does_nothing(count: int) -> None:
    waiting = WaitingThreads(threading.Lock())
    waiting.wake(count)
    waiting.wake_all()
    assert len(waiting) == 0
