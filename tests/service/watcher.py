"""The other side of the bus: a plain MQTT client that records what is published and holds it against the protocol."""

from __future__ import annotations

import json
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from llamacpp_mqtt_deploy.schema.document import (
    validate_admin_ack,
    validate_event,
    validate_health,
    validate_pool,
    validate_status,
)

Event = dict[str, Any]
_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], object]] = {
    "reply": validate_event,
    "status": validate_status,
    "health": validate_health,
    "admin-reply": validate_admin_ack,
    "pool": validate_pool,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """One message from the worker; `at` is monotonic seconds."""

    topic: str
    event: Event
    payload: bytes
    retained: bool
    at: float
    correlation: bytes | None


class Watcher:
    """Subscribes to the worker's topics at QoS 1, connects again by itself, and keeps its session at the broker."""

    def __init__(
        self,
        port: int,
        *,
        version: str = "5",
        root: str = "llm",
        filters: Iterable[str] | None = None,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        keep: bool = True,
    ) -> None:
        self._condition = threading.Condition()
        self._seen: list[Seen] = []
        self._keep = keep
        self._five = version == "5"
        self._subscriptions = 0
        self._filters = [f"{root}/{kind}/#" for kind in ("reply", "status", "health", "admin-reply", "pool")]
        if filters is not None:
            self._filters = list(filters)
        self._root = root
        self._subscribed = threading.Event()
        self.client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            f"watcher-{uuid.uuid4().hex[:12]}",
            protocol=paho.MQTTv5 if self._five else paho.MQTTv311,
            clean_session=None if self._five else False,
        )
        client.username_pw_set(username, password)
        if tls is not None:
            client.tls_set_context(tls)
        client.reconnect_delay_set(1, 1)
        client.max_inflight_messages_set(100)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        properties = None
        if self._five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 300
            client.connect("127.0.0.1", port, 30, clean_start=False, properties=properties)
        else:
            client.connect("127.0.0.1", port, 30)
        client.loop_start()
        assert self._subscribed.wait(10), "the watcher got no SUBACK"

    # --- paho's thread -------------------------------------------------------------------------------------------------

    def _on_connect(self, client: paho.Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if not reason.is_failure:
            client.subscribe([(each, 1) for each in self._filters])

    def _on_subscribe(self, *_: Any) -> None:
        with self._condition:
            self._subscriptions += 1
            self._condition.notify_all()
        self._subscribed.set()

    def _on_message(self, client: paho.Client, userdata: Any, message: paho.MQTTMessage) -> None:
        at = time.monotonic()
        try:
            event = json.loads(message.payload)
        except ValueError:
            event = {}
        correlation = getattr(message.properties, "CorrelationData", None) if message.properties else None
        seen = Seen(message.topic, event, bytes(message.payload), message.retain, at, correlation)
        with self._condition:
            if self._keep or event.get("type") == "ack":
                self._seen.append(seen)
            self._condition.notify_all()

    # --- sending -------------------------------------------------------------------------------------------------------

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, **properties: Any
    ) -> paho.MQTTMessageInfo:
        """Publish without waiting; keywords are MQTT 5 properties under paho's names."""
        found = None
        if self._five and properties:
            found = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(found, name, value)
        return self.client.publish(topic, payload, qos, retain, found)

    def ask(self, session: str, prompt: str | None = None, **fields: Any) -> bytes:
        """Publish a request; returns its bytes, to be sent again."""
        body = ({"prompt": prompt} if prompt is not None else {}) | fields
        payload = json.dumps(body).encode()
        self.publish(f"{self._root}/request/{session}", payload)
        return payload

    def control(self, session: str, action: str, **fields: Any) -> None:
        self.publish(f"{self._root}/control/{session}", json.dumps({"action": action} | fields).encode())

    def admin(self, worker: str, action: str, **fields: Any) -> None:
        self.publish(f"{self._root}/admin/{worker}", json.dumps({"action": action} | fields).encode())

    # --- looking -------------------------------------------------------------------------------------------------------

    def seen(self) -> list[Seen]:
        with self._condition:
            return list(self._seen)

    def first(self, timeout_s: float = 20.0, *, since: int = 0, **wanted: Any) -> Seen:
        """The first message, from number `since` on, with these fields (`_topic` is its topic), waited for."""
        looked = since
        ends_at = time.monotonic() + timeout_s
        with self._condition:
            while True:
                for seen in self._seen[looked:]:
                    if _has(seen, wanted):
                        return seen
                looked = len(self._seen)
                left_s = ends_at - time.monotonic()
                if left_s <= 0:
                    break
                self._condition.wait(left_s)
            kinds = [
                (s.event.get("type") or s.topic, s.event.get("request_id"), s.event.get("code")) for s in self._seen
            ]
        raise AssertionError(f"nothing with {wanted} within {timeout_s:g} s; the latest of {len(kinds)}: {kinds[-30:]}")

    def terminal(self, request_id: str, timeout_s: float = 30.0) -> Event:
        return self.first(timeout_s, request_id=request_id, final=True).event

    def wait_back(self, timeout_s: float = 20.0) -> None:
        """Wait until it has subscribed again after its connection was lost once."""
        with self._condition:
            assert self._condition.wait_for(lambda: self._subscriptions >= 2, timeout_s), "the watcher is not back"

    def of(self, request_id: str) -> list[Event]:
        return [seen.event for seen in self.seen() if seen.event.get("request_id") == request_id]

    def count(self) -> int:
        with self._condition:
            return len(self._seen)

    def forget(self) -> None:
        with self._condition:
            self._seen.clear()

    def check(self) -> None:
        """Every message keeps to the schema of its topic."""
        for seen in self.seen():
            levels = seen.topic.split("/")
            check = _CHECKS.get(levels[1]) if len(levels) > 1 and levels[0] == self._root else None
            if check is not None and seen.payload:
                check(seen.event)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def _has(seen: Seen, wanted: Mapping[str, Any]) -> bool:
    return all((seen.topic if name == "_topic" else seen.event.get(name)) == value for name, value in wanted.items())


def check_stream(events: Iterable[Event]) -> Event:
    """One request's events of one life as a client with a healthy subscription sees them; returns the terminal event."""
    events = [event for event in events if event["type"] not in ("ack", "rejected")]
    kinds = [event["type"] for event in events]
    chunks = [event for event in events if event["type"] == "chunk"]
    terminals = [event for event in events if event["type"] in ("done", "error")]
    assert len(terminals) == 1, kinds
    assert events[-1] is terminals[0], kinds
    assert terminals[0]["final"] is True
    assert [chunk["seq"] for chunk in chunks] == list(range(len(chunks))), kinds
    assert terminals[0]["seq"] == len(chunks)
    if terminals[0]["type"] == "done" and chunks:
        assert kinds.index("start") < kinds.index("chunk")
        joined = "".join(chunk.get("content", "") for chunk in chunks)
        assert joined == terminals[0]["full_content"], (joined, terminals[0])
    return terminals[0]
