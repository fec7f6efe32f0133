"""A plain MQTT client for tests: what the other side of the bus sees."""

from __future__ import annotations

import queue
import threading
import uuid
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


class BusClient:
    """Connects at once; `publish` waits for the PUBACK, `subscribe` for the SUBACK, `receive` for a message."""

    def __init__(
        self,
        port: int,
        *,
        client_id: str = "",
        version: str = "5",
        username: str | None = None,
        password: str | None = None,
        only_below: str = "",
    ) -> None:
        self.messages: queue.SimpleQueue[paho.MQTTMessage] = queue.SimpleQueue()
        self._subscribed = threading.Event()
        self._connected = threading.Event()
        five = version == "5"
        self._five = five
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id or f"test-{uuid.uuid4().hex}",
            protocol=paho.MQTTv5 if five else paho.MQTTv311,
        )
        client.username_pw_set(username, password)
        client.on_connect = lambda *_: self._connected.set()
        client.on_subscribe = lambda *_: self._subscribed.set()
        # amqtt 0.12 hands new clients messages of earlier ones; a test that shares it names its own root.
        client.on_message = lambda client, userdata, message: (
            self.messages.put(message) if message.topic.startswith(only_below) else None
        )
        client.connect("127.0.0.1", port)
        client.loop_start()
        assert self._connected.wait(5), "the test's client cannot connect"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        self._subscribed.clear()
        self._client.subscribe(topic_filter, qos)
        assert self._subscribed.wait(5), "no SUBACK"

    def publish(self, topic: str, payload: bytes, qos: int = 1, *, retain: bool = False, **properties: Any) -> None:
        """Publish; keywords are MQTT 5 properties under paho's names (`CorrelationData=b"x"`)."""
        found = None
        if self._five and properties:
            found = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(found, name, value)
        self._client.publish(topic, payload, qos, retain, found).wait_for_publish(10)

    def receive(self, timeout_s: float = 10.0) -> paho.MQTTMessage:
        try:
            return self.messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no message within {timeout_s:g} s") from None

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
