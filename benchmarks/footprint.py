"""(f) start, memory and what the journal costs: on the disk that holds the temporary files, and in memory (tmpfs)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench import TOKENS, Bench
from benchmarks.samples import prompt
from benchmarks.world import file_system
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore

_MEMORY = Path("/dev/shm")
_SESSIONS = 10_000


def footprint(bench: Bench) -> None:
    """(f) start, memory, journal."""
    _start(bench)
    _memory(bench)
    _journal(bench)


def _start(bench: Bench) -> None:
    """From the start of the process to its `online`, as a client hears it; the worker has run before."""
    seconds = []
    folder = bench.world.folder / "again"
    for _ in bench.rounds("start", 11):
        with bench.world.daemon(bench.world.llama.url, folder=folder) as daemon:
            daemon.bus.until(lambda: daemon.online_at() is not None, 30.0)
            seconds.append((daemon.online_at() or 0.0) - daemon.process.started_at)
    bench.median("f", "exec to `online`", seconds[1:], unit="s", target="<= 0.45")


def _imports_mib() -> float:
    """Resident memory of a Python that has only imported what the worker stands on."""
    names = "pydantic_settings, paho.mqtt.client, requests, tenacity, structlog, orjson, regex, sqlite3, click"
    # As the daemon does: without what structlog would load for tracebacks in colour.
    code = f"import sys; sys.modules['rich'] = None; import {names}; print(open('/proc/self/smaps_rollup').read())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30).stdout
    return int(next(line for line in text.splitlines() if line.startswith("Rss:")).split()[1]) / 1024


def _memory(bench: Bench) -> None:
    bench.median("f", "memory of Python with the same packages imported (RSS)", [_imports_mib()], unit="MiB")
    with bench.world.daemon(bench.world.llama.url) as daemon:
        daemon.bus.listen(2.0)
        bench.median("f", "memory idle (RSS)", [daemon.memory_mib("Rss")], unit="MiB", target="<= 46")
        bench.median("f", "memory idle (PSS)", [daemon.memory_mib("Pss")], unit="MiB")
        for _ in bench.rounds("8 streams", 5):
            daemon.run(streams=8, requests=5, max_tokens=TOKENS)
        bench.median("f", "memory after 8 streams (RSS)", [daemon.memory_mib("Rss")], unit="MiB")
    sessions = _SESSIONS // 50 if bench.quick else _SESSIONS
    folder = bench.world.folder / "sessions"
    settings: dict[str, Any] = {"sessions__max_sessions": 2 * _SESSIONS}
    with bench.world.pace(0) as port:
        url = f"http://127.0.0.1:{port}"
        with bench.world.daemon(url, folder=folder, **settings) as daemon:
            daemon.run(streams=64, requests=5, max_tokens=20)
            before = daemon.memory_mib("Rss")
            daemon.run(
                streams=50,
                requests=sessions // 50,
                max_tokens=20,
                session=lambda stream, left: f"n{stream}-{left}",
                new=False,
            )
            made = daemon.memory_mib("Rss") - before
        bench.median("f", f"memory for {sessions} sessions made (RSS)", [made], unit="MiB", target="<= 10")
        with bench.world.daemon(url, folder=folder, **settings) as daemon:
            daemon.bus.listen(2.0)
            bench.median("f", f"memory idle with {sessions} sessions (RSS)", [daemon.memory_mib("Rss")], unit="MiB")


def _journal(bench: Bench) -> None:
    with tempfile.TemporaryDirectory(prefix="lmd-bench-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        folders = {f"disk ({file_system(bench.world.folder)})": bench.world.folder / "journal", "memory": Path(name)}
        for place, folder in folders.items():
            folder.mkdir(exist_ok=True)
            bench.median("f", f"commit of an accepted request, {place}", list(_commits_us(folder / "s.db")), unit="us")
        first: dict[str, list[float]] = {place: [] for place in folders}
        url = bench.world.llama.url
        disk, memory = folders.values()
        with bench.world.daemon(url, folder=disk / "w") as one, bench.world.daemon(url, folder=memory / "w") as other:
            for daemon in (one, other):
                daemon.run(streams=1, requests=5, max_tokens=20)
            for _ in bench.rounds("journal on disk and in memory", 20):
                for place, daemon in zip(first, (one, other), strict=True):
                    load = daemon.run(streams=1, requests=10, max_tokens=20)
                    first[place].extend(1e3 * sample.first_token_s for sample in load.samples)
        for place, values in first.items():
            bench.median("f", f"first token, 1 stream, journal on {place}", values, unit="ms")


def _commits_us(path: Path) -> Iterator[float]:
    """One request after another, each its own commit: the cost of durability without any company."""
    store = SqliteStore(path)
    store.open()
    try:
        for number in range(200):
            key = EntryKey(route="default", session="bench", request_id=f"r{number}")
            entry = Entry(
                key=key,
                topic="llm/request/bench",
                payload=prompt(40).encode(),
                digest="0" * 64,
                accepted_at=time.time(),
            )
            started = time.perf_counter()
            store.accept([entry])
            yield 1e6 * (time.perf_counter() - started)
    finally:
        store.close()
