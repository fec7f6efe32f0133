"""What a start costs: printed (`pytest -s`) and recorded, not judged, because machines differ."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.engine]


def test_a_start_is_quick_and_small(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
    record_property: Callable[[str, object], None],
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    starts = []
    for life in range(3):
        worker = start_worker(broker.port, llama_server.url, ready=False)
        starts.append(worker.wait_ready())
        idle = worker.rss_bytes() / 2**20
        threads = len(list(Path(f"/proc/{worker.process.pid}/task").iterdir()))
        watcher.ask("s", "hello", request_id=f"r{life}", max_tokens=20)
        watcher.terminal(f"r{life}")
        after = worker.rss_bytes() / 2**20
        assert worker.stop() == 0
        figures = (
            f"ready after {starts[-1]:.2f} s, {threads} threads, {idle:.1f} MiB idle, {after:.1f} MiB after one answer"
        )
        record_property(f"start-{life}", figures)
        print(f"\n{figures}")
    # Not a figure but a guard: a start that imports a model's library, or waits for nothing, is a defect.
    assert min(starts) < 15


def test_the_daemon_loads_no_library_that_it_does_not_use(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    record_property: Callable[[str, object], None],
) -> None:
    broker = start_mosquitto()
    worker = start_worker(broker.port, llama_server.url, environment={"PYTHONPROFILEIMPORTTIME": "1"})
    rows = [
        (int(cumulative), name.strip())
        for cumulative, name in re.findall(r"import time:\s+\d+ \|\s+(\d+) \|(.*)", worker.log_text())
    ]
    dearest = sorted(rows, reverse=True)[:20]
    record_property("imports", str(dearest))
    print("\n" + "\n".join(f"{microseconds / 1000:8.1f} ms  {name}" for microseconds, name in dearest))
    names = {name for _, name in rows}
    assert "paho.mqtt.client" in names
    assert not names & {"numpy", "rich.console", "xllamacpp", "llama_cpp", "amqtt", "gguf", "jsonschema"}
