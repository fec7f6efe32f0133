"""Several whole workers in one process, as a pool on a real broker and a real PostgreSQL, and a client that listens to all."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.core.events import EventReader
from llamacpp_mqtt_deploy.schema.document import validate_admin_ack, validate_event, validate_pool, validate_status
from llamacpp_mqtt_deploy.service.daemon import Daemon
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.support.bus_client import BusClient
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

Event = dict[str, Any]
LEASE_S = 10.0
"""Longer than a busy machine lets a thread wait: whose lease runs out is taken over, and what it had told is told again."""
SHORT_LEASE_S = 4.0
"""For tests that wait until a dead worker is taken over."""
_CHECKS: Mapping[str, Callable[[Event], object]] = {
    "reply": validate_event,
    "status": validate_status,
    "pool": validate_pool,
    "admin-reply": validate_admin_ack,
}


class PooledWorker:
    """One worker of the pool. `engine` is its own, with one slot unless told otherwise."""

    def __init__(self, name: str, engine: ScriptedEngine, settings: dict[str, str]) -> None:
        self.name = name
        self.engine = engine
        self.daemon = Daemon(load(None, settings, environ={}), engine=engine)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, name=f"daemon-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.exit_code = self.daemon.run()

    def stop(self) -> int | None:
        self.daemon.stop()
        self._thread.join(20)
        assert not self._thread.is_alive(), "the daemon does not end"
        return self.exit_code

    def stop_at_once(self) -> None:
        if self._thread.is_alive():
            self.daemon.stop()
            self.stop()


class Fleet:
    """A root of its own: others may use broker and database at the same time."""

    def __init__(self, broker: Mosquitto, url: str, lease_s: float) -> None:
        self.root = f"pool{uuid.uuid4().hex[:8]}"
        self._broker = broker
        self._url = url
        self._lease_s = lease_s
        self.workers: list[PooledWorker] = []
        self.client = BusClient(broker.port)
        self.client.subscribe(f"{self.root}/#")
        self.heard: list[tuple[float, str, Event]] = []

    def worker(self, *, engine: ScriptedEngine | None = None, **settings: Any) -> PooledWorker:
        name = f"w{len(self.workers) + 1}"
        given = {key.replace("__", "."): json.dumps(v) if not isinstance(v, str) else v for key, v in settings.items()}
        base = {
            "mqtt.host": "127.0.0.1",
            "mqtt.port": str(self._broker.port),
            "mqtt.root": self.root,
            "mqtt.worker_id": name,
            "sessions.store": "postgres",
            "sessions.url": self._url,
            "pool.name": "fleet",
            "pool.lease_s": str(self._lease_s),
            "limits.drain_timeout_s": "5",
        }
        worker = PooledWorker(name, engine or ScriptedEngine(slots=1), base | given)
        self.workers.append(worker)
        eventually(lambda: worker.exit_code is not None or worker.daemon.ready, 15)
        assert worker.daemon.ready, f"{name} ended with {worker.exit_code}"
        return worker

    def ask(self, prompt: str, *, session: str = "ada", **fields: Any) -> str:
        request_id = fields.pop("request_id", None) or uuid.uuid4().hex[:12]
        body = {"prompt": prompt, "request_id": request_id} | fields
        if "messages" in fields:
            body.pop("prompt")
        self.client.publish(f"{self.root}/request/{session}", json.dumps(body).encode())
        return str(request_id)

    def control(self, action: str, *, session: str = "ada", **fields: Any) -> Event:
        """The ack."""
        transaction = uuid.uuid4().hex[:12]
        payload = json.dumps({"action": action, "transaction": transaction} | fields).encode()
        self.client.publish(f"{self.root}/control/{session}", payload)
        return self.until(transaction=transaction, type="ack")

    def until(self, timeout_s: float = 15.0, **wanted: Any) -> Event:
        """The first event, past ones included, whose fields are these."""
        for _, _, event in self.heard:
            if wanted.items() <= event.items():
                return event
        ends_at = time.monotonic() + timeout_s
        while (left_s := ends_at - time.monotonic()) > 0:
            found = self.next_event(left_s)
            if found is not None and wanted.items() <= found.items():
                return found
        kinds = [(event.get("type"), event.get("request_id"), event.get("code")) for _, _, event in self.heard]
        raise AssertionError(f"nothing with {wanted} within {timeout_s:g} s; there were {kinds[-40:]}")

    def end(self, request_id: str, timeout_s: float = 15.0) -> Event:
        return self.until(timeout_s, request_id=request_id, final=True)

    def next_event(self, timeout_s: float) -> Event | None:
        """The next message, empty where it is a request; None when none comes."""
        try:
            message = self.client.receive(timeout_s)
        except TimeoutError:
            return None
        kind = message.topic.split("/")[1]
        if kind not in _CHECKS or not message.payload:
            return {}
        event: Event = json.loads(message.payload)
        _CHECKS[kind](event)
        self.heard.append((time.monotonic(), message.topic, event))
        return event

    def of(self, request_id: str) -> list[Event]:
        while self.next_event(0.0) is not None:
            pass
        return [event for _, _, event in self.heard if event.get("request_id") == request_id]

    def read(self, request_id: str) -> EventReader:
        """The request's events by the client's rules; chunks without a hole, and one end."""
        reader = EventReader(request_id)
        events = self.of(request_id)
        for event in events:
            reader.feed(event)
        chunks = [event["seq"] for event in events if event["type"] == "chunk"]
        assert chunks == list(range(len(chunks)))
        ends = [event for event in events if event["type"] in ("done", "error")]
        assert len(ends) == 1, [event["type"] for event in events]
        return reader


@contextmanager
def fleet_on(broker: Mosquitto, url: str, *, lease_s: float = LEASE_S) -> Iterator[Fleet]:
    fleet = Fleet(broker, url, lease_s)
    try:
        yield fleet
    finally:
        for worker in fleet.workers:
            worker.stop_at_once()
        fleet.client.close()
