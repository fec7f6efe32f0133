"""Who holds most of something that many share, found without a look at all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush, heapreplace

# A heap that grew so many times longer than it began is made anew: most of it tells of before.
_GROWN = 4
_SHORT = 64


class LargestHolder:
    """Pure. `names` gives all who hold something; `held` says how much it is just now, None where a name is no candidate.

    Nothing is kept before the first `find`: in a place that never fills, nobody has to be found.
    """

    def __init__(self, names: Callable[[], Iterable[str]], held: Callable[[str], int | None]) -> None:
        self._names = names
        self._held = held
        self._heap: list[tuple[int, str]] | None = None
        """What names held at some time, as negative numbers: of each at least one that is no less than what it holds now."""
        self._longest = 0

    def grown(self, name: str) -> None:
        """This one holds more than before, or is a candidate from now on. What is less needs no word."""
        if self._heap is None:
            return
        held = self._held(name)
        if held is None:
            return
        if len(self._heap) >= self._longest:
            self._heap = None
        else:
            heappush(self._heap, (-held, name))

    def find(self, *, but: str | None = None) -> str | None:
        """The name that holds most, apart from `but`; of equal ones the first in their order. None of none."""
        heap = self._heap
        if heap is None:
            heap = self._heap = [(-held, name) for name in self._names() if (held := self._held(name)) is not None]
            heapify(heap)
            self._longest = _GROWN * len(heap) + _SHORT
        aside: list[tuple[int, str]] = []
        found = None
        while heap and found is None:
            before, name = heap[0]
            held = self._held(name)
            if held is None:
                heappop(heap)
            elif held != -before:
                heapreplace(heap, (-held, name))
            elif name == but:
                aside.append(heappop(heap))
            else:
                found = name
        for each in aside[:1]:
            heappush(heap, each)
        return found
