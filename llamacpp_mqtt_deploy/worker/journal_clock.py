"""The time that the journal is kept in: it does not follow a clock that is set for a moment only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

NOTICED_S = 60.0
"""Less than that is no jump: clocks are trimmed all the time."""

BELIEVED_AFTER_S = 30.0
"""A jump that lasts so long is meant. Before it is believed, what is written bears the time that would have been; in the first so
many seconds of a worker it is believed at once, since the time before it was seen for as short a while."""


def wall() -> float:
    """The machine's clock, which can be set."""
    return time.time()


def since_boot() -> float:
    """Seconds that also pass while the machine sleeps, and that nobody can set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class JournalClock:
    """May be asked from any thread."""

    def __init__(self, *, wall: Callable[[], float] = wall, steady: Callable[[], float] = since_boot) -> None:
        self._wall = wall
        self._steady = steady
        self._lock = threading.Lock()
        self._began_at = steady()
        self._ahead_s = wall() - self._began_at
        self._jumped_at: float | None = None
        self.set_forward_s = 0.0
        """By how much the clock was set forward that the store was not told of yet (`told`)."""

    def now(self) -> float:
        """Seconds since the epoch."""
        with self._lock:
            now, steady = self._wall(), self._steady()
            jump_s = now - steady - self._ahead_s
            if abs(jump_s) < NOTICED_S:
                self._ahead_s, self._jumped_at = now - steady, None
                return now
            since = self._jumped_at = steady if self._jumped_at is None else self._jumped_at
            if steady - since < BELIEVED_AFTER_S <= steady - self._began_at:
                return steady + self._ahead_s
            self._ahead_s, self._jumped_at = now - steady, None
            self.set_forward_s += max(0.0, jump_s)
        log.warning("clock.set", seconds=round(jump_s))
        return now

    def told(self, forward_s: float) -> None:
        """The store knows of so much of it; less than nothing where it has not taken what it was told."""
        with self._lock:
            self.set_forward_s -= forward_s
