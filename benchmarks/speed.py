"""(a) tokens a second and (b) the first token, over the bus and straight from the same llama.cpp server, in turn."""

from __future__ import annotations

from benchmarks.bench import Bench, Pair, first_tokens_ms, later_ms, plural, spread_of
from benchmarks.figures import percentile

_A_TARGETS = {1: ">= 0.97", 8: ">= 0.97"}
_B_TARGETS = {(1, 0.5): "<= 1.2", (8, 0.5): "<= 3", (1, 0.99): "<= 5"}


def throughput(bench: Bench) -> None:
    """(a) tokens/s over the bus / direct."""
    for streams in (1, 2, 4, 8):
        pairs = _pairs(bench, streams)
        name = plural(streams)
        bench.median("a", f"tokens/s, bus / direct, {name}", [pair.ratio for pair in pairs],
                     target=_A_TARGETS.get(streams, ""))  # fmt: skip
        bench.median("a", f"tokens/s direct, {name}", [pair.direct.tokens_per_s for pair in pairs], unit="tokens/s")
        bench.median("a", f"tokens/s over the bus, {name}", [pair.bus.tokens_per_s for pair in pairs], unit="tokens/s")


def first_token(bench: Bench) -> None:
    """(b) first token later than direct."""
    for streams in (1, 8):
        pairs = _pairs(bench, streams)
        direct, bus = first_tokens_ms(pairs)
        for share, label in ((0.5, "p50"), (0.99, "p99")):
            name = f"first token later, {label}, {plural(streams)}"
            target = _B_TARGETS.get((streams, share), "")
            bench.add(spread_of("b", name, pairs, later_ms(share), unit="ms", target=target))
        bench.median("b", f"first token direct, {plural(streams)}", direct, unit="ms")
        bench.median("b", f"first token over the bus, {plural(streams)}", bus, unit="ms")
        bench.curve(f"b direct {streams}", direct)
        bench.curve(f"b bus {streams}", bus)
        bench.tell(f"  (p90 direct {percentile(direct, 0.9):.1f} ms, over the bus {percentile(bus, 0.9):.1f} ms)")


def _pairs(bench: Bench, streams: int) -> list[Pair]:
    """The loads that (a) and (b) share: 60 pairs where both look, some seconds each way, 30 else."""
    key = ("speed", streams)
    if key not in bench.shared:
        llama = bench.world.llama
        with bench.world.daemon(llama.url) as daemon:
            bench.shared[key] = bench.interleaved(
                plural(streams),
                daemon,
                llama.port,
                rounds=60 if streams in (1, 8) else 30,
                streams=streams,
                requests=6 if streams == 1 else 4,
            )
    return bench.shared[key]
