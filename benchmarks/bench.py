"""What a case is given: the world to measure in, how much of it is wanted, and a place for its figures."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.direct import run_direct
from benchmarks.figures import Figure, median_of, percentile
from benchmarks.samples import Load
from benchmarks.world import Daemon, World

TOKENS = 200
"""Length of an answer, where a case does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same load, straight to the engine and then over the bus."""

    direct: Load
    bus: Load

    @property
    def ratio(self) -> float:
        return self.bus.tokens_per_s / self.direct.tokens_per_s


@dataclass(slots=True)
class Bench:
    """`quick` is for a look whether it works, not for figures."""

    world: World
    quick: bool
    figures: list[Figure] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    """By name, the percentiles 0 to 100 of a distribution, for the plots."""
    shared: dict[object, list[Pair]] = field(default_factory=dict)
    """Pairs that several cases look at."""

    def add(self, *figures: Figure) -> None:
        for figure in figures:
            self.figures.append(figure)
            verdict = {True: "ok", False: "missed", None: ""}[figure.met]
            self.tell(f"  {figure.name}: {figure.text} {figure.unit}  {figure.target}  {verdict}".rstrip())

    def median(self, case: str, name: str, values: Sequence[float], *, unit: str = "", target: str = "") -> None:
        self.add(median_of(case, name, values, unit=unit, target=target))

    def curve(self, name: str, values: Sequence[float]) -> None:
        self.curves[name] = [percentile(values, share / 100) for share in range(101)]

    def tell(self, line: str) -> None:
        """A line that stays."""
        self._wipe()
        print(line, flush=True)

    def rounds(self, name: str, count: int) -> Iterator[int]:
        """Numbers to count, with the progress on a terminal; fewer when it shall be quick."""
        count = min(count, 2) if self.quick else count
        started = time.monotonic()
        for number in range(count):
            if sys.stdout.isatty():
                left_s = (time.monotonic() - started) / number * (count - number) if number else 0.0
                rest = f", about {left_s:.0f} s left" if number else ""
                print(f"\r\033[K  {name}: {number + 1} of {count}{rest}", end="", flush=True)
            yield number
        self._wipe()

    def interleaved(
        self, name: str, daemon: Daemon, port: int, *, rounds: int, streams: int, requests: int, tokens: int = TOKENS,
        word: bytes = b"",
    ) -> list[Pair]:  # fmt: skip
        """Direct and bus in turn, so that what else the machine does falls on both; the first pair warms up."""
        run_direct(port, streams=streams, requests=1, max_tokens=tokens)
        daemon.run(streams=streams, requests=1, max_tokens=tokens)
        load: dict[str, Any] = {"streams": streams, "requests": requests, "max_tokens": tokens}
        return [
            Pair(run_direct(port, **load, word=word), daemon.run(**load, word=word)) for _ in self.rounds(name, rounds)
        ]

    @staticmethod
    def _wipe() -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="")


def spread_of(
    case: str,
    name: str,
    pairs: Sequence[Pair],
    value: Callable[[Sequence[Pair]], float],
    *,
    unit: str = "",
    target: str = "",
) -> Figure:
    """A value of all pairs together; the spread is that of the same value over resampled pairs (bootstrap)."""
    choose = random.Random(1)
    drawn = sorted(value(choose.choices(pairs, k=len(pairs))) for _ in range(200))
    count = sum(len(pair.bus.samples) for pair in pairs)
    return Figure(
        case=case, name=name, value=value(pairs), unit=unit, n=count, low=drawn[50], high=drawn[150], target=target
    )


def first_tokens_ms(pairs: Sequence[Pair]) -> tuple[list[float], list[float]]:
    """Of all requests: direct, bus."""
    return (
        [1e3 * sample.first_token_s for pair in pairs for sample in pair.direct.samples],
        [1e3 * sample.first_token_s for pair in pairs for sample in pair.bus.samples],
    )


def later_ms(share: float) -> Callable[[Sequence[Pair]], float]:
    """How much later this share of the first tokens comes over the bus."""

    def value(pairs: Sequence[Pair]) -> float:
        direct, bus = first_tokens_ms(pairs)
        return percentile(bus, share) - percentile(direct, share)

    return value


def plural(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"
