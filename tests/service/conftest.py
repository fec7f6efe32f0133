"""Workers as real processes, with watchers of the bus; all of it ends with the test, and the logs are looked through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.watcher import Watcher
from tests.support.daemon_process import DaemonProcess

StartWorker = Callable[..., DaemonProcess]
Watch = Callable[..., Watcher]


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Start a worker: `start_worker(broker.port, server.url, limits__queue_size=3)`; `folder` names its state's folder.

    It is waited for until systemd would hear READY=1, unless `ready=False`.
    """
    workers: list[DaemonProcess] = []

    def start(
        port: int,
        engine_url: str,
        *,
        folder: str = "w1",
        ready: bool = True,
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> DaemonProcess:
        base: dict[str, Any] = {"mqtt__port": port, "engine__url": engine_url}
        worker = DaemonProcess(tmp_path / folder, base | settings, environment=environment)
        workers.append(worker)
        worker.start()
        if ready:
            worker.wait_ready()
        return worker

    yield start
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.check_log()


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Watch the bus at a port: `watch(broker.port, version="3.1.1")`."""
    watchers: list[Watcher] = []

    def start(port: int, **wishes: Any) -> Watcher:
        watchers.append(Watcher(port, **wishes))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.close()
    for watcher in watchers:
        watcher.check()
