"""A whole worker in one process: the daemon over the loopback link with a scripted engine, and a client that keeps the rules."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.core.events import EventReader
from llamacpp_mqtt_deploy.ports import Delivery, Engine
from llamacpp_mqtt_deploy.schema.document import validate_admin_ack, validate_event, validate_health, validate_status
from llamacpp_mqtt_deploy.service.daemon import Daemon
from llamacpp_mqtt_deploy.service.identity import client_id
from llamacpp_mqtt_deploy.testing.loopback import LoopbackLink
from llamacpp_mqtt_deploy.testing.loopback_broker import LoopbackBroker
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine

Event = dict[str, Any]


class Listener:
    """Everything that was published, in order; waits for what is to come. Each event is held against the schema."""

    def __init__(self, broker: LoopbackBroker) -> None:
        self.client = broker.client()
        self.client.subscribe("#")
        self.deliveries: list[Delivery] = []
        self.events: list[Event] = []

    def pull(self, timeout_s: float) -> Event | None:
        """The next message as JSON (requests and controls are passed over); None when none comes."""
        try:
            delivery = self.client.receive(timeout_s)
        except TimeoutError:
            return None
        self.deliveries.append(delivery)
        root, _, rest = delivery.topic.partition("/")
        kind = "" if root == "homeassistant" else rest.partition("/")[0]  # not one of ours
        if kind not in ("reply", "status", "health", "admin-reply", "assistant_response"):
            return {}
        event: Event = json.loads(delivery.payload)
        check = {"status": validate_status, "health": validate_health, "admin-reply": validate_admin_ack}
        check.get(kind, validate_event)(event)
        event["_topic"] = delivery.topic
        self.events.append(event)
        return event

    def until(self, timeout_s: float = 10.0, **wanted: Any) -> Event:
        """The first event, past ones included, whose fields are these."""
        for event in self.events:
            if _has(event, wanted):
                return event
        ends_at = time.monotonic() + timeout_s
        while (left_s := ends_at - time.monotonic()) > 0:
            event = self.pull(left_s) or {}
            if event and _has(event, wanted):
                return event
        kinds = [(event.get("type"), event.get("request_id"), event.get("code")) for event in self.events]
        raise AssertionError(f"nothing with {wanted} within {timeout_s:g} s; there were {kinds}")

    def terminal(self, request_id: str, timeout_s: float = 10.0) -> Event:
        return self.until(timeout_s, request_id=request_id, final=True)

    def of(self, request_id: str) -> list[Event]:
        """The events of one request so far."""
        while self.pull(0.0) is not None:
            pass
        return [event for event in self.events if event.get("request_id") == request_id]

    def read(self, request_id: str) -> EventReader:
        """The request's events through the client's rules, with the promises of the protocol checked on the way."""
        events = self.of(request_id)
        reader = EventReader(request_id)
        for event in events:
            reader.feed(event)
        chunks = [event for event in events if event["type"] == "chunk"]
        assert [event["seq"] for event in chunks] == list(range(len(chunks)))
        terminals = [event for event in events if event["type"] in ("done", "error")]
        assert len(terminals) == 1, [event["type"] for event in events]
        assert terminals[0].get("seq", len(chunks)) == len(chunks)
        return reader


def _has(event: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(event.get(name) == value for name, value in wanted.items())


class WholeWorker:
    """One life of a worker; `listener` and `broker` may outlive it."""

    def __init__(self, *, broker: LoopbackBroker, engine: Engine, settings: Mapping[str, str]) -> None:
        self.broker = broker
        self.engine = engine
        self.loaded = load(None, dict(settings), environ={})
        self.client_id = client_id(self.loaded.settings)
        mqtt = self.loaded.settings.mqtt
        link = LoopbackLink(
            broker, client_id=self.client_id, outbox_messages=mqtt.outbox_messages, outbox_mib=mqtt.outbox_mib
        )
        self.daemon = Daemon(self.loaded, link=link, engine=engine)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, name="daemon", daemon=True)

    def _run(self) -> None:
        self.exit_code = self.daemon.run()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 20.0) -> int | None:
        self.daemon.stop()
        return self.join(timeout_s)

    def join(self, timeout_s: float = 20.0) -> int | None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the daemon does not end"
        return self.exit_code


class Bus:
    """What a test holds: the broker, a listener, and a way to send."""

    def __init__(self, state: Path) -> None:
        self.broker = LoopbackBroker()
        self.listener = Listener(self.broker)
        self.sender = self.broker.client()
        self.state = state
        self.workers: list[WholeWorker] = []

    def worker(self, engine: Engine | None = None, *, wait: bool = True, **settings: Any) -> WholeWorker:
        """Start a worker; settings as `limits__queue_size=3`."""
        given = {name.replace("__", "."): _text(value) for name, value in settings.items()}
        base = {"sessions.path": str(self.state / "state.db"), "mqtt.worker_id": "w1", "limits.drain_timeout_s": "5"}
        worker = WholeWorker(broker=self.broker, engine=engine or ScriptedEngine(), settings=base | given)
        self.workers.append(worker)
        worker.start()
        if wait:
            self.listener.until(state="online", instance=worker.daemon.parts.presence.instance)
        return worker

    def ask(self, prompt: str | None = None, *, session: str = "demo", **fields: Any) -> None:
        body = ({"prompt": prompt} if prompt is not None else {}) | fields
        self.sender.publish(f"llm/request/{session}", json.dumps(body).encode())

    def control(self, action: str, *, session: str = "demo", **fields: Any) -> None:
        self.sender.publish(f"llm/control/{session}", json.dumps({"action": action} | fields).encode())

    def admin(self, action: str, **fields: Any) -> None:
        self.sender.publish("llm/admin/w1", json.dumps({"action": action} | fields).encode())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def bus_in(state: Path) -> Iterator[Bus]:
    bus = Bus(state)
    try:
        yield bus
    finally:
        for worker in bus.workers:
            if worker.exit_code is None:
                worker.daemon.stop()
                worker.daemon.stop()
                worker.join()
