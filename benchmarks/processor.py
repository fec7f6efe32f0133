"""(c) the processor time of the daemon, per token and per chunk: both MQTT versions, both qualities of service."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.bench import TOKENS, Bench, plural
from benchmarks.samples import Load

_VARIANTS = (("5", 1), ("5", 0), ("3.1.1", 1), ("3.1.1", 0))


def cost(bench: Bench) -> None:
    """(c) processor time of the daemon."""
    for protocol, qos in _VARIANTS:
        with bench.world.daemon(bench.world.llama.url, protocol=protocol, qos=qos) as daemon:
            for streams in (1, 8):
                name = f"MQTT {protocol}, QoS {qos}, {plural(streams)}"
                loads = _loads(bench, name, daemon.run, streams)
                bench.median("c", f"per token, {name}", [_us(load) / load.tokens for load in loads],
                             unit="us", target="<= 22")  # fmt: skip
                bench.median("c", f"per chunk, {name}", [_us(load) / load.chunks for load in loads], unit="us")
    with bench.world.daemon(bench.world.llama.url, streaming__coalesce_min_s=0) as daemon:
        for streams in (1, 8):
            name = f"uncoalesced, QoS 1, {plural(streams)}"
            loads = _loads(bench, name, daemon.run, streams)
            bench.median("c", f"per chunk, {name}", [_us(load) / load.chunks for load in loads],
                         unit="us", target="<= 90")  # fmt: skip
            bench.median("c", f"tokens in a chunk, {name}", [load.tokens / load.chunks for load in loads])


def _loads(bench: Bench, name: str, run: Callable[..., Load], streams: int) -> list[Load]:
    run(streams=streams, requests=2, max_tokens=TOKENS)
    requests = 10 if streams == 1 else 5
    return [run(streams=streams, requests=requests, max_tokens=TOKENS) for _ in bench.rounds(name, 8)]


def _us(load: Load) -> float:
    return 1e6 * load.daemon_cpu_s
