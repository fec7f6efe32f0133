"""What goes wrong, when, and to whom: made from a seed, and made smaller by leaving faults out (pure)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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

# The same for a pool of workers. Each worker is a target of its own, and so are its connections to broker, database and engine.
POOL_KINDS: dict[str, tuple[str, float, float]] = {
    "worker.kill": ("worker", 0.0, 5.0),
    "worker.term": ("worker", 3.0, 5.0),
    "worker.stop": ("worker", 0.3, 9.0),
    "worker.clock": ("worker clock", 0.5, 2.0),
    "database.kill": ("database", 0.0, 2.0),
    "database.restart": ("database", 0.0, 2.0),
    "database.silent": ("database", 0.5, 8.0),
    "data.cut": ("worker data", 0.0, 0.0),
    "data.refuse": ("worker data", 0.5, 8.0),
    "data.silent": ("worker data", 0.5, 12.0),
    "data.slow": ("worker data", 0.5, 3.0),
    "net.cut": ("worker net", 0.0, 0.0),
    "net.refuse": ("worker net", 0.3, 5.0),
    "net.silent": ("worker net", 0.5, 9.0),
    "net.slow": ("worker net", 0.5, 2.0),
    "net.double": ("worker net", 0.5, 1.5),
    "net.eat_pubacks": ("worker net", 0.3, 1.5),
    "line.hang": ("worker line", 0.5, 5.0),
    "line.garbage": ("worker line", 0.5, 1.5),
    "line.mid_line": ("worker line", 0.5, 1.5),
    "line.cut": ("worker line", 0.0, 0.0),
    **{
        kind: KINDS[kind]
        for kind in ("broker.kill", "broker.term", "broker.stop", "engine.kill", "engine.term", "engine.stop")
    },
    **{
        kind: KINDS[kind]
        for kind in ("client.kill", "client.term", "client.stop", "wire.cut", "wire.silent", "wire.double")
    },
}
OFTEN = ("worker.kill", "worker.kill", "worker.stop", "worker.stop")
"""These come three times as often as the others: what follows them is what a pool is for."""

WORKERS = 4
"""Of the pool."""


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
    target: str
    """What it happens to: no two faults of one target at a time."""

    @property
    def worker(self) -> int:
        """Of a pool: which one."""
        return min(int(self.choice * WORKERS), WORKERS - 1)

    @override
    def __str__(self) -> str:
        return f"{self.number} {self.kind} {self.lasts_s:.1f} s"


def make(
    *, seed: int, requests: int, faults: int, kinds: Sequence[str] = (), pool: bool = False, alone: float = 0.7
) -> list[Fault]:
    """Faults spread evenly over the requests; each kind comes before any comes again. `alone` is the share of those that come alone."""
    known = POOL_KINDS if pool else KINDS
    kinds = kinds or (*known, *(OFTEN if pool else ()))
    chosen = random.Random(f"faults {seed}")
    order: list[str] = []
    while len(order) < faults:
        order += chosen.sample(sorted(kinds), len(kinds))
    made = []
    for number, kind in enumerate(order[:faults]):
        target, shortest, longest = known[kind]
        # Short ones are more frequent: most of what breaks in time breaks at the edges.
        lasts_s = shortest + (longest - shortest) * chosen.random() ** 2
        after = int((number + chosen.random()) * requests * 0.9 / faults)
        by_itself = chosen.random() < alone
        choice = chosen.random()
        fault = Fault(number, kind, after, round(lasts_s, 2), choice, by_itself, target)
        if target.startswith("worker"):
            fault = replace(fault, target=f"{target} {fault.worker}")
        made.append(fault)
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
