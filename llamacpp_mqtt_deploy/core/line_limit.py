"""How many log lines of a kind one first topic level may bring about."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

# Enough to see what is wrong with a client, and of a flood of 10 000 bad messages 20 lines instead of 10 000.
LINES = 20
WINDOW_S = 10.0
# First levels are chosen by clients: beyond so many at once they share one count for each kind.
_TOLD_APART = 1000
OTHERS = "(others)"


@dataclass(slots=True)
class _Window:
    ends_at: float
    lines: int = 0


@dataclass(frozen=True, slots=True)
class Suppressed:
    """So many lines were left out."""

    kind: str
    first_level: str
    lines: int


class LineLimit:
    """Counts lines by kind and first level, in windows that begin with the first line. Pure: the caller brings the time."""

    def __init__(self) -> None:
        self._windows: OrderedDict[tuple[str, str], _Window] = OrderedDict()

    def allow(self, kind: str, first_level: str, now: float) -> bool:
        """Whether this line may be written; one that may not is counted."""
        name = (kind, first_level)
        if name not in self._windows and len(self._windows) >= _TOLD_APART:
            name = (kind, OTHERS)
        window = self._windows.setdefault(name, _Window(now + WINDOW_S))
        window.lines += 1
        return window.lines <= LINES

    def over(self, now: float) -> list[Suppressed]:
        """What was left out in the windows that are over; to be called now and then, it forgets them."""
        ended = [name for name, window in self._windows.items() if window.ends_at <= now]
        windows = [(name, self._windows.pop(name)) for name in ended]
        return [Suppressed(*name, window.lines - LINES) for name, window in windows if window.lines > LINES]
