"""(l) what HTTP costs beside MQTT: the same load over the bus and through the gateway, in turn, in front of one llama.cpp server."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import TOKENS, Bench, Pair, first_tokens_ms, later_ms, plural, spread_of
from benchmarks.direct import run_direct
from benchmarks.samples import Load
from benchmarks.world import Daemon, GatewayInFront

_FIRST_TARGETS = {1: "<= 3"}
_SPEED_TARGETS = {8: ">= 0.9"}


def through_gateway(bench: Bench) -> None:
    """(l) through the gateway, beside MQTT."""
    # Two workers, so that the broker sends no answer to the reader of the other way too.
    llama = bench.world.llama
    with bench.world.daemon(llama.url) as daemon, bench.world.gateway(llama.url) as gateway:
        for streams in (1, 8):
            _tell(bench, streams, _pairs(bench, daemon, gateway, streams))


def _pairs(bench: Bench, daemon: Daemon, gateway: GatewayInFront, streams: int) -> list[Pair]:
    """MQTT stands where else the engine alone does: it is what the gateway is compared to."""
    load: dict[str, Any] = {"streams": streams, "requests": 6 if streams == 1 else 4, "max_tokens": TOKENS}

    def through() -> Load:
        before = gateway.cpu_s()
        result = run_direct(gateway.port, **load)
        result.daemon_cpu_s = gateway.cpu_s() - before
        return result

    daemon.run(**load)
    through()
    return [Pair(daemon.run(**load), through()) for _ in bench.rounds(plural(streams), 30)]


def _tell(bench: Bench, streams: int, pairs: list[Pair]) -> None:
    name = plural(streams)
    bench.median("l", f"tokens/s, gateway / MQTT, {name}", [pair.ratio for pair in pairs],
                 target=_SPEED_TARGETS.get(streams, ""))  # fmt: skip
    bench.median("l", f"tokens/s by MQTT, {name}", [pair.direct.tokens_per_s for pair in pairs], unit="tokens/s")
    bench.median("l", f"tokens/s through the gateway, {name}", [pair.bus.tokens_per_s for pair in pairs],
                 unit="tokens/s")  # fmt: skip
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        target = _FIRST_TARGETS.get(streams, "") if share == 0.5 else ""
        later = f"first token through the gateway later, {label}, {name}"
        bench.add(spread_of("l", later, pairs, later_ms(share), unit="ms", target=target))
    mqtt, http = first_tokens_ms(pairs)
    bench.median("l", f"first token by MQTT, {name}", mqtt, unit="ms")
    bench.median("l", f"first token through the gateway, {name}", http, unit="ms")
    each = [1e6 * pair.bus.daemon_cpu_s / pair.bus.tokens for pair in pairs]
    bench.median("l", f"processor time of the gateway per token, {name}", each, unit="us")
