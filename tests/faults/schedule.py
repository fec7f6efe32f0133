"""What goes wrong, when, and to whom: made from a seed, and made smaller by leaving faults out (pure)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from typing_extensions import override

KINDS: dict[str, tuple[str, float, float]] = {
    # kind: what it happens to, shortest and longest time in seconds (0: it is over at once, a restart follows)
    "broker.kill": ("broker", 0.0, 1.0),
    "broker.term": ("broker", 0.0, 1.0),
    "broker.stop": ("broker", 0.3, 3.0),
    "broker.expire": ("daemon", 0.0, 0.3),
    "broker.queue": ("daemon", 0.3, 1.0),
    "engine.kill": ("engine", 0.0, 1.5),
    "engine.term": ("engine", 0.0, 1.0),
    "engine.stop": ("engine", 0.3, 5.0),
    "engine.hang": ("engine.net", 0.5, 5.0),
    "engine.garbage": ("engine.net", 0.5, 1.5),
    "engine.mid_line": ("engine.net", 0.5, 1.5),
    "engine.usage": ("engine.net", 0.5, 1.5),
    "engine.cut": ("engine.net", 0.0, 0.0),
    "daemon.kill": ("daemon", 0.0, 1.0),
    "daemon.term": ("daemon", 0.0, 0.5),
    "daemon.stop": ("daemon", 0.3, 4.0),
    "daemon.clock": ("clock", 0.5, 2.0),
    "client.kill": ("client", 0.0, 1.0),
    "client.term": ("client", 0.0, 1.0),
    "client.stop": ("client", 0.3, 4.0),
    "net.cut": ("daemon.net", 0.0, 0.0),
    "net.refuse": ("daemon.net", 0.3, 2.0),
    "net.silent": ("daemon.net", 0.5, 9.0),
    "net.delay": ("daemon.net", 0.5, 2.0),
    "net.bytewise": ("daemon.net", 0.3, 1.0),
    "net.slow": ("daemon.net", 0.5, 2.0),
    "net.eat_pubacks": ("daemon.net", 0.3, 1.5),
    "net.eat_all_pubacks": ("daemon.net", 1.0, 3.0),
    "net.double": ("daemon.net", 0.5, 1.5),
    "wire.cut": ("client.net", 0.0, 0.0),
    "wire.silent": ("client.net", 0.5, 9.0),
    "wire.bytewise": ("client.net", 0.3, 1.0),
    "wire.double": ("client.net", 0.5, 1.5),
    "disk.full": ("disk", 0.3, 2.0),
    "disk.lock": ("disk", 0.3, 2.0),
    "flood": ("flood", 0.3, 1.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, once this many requests were begun."""

    number: int
    kind: str
    after: int
    lasts_s: float
    choice: float
    """From 0 to 1: which client, how far the clock jumps."""
    alone: bool
    """Everything before it is over and recovered; else it may fall together with another."""

    @property
    def target(self) -> str:
        """What it happens to: no two faults of one target at a time."""
        return KINDS[self.kind][0]

    @override
    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.lasts_s:.1f} s"


def make(*, seed: int, requests: int, faults: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Fault]:
    """Faults spread evenly over the requests; each kind comes before any comes again."""
    chosen = random.Random(f"faults {seed}")
    order: list[str] = []
    while len(order) < faults:
        order += chosen.sample(sorted(kinds), len(kinds))
    made = []
    for number, kind in enumerate(order[:faults]):
        _, shortest, longest = KINDS[kind]
        # Short ones are more frequent: most of what breaks in time breaks at the edges.
        lasts_s = shortest + (longest - shortest) * chosen.random() ** 2
        after = int((number + chosen.random()) * requests * 0.9 / faults)
        alone = chosen.random() < 0.7
        made.append(Fault(number, kind, after, round(lasts_s, 2), chosen.random(), alone))
    return made


def shrink(faults: Sequence[Fault], fails: Callable[[Sequence[Fault]], bool]) -> list[Fault]:
    """The fewest of the faults that still fail, by delta debugging: leave out ever smaller parts as long as it fails."""
    left = list(faults)
    parts = 2
    while len(left) >= 2:
        size = -(-len(left) // parts)
        for start in range(0, len(left), size):
            rest = left[:start] + left[start + size :]
            if rest and fails(rest):
                left, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(left), parts * 2)
    return left
