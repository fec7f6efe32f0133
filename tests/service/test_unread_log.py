"""The real worker, with its log in a pipe that nobody reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.conftest import Watch
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.engine]


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that takes not one byte more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n" * 4096)
    os.set_blocking(writer, True)
    yield writer
    os.close(writer)
    os.close(reader)


def test_a_worker_whose_log_nobody_reads_starts_answers_and_stops(
    full_pipe: int, tmp_path: Path, start_mosquitto: Callable[..., Mosquitto], llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = DaemonProcess(
        tmp_path / "w1", {"mqtt__port": broker.port, "engine__url": llama_server.url}, stderr=full_pipe
    )
    with contextlib.closing(worker.start()):
        worker.wait_ready()
        for name in ("r1", "r2"):
            watcher.ask("kitchen", "one", request_id=name, max_tokens=4)
            assert watcher.terminal(name)["type"] == "done"
        assert worker.stop(20) == 0
