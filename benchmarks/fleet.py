"""What more workers bring: `python -m benchmarks.fleet`, or `make fleet`.

Each worker has an engine of one slot and 50 ms a token, and more requests wait than all of them can run. Asked of one worker and then
of four: tokens a second, and how long a worker stood idle between two requests while others waited.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.bus_client import BusClient
from tests.support.daemon_process import DaemonProcess
from tests.support.mosquitto import Mosquitto
from tests.support.paced_server import PacedServer
from tests.support.postgres_server import PostgresServer

TOKENS_PER_S = 20.0
TOKENS = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """`idle_s`: between the end of a request and the start of the next on the same worker, both as the client saw them."""

    tokens_per_s: float
    idle_s: Sequence[float]


def measure(broker: Mosquitto, database: PostgresServer, folder: Path, *, workers: int, rounds: int) -> Measured:
    root = f"fleet{uuid.uuid4().hex[:8]}"
    engines = [PacedServer(TOKENS_PER_S) for _ in range(workers)]
    daemons = [
        DaemonProcess(
            folder / f"{root}-{number}",
            {
                "mqtt.port": broker.port,
                "mqtt.root": root,
                "mqtt.worker_id": f"w{number}",
                "engine.url": engine.url,
                "sessions.store": "postgres",
                "sessions.url": database.url,
                "pool.name": "fleet",
                "limits.queue_size": 4000,
                "limits.max_requests_per_minute": 0,
            },
        ).start()
        for number, engine in enumerate(engines)
    ]
    try:
        for daemon in daemons:
            daemon.wait_ready()
        return _load(broker.port, root, requests=workers * rounds)
    finally:
        for daemon in daemons:
            daemon.close()
        for engine in engines:
            engine.close()


def _load(port: int, root: str, *, requests: int) -> Measured:
    """All at once; what counts is the time while every worker has something to do."""
    starts: dict[str, list[float]] = {}
    ends: dict[str, list[float]] = {}
    on: dict[str, str] = {}
    with BusClient(port) as client:
        client.subscribe(f"{root}/reply/#")
        for number in range(requests):
            body = {"prompt": "go on", "request_id": f"r{number}", "max_tokens": TOKENS}
            client.publish(f"{root}/request/u{number % 40}/s{number}", json.dumps(body).encode())
        over = 0
        while over < requests:
            message = client.receive(60.0)
            now, event = time.monotonic(), json.loads(message.payload)
            if event["type"] == "start":
                on[event["request_id"]] = event["worker"]
                starts.setdefault(event["worker"], []).append(now)
            elif event.get("final"):
                assert event["type"] == "done", event
                ends.setdefault(on[event["request_id"]], []).append(now)
                over += 1
    # Without the beginning, when requests still came in, and the end, when not all have one.
    first = max(times[0] for times in starts.values())
    last = min(times[-1] for times in ends.values())
    done = sum(first < at <= last for times in ends.values() for at in times)
    idle = [
        start - end
        for worker, times in starts.items()
        for start, end in zip(times[1:], ends[worker], strict=False)
        if first < end and start <= last
    ]
    return Measured(done * TOKENS / (last - first), idle)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="requests for each worker")
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    broker, database = Mosquitto(folder / "broker").start(), PostgresServer(fsync=True).start()
    try:
        rates = {}
        for workers in (1, 2, 4):
            measured = measure(broker, database, folder, workers=workers, rounds=rounds)
            rates[workers] = measured.tokens_per_s
            idle_ms = sorted(1000 * each for each in measured.idle_s)
            print(
                f"{workers} worker{'s' * (workers > 1)}: {measured.tokens_per_s:.1f} tokens/s, "
                f"{measured.tokens_per_s / rates[1]:.2f} of one; idle between two requests: median "
                f"{statistics.median(idle_ms):.1f} ms, worst {idle_ms[-1]:.1f} ms of {len(idle_ms)}",
                flush=True,
            )
    finally:
        database.close()
        broker.close()


if __name__ == "__main__":
    main()
