"""(m) what a long queue costs: those who come to it, those who wait in it, and the stream that goes on beside it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable

from benchmarks.bench import Bench
from benchmarks.bus import Bus
from benchmarks.figures import Figure, percentile
from benchmarks.samples import LoadFailed
from benchmarks.world import Daemon

WAITING = (100, 1_000, 10_000)
_QUICK = (100,)
_ANSWERED = 1_000
"""Of a longer queue the rest is left unanswered."""
_TOKENS_PER_S = 50.0
_CLIENTS = 50
_LOOK_S = 5.0


def long_queue(bench: Bench) -> None:
    """(m) a long queue, beside a stream of 50 tokens/s."""
    for waiting in _QUICK if bench.quick else WAITING:
        for _ in bench.rounds(f"{waiting} waiting", 1):
            with (
                bench.world.pace(_TOKENS_PER_S) as port,
                bench.world.daemon(
                    f"http://127.0.0.1:{port}",
                    engine__slots=1,
                    limits__queue_size=2 * WAITING[-1],
                    limits__queue_share=1.0,
                ) as daemon,
            ):
                bench.add(*_figures(daemon, waiting, look_s=0.5 if bench.quick else _LOOK_S))


def _figures(daemon: Daemon, waiting: int, *, look_s: float) -> list[Figure]:
    bus, which = daemon.bus, f"{waiting} waiting"

    def figure(name: str, value: float, unit: str, n: int = 1) -> Figure:
        return Figure(case="m", name=f"{name}, {which}", value=value, unit=unit, n=n)

    stream, _ = bus.ask("stream", "go on", max_tokens=7000)
    bus.until(lambda: len(bus.events(stream)) > 20, 30.0)
    beside = _Beside(bus, stream)
    began, cpu = time.monotonic(), daemon.cpu_s()
    asked = {bus.ask(f"u{n % _CLIENTS}/s{n}", "hello", max_tokens=1)[0] for n in range(waiting)}
    beside.until(lambda: asked <= beside.heard, 600.0)
    took, spent = time.monotonic() - began, daemon.cpu_s() - cpu
    found = [
        figure("until all have heard of it", took, "s"),
        figure("processor time of a newcomer", 1e3 * spent / waiting, "ms", waiting),
        figure("pause between two chunks beside, p99, while they come", beside.pause_ms(), "ms"),
    ]
    cpu, events = daemon.cpu_s(), beside.events
    ends_at = time.monotonic() + look_s
    beside.until(lambda: time.monotonic() > ends_at, 2 * look_s)
    found += [
        figure("processor", 100 * (daemon.cpu_s() - cpu) / look_s, "%"),
        figure("events a second", (beside.events - events) / look_s, "1/s"),
        figure("pause between two chunks beside, p99, while they wait", beside.pause_ms(), "ms"),
    ]
    if waiting <= _ANSWERED:
        cpu, events = daemon.cpu_s(), beside.events
        bus.tell("stream", action="cancel", request_id=stream)
        beside.until(lambda: asked <= beside.ended, 600.0)
        found += [
            figure("processor time of an answer", 1e3 * (daemon.cpu_s() - cpu) / waiting, "ms", waiting),
            figure("events of an answer", (beside.events - events) / waiting, "", waiting),
        ]
    return found


class _Beside:
    """Reads what comes, and forgets it: of thousands of requests it keeps only who has heard what."""

    def __init__(self, bus: Bus, stream: str) -> None:
        self._bus = bus
        self._stream = stream
        self._chunks: list[float] = []
        self.heard: set[str] = set()
        self.ended: set[str] = set()
        self.events = 0

    def until(self, held: Callable[[], bool], timeout_s: float) -> None:

        ends_at = time.monotonic() + timeout_s
        while not held():
            if time.monotonic() > ends_at:
                raise LoadFailed(f"not within {timeout_s:g} s; {len(self.heard)} were told something")
            self._bus.listen(0.05)
            for at, topic, payload in self._bus.received:
                if b"/reply/" in topic:
                    self._take(at, json.loads(payload))
            self._bus.received.clear()

    def _take(self, at: float, event: dict[str, object]) -> None:
        request_id = str(event.get("request_id"))
        if request_id == self._stream:
            if event["type"] == "chunk":
                self._chunks.append(at)
            return
        self.events += 1
        self.heard.add(request_id)
        if event.get("final"):
            if event["type"] != "done":
                raise LoadFailed(f"a request that waited ended with {event}")
            self.ended.add(request_id)

    def pause_ms(self) -> float:
        """The longest of a hundred pauses of the stream since the last look."""
        chunks, self._chunks = self._chunks, self._chunks[-1:]
        pauses = [1e3 * (later - earlier) for earlier, later in itertools.pairwise(chunks)]
        return percentile(pauses, 0.99)
