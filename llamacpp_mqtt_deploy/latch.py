"""Something that happens once and is waited for: an Event for those that are made with each request."""

from __future__ import annotations

import threading


class Latch:
    """Set once; whoever waits goes on then. An Event has two locks and a queue, and a wait on it makes a third lock: this has one,
    and waiting for what has happened already takes none."""

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """To be called once, by one thread."""
        self._is_set = True
        self._lock.release()

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout_s: float) -> bool:
        """Wait at most this long; True when it has happened."""
        if not self._is_set and self._lock.acquire(timeout=max(0.0, min(timeout_s, threading.TIMEOUT_MAX))):
            self._lock.release()  # for the next one that waits
        return self._is_set
