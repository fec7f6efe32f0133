"""When to say so again: pure arithmetic on a clock that the caller reads."""

from __future__ import annotations

REMIND_AFTER_S = (10.0, 60.0, 300.0, 1800.0)
"""Pauses between two log lines for one and the same reason."""


class Reminder:
    """Says whether a line is due: the first time, when the reason changes, then at growing pauses."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._due_at = 0.0
        self._times = 0

    def due(self, reason: str, now: float) -> bool:
        """Whether to log this reason now."""
        if reason != self._reason:
            self._reason, self._times = reason, 0
        elif now < self._due_at:
            return False
        self._due_at = now + REMIND_AFTER_S[min(self._times, len(REMIND_AFTER_S) - 1)]
        self._times += 1
        return True

    def clear(self) -> None:
        """The trouble is over; the same reason is news again."""
        self._reason = None
