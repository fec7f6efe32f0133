"""Threads that wait for something to do, woken one by one: who came last is first, its stack is still in the processor's caches."""

from __future__ import annotations

import threading


class WaitingThreads:
    """Like a condition, but last in, first out, and no more are woken than have something to do.

    With one notify for all a pool of 256 threads took 14 ms of processor time for each request; a condition that wakes them in
    turn has each of them come back with cold caches. All methods are called with `lock` held.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._waiting: list[threading.Lock] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, timeout_s: float) -> None:
        """Wait to be woken, at most so long; the lock is let go meanwhile, as a condition does."""
        mine = threading.Lock()
        mine.acquire()
        self._waiting.append(mine)
        self._lock.release()
        try:
            mine.acquire(timeout=timeout_s)
        finally:
            self._lock.acquire()
            if mine in self._waiting:
                self._waiting.remove(mine)

    def wake(self, count: int) -> None:
        """Wake this many, or as many as wait."""
        for _ in range(min(count, len(self._waiting))):
            self._waiting.pop().release()

    def wake_all(self) -> None:
        self.wake(len(self._waiting))
