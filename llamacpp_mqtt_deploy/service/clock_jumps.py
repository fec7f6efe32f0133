"""Whether somebody has set the clock, seen from one that nobody can set."""

from __future__ import annotations

import time
from collections.abc import Callable

NOTICED_S = 60.0
"""Less than that is no jump: clocks are trimmed all the time."""


def _wall() -> float:
    return time.time()


def _since_boot() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ClockJumps:
    """Remembers how the two clocks stood at the last look."""

    def __init__(self, *, wall: Callable[[], float] = _wall, steady: Callable[[], float] = _since_boot) -> None:
        self._wall = wall
        self._steady = steady
        self._ahead_s = wall() - steady()

    def look(self) -> tuple[float, float]:
        """The time, and the seconds by which it was set forward since the last look, negative for back; 0 when it was not."""
        now = self._wall()
        ahead_s = now - self._steady()
        jump_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        return now, jump_s if abs(jump_s) >= NOTICED_S else 0.0
