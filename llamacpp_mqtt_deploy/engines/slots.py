"""How many requests an engine has in flight: a counting semaphore whose waiters leave when their stop signal is set."""

from __future__ import annotations

import threading
import time

from llamacpp_mqtt_deploy.stopping import StopSignal


class Slots:
    """Room for `size` requests, first come, first served; `resize` when the engine says how many it has.

    A semaphore of the standard library can neither be woken by a stop signal nor resized.

    The worker counts its slots too (`JobRegistry`), to decide whose turn is next, and neither count can go: an engine keeps to
    its size by itself, for callers without a worker (`LlamaCppClient`, `lmd check`) as the contract suite holds, and an
    in-process computation that was left behind keeps its slot here until it ends, long after its job gave back the other.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._busy = 0
        self._next_ticket = 0
        self._waiting: list[int] = []
        # Taken alone where nobody waits: a condition's own way to it is two calls longer.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    @property
    def size(self) -> int:
        return self._size

    @property
    def busy(self) -> int:
        return self._busy

    def resize(self, size: int) -> None:
        with self._lock:
            self._size = max(1, size)
            self._changed.notify_all()

    def acquire(self, stop: StopSignal, timeout_s: float | None = None) -> bool:
        """Take a slot; False when the time passed first. Raises `Stopped` when the signal is set first."""
        with self._lock:
            if self._busy < self._size and not self._waiting:
                stop.raise_if_set()
                self._busy += 1
                return True
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            ticket = self._next_ticket
            self._next_ticket += 1
            self._waiting.append(ticket)
        forget = stop.on_stop(self._wake)
        try:
            with self._lock:
                while self._busy >= self._size or self._waiting[0] != ticket:
                    stop.raise_if_set()
                    left = None if ends_at is None else ends_at - time.monotonic()
                    if left is not None and left <= 0:
                        return False
                    self._changed.wait(left)
                stop.raise_if_set()
                self._busy += 1
                return True
        finally:
            forget()
            with self._lock:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def release(self) -> None:
        with self._lock:
            self._busy -= 1
            if self._waiting:
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify_all()
