"""(i) where users live: an engine that says 20, 50 or 200 tokens a second in each of 8 streams, direct and over the bus."""

from __future__ import annotations

from benchmarks.bench import TOKENS, Bench, Pair, plural
from benchmarks.figures import percentile
from benchmarks.samples import Sample

_STREAMS = 8


def paced(bench: Bench) -> None:
    """(i) an engine with the pace of a real model."""
    for pace in (20, 50, 200):
        tokens = pace // 2 if bench.quick else TOKENS
        name = f"{pace} tokens/s, {plural(_STREAMS)}"
        with bench.world.pace(pace) as port, bench.world.daemon(f"http://127.0.0.1:{port}") as daemon:
            pairs = bench.interleaved(
                name, daemon, port, rounds=6, streams=_STREAMS, requests=1, tokens=tokens, word=b"word"
            )
        target = ">= 0.995" if pace == 50 else ""
        bench.median("i", f"tokens/s, bus / direct, {name}", [pair.ratio for pair in pairs], target=target)
        for way in ("direct", "bus"):
            late = lateness_ms(pairs, way, 1 / pace)
            bench.median("i", f"a token late, p50, {way}, {name}", [percentile(late, 0.5)], unit="ms")
            bench.median("i", f"a token late, p99, {way}, {name}", [percentile(late, 0.99)], unit="ms")
            bench.curve(f"i {way} {pace}", late)


def lateness_ms(pairs: list[Pair], way: str, pause_s: float) -> list[float]:
    """How long after its time each token came: the n-th is due n pauses after the request was sent."""
    samples: list[Sample] = [sample for pair in pairs for sample in getattr(pair, way).samples]
    assert all(len(sample.arrivals) == sample.tokens for sample in samples), "a token was not counted"
    return [
        1e3 * (at - sample.asked - number * pause_s)
        for sample in samples
        for number, at in enumerate(sample.arrivals, 1)
    ]
