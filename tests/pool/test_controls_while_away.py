"""What is asked of a session while the database is away for a moment: it is done when the database is back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate
from tests.pool.fleet import Fleet, fleet_on
from tests.support.mosquitto import Mosquitto
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually


@pytest.fixture
def database(start_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    return start_postgres()


@pytest.fixture
def fleet(mosquitto: Mosquitto, database: PostgresServer) -> Iterator[Fleet]:
    with fleet_on(mosquitto, database.url) as made:
        yield made


def _control(fleet: Fleet, action: str, **fields: str) -> None:
    payload = json.dumps({"action": action, "transaction": f"t-{action}", **fields}).encode()
    fleet.client.publish(f"{fleet.root}/control/ada", payload)


def test_a_cancel_and_a_history_that_come_while_the_database_restarts_are_answered_when_it_is_back(
    fleet: Fleet, database: PostgresServer
) -> None:
    worker = fleet.worker()
    fleet.end(fleet.ask("one two"))
    gate = Gate()
    worker.engine.play("x ", gate, "y")
    running = fleet.ask("go on", request_id="running")
    fleet.until(type="chunk", request_id=running)
    database.stop("fast")
    eventually(worker.daemon.parts.store.trouble, 10)
    _control(fleet, "cancel", request_id=running)
    _control(fleet, "history")
    # Whatever comes after them on the same connection is answered: they have reached the worker.
    _control(fleet, "ping")
    fleet.until(type="ack", action="ping")
    # Meanwhile the watchdog sees the thread that waits.
    since = time.monotonic()
    eventually(lambda: worker.daemon.parts.client_work.beat_at > since + 0.3, 5)
    database.start()
    assert fleet.until(type="ack", action="cancel")["status"] == "ok"
    assert fleet.end(running)["finish_reason"] == "cancelled"
    history = fleet.until(type="ack", action="history")
    assert [m["content"] for m in history["messages"]][:2] == ["one two", "one two"]
