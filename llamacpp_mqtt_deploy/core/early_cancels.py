"""Cancels that came before their request, bounded per first topic level."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

# Protocol, section 4: how long a cancel waits for its request.
KEPT_S = 60.0
# A client that cancels ahead of its requests has a few of them under way; whoever floods pushes out his own.
PER_LEVEL = 100
# First levels are chosen by clients (bounded by the broker's users).
IN_ALL = 10_000


class EarlyCancels:
    """Which requests end as soon as they arrive. Pure: the caller brings the time (monotonic seconds, never going back)."""

    def __init__(self, *, per_level: int = PER_LEVEL, in_all: int = IN_ALL) -> None:
        self._per_level = per_level
        self._in_all = in_all
        self._levels: dict[str, OrderedDict[Hashable, float]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._levels.values()))

    def add(self, first_level: str, key: Hashable, now: float) -> None:
        """Remember this one for a minute. In excess the oldest of the same level is forgotten; over all, of the largest one."""
        mine = self._levels.setdefault(first_level, OrderedDict())
        mine[key] = now + KEPT_S
        mine.move_to_end(key)
        if len(mine) > self._per_level:
            mine.popitem(last=False)
        if len(self) > self._in_all:
            self._forget_old(now)
        if len(self) > self._in_all:
            largest = max(self._levels, key=lambda level: len(self._levels[level]))
            self._drop(largest, next(iter(self._levels[largest])))

    def take(self, first_level: str, key: Hashable, now: float) -> bool:
        """Whether a cancel came for this request within the last minute; asked once."""
        mine = self._levels.get(first_level)
        until = mine.get(key) if mine is not None else None
        if until is None:
            return False
        self._drop(first_level, key)
        return until > now

    def _forget_old(self, now: float) -> None:
        for level, keys in list(self._levels.items()):
            for key, until in list(keys.items()):
                if until > now:
                    break
                self._drop(level, key)

    def _drop(self, level: str, key: Hashable) -> None:
        del self._levels[level][key]
        if not self._levels[level]:
            del self._levels[level]
