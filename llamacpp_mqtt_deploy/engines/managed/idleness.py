"""Knows who uses a managed server, and since when nobody does: when its process may end until the next request."""

from __future__ import annotations

import math


class Idleness:
    """Its owner holds a lock around every call. Times are monotonic seconds."""

    def __init__(self, sleep_after_s: float) -> None:
        self._sleep_after_s = sleep_after_s or math.inf
        self._since = 0.0
        self._awake_until = -math.inf
        self.users = 0
        """Calls that use the server or wait for it."""

    def begin(self) -> None:
        """A call uses the server from now on."""
        self.users += 1

    def end(self, now: float) -> None:
        """A call is over."""
        self.users -= 1
        self._since = now

    def ready(self, now: float) -> None:
        """The server has just become ready: whoever it was started for has its time to come."""
        self._since = now

    def keep_awake(self, seconds: float | None, now: float) -> None:
        """Do not sleep for so long from now on; None is until told otherwise, 0 ends it."""
        if seconds is None:
            self._awake_until = math.inf
        else:
            self._awake_until = now + seconds if seconds else -math.inf

    def kept_awake(self, now: float) -> bool:
        return now < self._awake_until

    def left_s(self, now: float) -> float:
        """Seconds until the server may end, 0 when it may now; infinite while it is used or is never to end."""
        if self.users:
            return math.inf
        return max(0.0, max(self._since + self._sleep_after_s, self._awake_until) - now)
