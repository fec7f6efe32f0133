"""A bounded queue that is emptied in turn between first topic levels."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from math import inf
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served within a level, one of each level in turn: whoever has much waiting waits for himself.

    Pure; bounded in all and per level, or without bounds where its owner counts what it holds.
    """

    def __init__(self, *, per_level: float = inf, in_all: float = inf) -> None:
        self._per_level = per_level
        self._in_all = in_all
        self._levels: OrderedDict[str, deque[T]] = OrderedDict()
        self._in_it = 0

    def __len__(self) -> int:
        return self._in_it

    def __iter__(self) -> Iterator[T]:
        """All items, by level."""
        for items in self._levels.values():
            yield from items

    def has_place(self, level: str) -> bool:
        return len(self._levels.get(level, ())) < self._per_level and self._in_it < self._in_all

    def put(self, level: str, item: T) -> bool:
        """Add the item; False when the level, or the queue, has no place for it."""
        if not self.has_place(level):
            return False
        self._levels.setdefault(level, deque()).append(item)
        self._in_it += 1
        return True

    def take(self) -> T | None:
        """The oldest item of the level whose turn it is; None when there is none."""
        if not self._levels:
            return None
        level, items = self._levels.popitem(last=False)
        item = items.popleft()
        self._in_it -= 1
        if items:
            self._levels[level] = items
        return item

    def clear(self) -> None:
        self._levels.clear()
        self._in_it = 0
