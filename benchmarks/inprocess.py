"""(h) the model inside the worker, over the bus, against llama-cpp-python in a program of its own, in turn."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bare import SAMPLING
from benchmarks.bench import TOKENS, Bench
from benchmarks.samples import LoadFailed, prompt
from benchmarks.world import ROOT

_N_CTX = 2048
_WAYS = {"chat": "create_chat_completion", "generate": "Llama.generate"}


def in_process(bench: Bench) -> None:
    """(h) in process, against llama-cpp-python used bare."""
    settings: dict[str, Any] = {
        "engine__kind": "inprocess",
        "engine__model_path": str(bench.world.model),
        "engine__threads": 1,
        "engine__context_tokens": _N_CTX,
        **{f"generation__{name}": value for name, value in SAMPLING.items()},
    }
    ratios: dict[str, list[float]] = {way: [] for way in _WAYS}
    bus = []
    with _bare(bench.world.model) as bare, bench.world.daemon(None, **settings) as daemon:
        for way in _WAYS:
            _tokens_per_s(bare, way)
        daemon.run(streams=1, requests=3, max_tokens=TOKENS)
        for _ in bench.rounds("in process", 15):
            for way in _WAYS:
                alone = [_tokens_per_s(bare, way) for _ in range(5)]
                load = daemon.run(streams=1, requests=5, max_tokens=TOKENS)
                bus.append(load.tokens_per_s)
                ratios[way].append(load.tokens_per_s / (sum(alone) / len(alone)))
    for way, name in _WAYS.items():
        # The way of llama-cpp-python's own README does what the worker does; the loop below it neither stops nor tells anything.
        target = ">= 0.98" if way == "chat" else ""
        bench.median("h", f"tokens/s, bus / bare {name}", ratios[way], target=target)
    bench.median("h", "tokens/s over the bus", bus, unit="tokens/s")


@contextlib.contextmanager
def _bare(model: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.bare", str(model), str(_N_CTX)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            if _line(process) != "ready\n":
                raise LoadFailed("llama-cpp-python did not start; is it installed (make inprocess)?")
            yield process
        finally:
            process.kill()


def _tokens_per_s(process: subprocess.Popen[str], way: str) -> float:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"prompt": prompt(), "max_tokens": TOKENS, "way": way}) + "\n")
    process.stdin.flush()
    answer = json.loads(_line(process))
    return float(answer["tokens"] / answer["seconds"])


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
