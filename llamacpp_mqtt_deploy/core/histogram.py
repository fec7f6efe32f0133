"""A histogram as Prometheus has it: how many values there were up to each bound, and their sum."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

REQUEST_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""For first tokens and whole answers: from a cached prompt on a GPU to a long answer on a small board."""

COMMIT_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
"""For writes to a disk: from memory to an SD card that collects garbage."""


@dataclass(frozen=True, slots=True)
class HistogramReading:
    """`cumulative[i]` values were at most `bounds[i]`; the last of `cumulative` counts all of them."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return self.cumulative[-1]


class Histogram:
    """One thread at a time may `observe`; any may `read` meanwhile, and then misses at most the value that just comes."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> HistogramReading:
        return HistogramReading(self._bounds, tuple(accumulate(self._counts)), self._sum)
