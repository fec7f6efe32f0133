"""Cancels that came before their request, bounded per first topic level."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from llamacpp_mqtt_deploy.core.largest_holder import LargestHolder

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
        self._levels: dict[str, OrderedDict[Hashable, None]] = {}
        """The keys of each level, and of all, those first that were told first."""
        self._until: OrderedDict[tuple[str, Hashable], float] = OrderedDict()
        self._largest = LargestHolder(lambda: self._levels, lambda level: len(self._levels.get(level, ())) or None)

    def __len__(self) -> int:
        return len(self._until)

    def add(self, first_level: str, key: Hashable, now: float) -> None:
        """Remember this one for a minute. In excess the oldest of the same level is forgotten; over all, of the largest one."""
        self._drop(first_level, key)
        mine = self._levels.setdefault(first_level, OrderedDict())
        mine[key] = None
        self._until[first_level, key] = now + KEPT_S
        self._largest.grown(first_level)
        if len(mine) > self._per_level:
            self._drop_oldest(first_level)
        if len(self) > self._in_all:
            self._forget_old(now)
        if len(self) > self._in_all:
            largest = self._largest.find()
            assert largest is not None
            self._drop_oldest(largest)

    def take(self, first_level: str, key: Hashable, now: float) -> bool:
        """Whether a cancel came for this request within the last minute; asked once."""
        until = self._drop(first_level, key)
        return until is not None and until > now

    def _forget_old(self, now: float) -> None:
        while self._until:
            (first_level, key), until = next(iter(self._until.items()))
            if until > now:
                return
            self._drop(first_level, key)

    def _drop_oldest(self, first_level: str) -> None:
        self._drop(first_level, next(iter(self._levels[first_level])))

    def _drop(self, first_level: str, key: Hashable) -> float | None:
        """Forget it, and say until when it would have been kept; None when it is not there."""
        until = self._until.pop((first_level, key), None)
        if until is not None:
            mine = self._levels[first_level]
            del mine[key]
            if not mine:
                del self._levels[first_level]
        return until
