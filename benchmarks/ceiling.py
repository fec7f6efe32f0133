"""(d) how much the daemon takes in from an engine that says all at once, and whether anything piles up meanwhile."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import TOKENS, Bench, plural
from benchmarks.world import Daemon

_LOAD = {1: 200, 8: 100, 64: 16, 256: 4}
"""Requests of each stream, by the number of streams: a second or two of work."""


def ceiling(bench: Bench) -> None:
    """(d) an engine that takes no time."""
    with bench.world.pace(0) as port:
        url = f"http://127.0.0.1:{port}"
        with bench.world.daemon(url, status__health_every_s=1) as daemon:
            for streams, requests in _LOAD.items():
                _run(bench, daemon, "tokens", streams, requests, target=">= 100000" if streams == 64 else "")
            _at_rest(bench, daemon, "tokens")
        # Every token a chunk of its own: the engine's tokens have five characters. An answer is cut into its chunks in one go, so
        # that the events of all streams wait for the broker at once: more than the outbox holds by default.
        cut: dict[str, Any] = {
            "streaming__coalesce_min_s": 0,
            "streaming__coalesce_max_chars": 5,
            "mqtt__outbox_messages": 100_000,
        }
        with bench.world.daemon(url, status__health_every_s=1, **cut) as daemon:
            for streams, requests in _LOAD.items():
                target = ">= 10000" if streams == 64 else ""
                _run(bench, daemon, "chunks", streams, max(1, requests // 4), target=target)
            _at_rest(bench, daemon, "chunks")


def _run(bench: Bench, daemon: Daemon, what: str, streams: int, requests: int, *, target: str) -> None:
    requests = max(1, requests // 20) if bench.quick else requests
    name = f"{what}/s, {plural(streams)}"
    daemon.run(streams=streams, requests=1, max_tokens=TOKENS)
    loads = [daemon.run(streams=streams, requests=requests, max_tokens=TOKENS) for _ in bench.rounds(name, 5)]
    per_s = [(load.tokens if what == "tokens" else load.chunks) / load.seconds for load in loads]
    bench.median("d", name, per_s, unit=f"{what}/s", target=target)
    cpu = [1e3 * load.daemon_cpu_s / len(load.samples) for load in loads]
    bench.median("d", f"processor time of a request of {TOKENS} {what}, {plural(streams)}", cpu, unit="ms")
    growth = daemon.rss_mib()
    again = daemon.run(streams=streams, requests=requests, max_tokens=TOKENS)
    assert again.tokens == loads[-1].tokens
    bench.median("d", f"memory more after as much again, {name}", [daemon.rss_mib() - growth], unit="MiB")


def _at_rest(bench: Bench, daemon: Daemon, what: str) -> None:
    """A second after the load nothing may wait, neither for the broker nor for a slot."""
    daemon.bus.received.clear()
    daemon.bus.listen(2.5)
    left = [message["unacknowledged"] + message["queue"] for message in daemon.bus.told("health")]
    bench.median("d", f"requests and events still waiting, {what}", left[-1:], target="<= 0")
