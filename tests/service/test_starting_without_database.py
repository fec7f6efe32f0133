"""A worker that is started while its database is away, hangs, or does not let it in."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.support.daemon_process import DaemonProcess
from tests.support.mosquitto import Mosquitto
from tests.support.paced_server import PacedServer
from tests.support.ports import free_port
from tests.support.postgres_server import PostgresServer

pytestmark = [pytest.mark.broker]

Start = Callable[..., DaemonProcess]


@pytest.fixture
def start(start_worker: StartWorker, mosquitto: Mosquitto) -> Iterator[Start]:
    """Start a worker on this database, not waited for."""
    engine = PacedServer(100)

    def start_one(url: str, **settings: Any) -> DaemonProcess:
        return start_worker(
            mosquitto.port, engine.url, ready=False, sessions__store="postgres", sessions__url=url, **settings
        )

    yield start_one
    engine.close()


def waits(worker: DaemonProcess) -> None:
    worker.until(lambda: worker.log("store.waiting"), 20, "a line that says what it waits for")


@pytest.mark.parametrize("pool", [{}, {"pool__name": "fleet"}], ids=["alone", "pool"])
def test_a_worker_that_starts_before_its_database_serves_as_soon_as_that_is_there(
    pool: dict[str, str],
    start: Start,
    start_postgres: Callable[..., PostgresServer],
    mosquitto: Mosquitto,
    watch: Watch,
) -> None:
    database = start_postgres()
    database.stop()
    root = f"early-{len(pool)}"
    watcher = watch(mosquitto.port, root=root)
    worker = start(database.url, mqtt__root=root, **pool)
    waits(worker)
    worker.until(lambda: any("EXTEND_TIMEOUT_USEC=" in word for word in worker.notify.words()), 5, "a plea for time")
    assert any(word.startswith("STATUS=waiting: the database") for word in worker.notify.words())
    assert "READY=1" not in worker.notify.words()
    (line,) = worker.log("store.waiting")[:1]
    assert (line["level"], "out of reach" in line["reason"]) == ("warning", True)
    database.start()
    worker.until(lambda: "READY=1" in worker.notify.words(), 20, "READY=1")
    watcher.ask("s", "hello", request_id="r", max_tokens=3)
    assert watcher.terminal("r")["type"] == "done"
    assert worker.stop() == 0


def test_sigterm_ends_a_worker_that_waits_for_its_database(start: Start) -> None:
    worker = start(f"postgresql://u@127.0.0.1:{free_port()}/lmd")
    waits(worker)
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    assert not [line for line in worker.log() if line["level"] == "error"]


def test_sigterm_ends_a_worker_whose_database_hangs_before_it_has_answered(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # More than one attempt takes, so that a worker that waits for its end is found out.
        url = f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/lmd?connect_timeout=60"
        worker = start(url)
        silent.settimeout(20)
        with silent.accept()[0]:
            began = time.monotonic()
            assert worker.stop() == 0
            assert time.monotonic() - began < 5


def test_a_database_that_stays_away_ends_with_3_after_the_startup_timeout(start: Start) -> None:
    port = free_port()
    worker = start(f"postgresql://u@127.0.0.1:{port}/lmd", limits__startup_timeout_s=1)
    assert worker.wait(15) == 3
    reason = worker.log("worker.ending")[0]["reason"]
    assert "the database" in reason
    assert str(port) in reason


@pytest.mark.parametrize(
    "url_of,said",
    [
        (lambda s: s.tcp_url(user="guarded"), "refused the password"),
        (lambda s: s.url.replace("/postgres?", "/missing?"), "does not exist"),
        (lambda s: s.tcp_url() + "?sslmode=require", "TLS"),
    ],
    ids=["password", "database", "tls"],
)
def test_what_does_not_pass_by_itself_ends_with_1_at_once(
    url_of: Callable[[PostgresServer], str], said: str, start: Start, postgres: PostgresServer
) -> None:
    if not postgres.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guarded'"):
        postgres.sql("CREATE ROLE guarded LOGIN")
    worker = start(url_of(postgres))
    assert worker.wait(20) == 1
    (ending,) = worker.log("worker.ending")
    assert said in ending["reason"]
    assert worker.log("store.waiting") == []
