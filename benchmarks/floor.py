"""(k) what this machine and Python allow: a bare relay that does the least there is to do, in turn with the daemon and direct."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.bench import TOKENS, Bench, plural
from benchmarks.direct import run_direct
from benchmarks.figures import percentile
from benchmarks.samples import Load

_PAUSE_S = 0.02
"""What the daemon pauses between two chunks of an engine as quick as this one: a relay with more chunks would cost more for them."""

_JOURNALED = "relay with checks and journal"

_FEW = 20
"""Tokens of a short answer, where a request costs more than its chunks."""


def floor(bench: Bench) -> None:
    """(k) a bare relay in Python, the least that a worker could cost, and one that checks and journals as the protocol asks."""
    llama = bench.world.llama
    with (
        bench.world.daemon(llama.url) as daemon,
        bench.world.relay(llama.port, pause_s=_PAUSE_S) as relay,
        bench.world.relay(llama.port, pause_s=_PAUSE_S, doing="checks") as checked,
        bench.world.relay(llama.port, pause_s=_PAUSE_S, doing="journal") as journaled,
        bench.world.daemon(llama.url, streaming__coalesce_min_s=0) as uncoalesced,
        bench.world.relay(llama.port, pause_s=0.0) as uncoalesced_relay,
        bench.world.relay(llama.port, pause_s=0.0, doing="journal") as uncoalesced_journaled,
    ):
        for streams in (1, 8):
            name = plural(streams)
            load: dict[str, Any] = {"streams": streams, "requests": 6 if streams == 1 else 4, "max_tokens": TOKENS}
            ways: dict[str, Callable[[], Load]] = {
                "direct": partial(run_direct, llama.port, **load),
                "relay": partial(relay.run, **load),
                "relay with the checks": partial(checked.run, **load),
                _JOURNALED: partial(journaled.run, **load),
                "daemon": partial(daemon.run, **load),
            }
            loads: dict[str, list[Load]] = {way: [] for way in ways}
            for run in ways.values():
                run()
            for _ in bench.rounds(name, 32):
                for way, run in ways.items():
                    loads[way].append(run())
            for way in ("relay", "daemon"):
                pairs = zip(loads[way], loads["direct"], strict=True)
                bench.median(
                    "k",
                    f"tokens/s, {way} / direct, {name}",
                    [one.tokens_per_s / bare.tokens_per_s for one, bare in pairs],
                )
            for way in ("relay", "relay with the checks", _JOURNALED, "daemon"):
                for share, label in ((0.5, "p50"), (0.99, "p99")):
                    later = _first_ms(loads[way], share) - _first_ms(loads["direct"], share)
                    bench.median("k", f"first token later, {label}, {way}, {name}", [later], unit="ms")
            for way in ("relay", _JOURNALED, "daemon"):
                each = [1e6 * one.daemon_cpu_s / one.tokens for one in loads[way]]
                bench.median("k", f"processor time per token, {way}, {name}", each, unit="us")
            of_chunks = {
                "relay": uncoalesced_relay.run,
                _JOURNALED: uncoalesced_journaled.run,
                "daemon": uncoalesced.run,
            }
            _uncoalesced(bench, name, of_chunks, streams)


def _uncoalesced(bench: Bench, name: str, ways: Mapping[str, Callable[..., Load]], streams: int) -> None:
    """The processor time of a chunk that carries one token, and how much of it is the request's: what short answers cost."""
    loads: dict[tuple[str, int], list[Load]] = {(way, tokens): [] for way in ways for tokens in (_FEW, TOKENS)}
    for _ in bench.rounds(f"uncoalesced, {name}", 16):
        for (way, tokens), done in loads.items():
            done.append(ways[way](streams=streams, requests=2 * TOKENS // tokens, max_tokens=tokens))
    for way in ways:
        each = [1e6 * one.daemon_cpu_s / one.chunks for one in loads[way, TOKENS]]
        bench.median("k", f"processor time per uncoalesced chunk, {way}, {name}", each, unit="us")
    for way in ways:
        each = [1e6 * one.daemon_cpu_s / len(one.samples) for one in loads[way, _FEW]]
        bench.median("k", f"processor time per answer of {_FEW} tokens, {way}, {name}", each, unit="us")


def _first_ms(loads: Sequence[Load], share: float) -> float:
    return percentile([1e3 * sample.first_token_s for load in loads for sample in load.samples], share)
