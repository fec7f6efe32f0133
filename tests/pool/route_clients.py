"""Clients of a pool that know nothing of its protocol: they publish on topics of their routes, and read what comes on others."""

from __future__ import annotations

import json
from typing import Any

from tests.pool.fleet import Fleet
from tests.support.bus_client import BusClient
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually


class RouteClients:
    """Everything below `base`, a topic of this test alone, in the order in which it came."""

    def __init__(self, broker: Mosquitto, fleet: Fleet) -> None:
        self.base = f"{fleet.root}-old"
        self._client = BusClient(broker.port)
        self._client.subscribe(f"{self.base}/#")
        self._heard: list[tuple[str, bytes]] = []

    def route(self, name: str, **fields: Any) -> dict[str, Any]:
        """Settings for `Fleet.worker`; `{base}` in a topic is ours."""
        own = {
            key: value.replace("{base}", self.base) if isinstance(value, str) else value
            for key, value in fields.items()
        }
        return {f"routes__{name}__{key}": value for key, value in own.items()}

    def say(self, topic: str, body: Any = b"") -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._client.publish(f"{self.base}/{topic}", payload)

    def heard(self, topic: str) -> list[bytes]:
        """What came there so far."""
        while True:
            try:
                message = self._client.receive(0.0)
            except TimeoutError:
                return [payload for name, payload in self._heard if name == f"{self.base}/{topic}"]
            self._heard.append((message.topic, bytes(message.payload)))

    def topics(self) -> set[str]:
        """On which anything came."""
        self.heard("")
        return {name.removeprefix(f"{self.base}/") for name, _ in self._heard}

    def wait_for(self, count: int, topic: str, timeout_s: float = 15.0) -> list[bytes]:
        eventually(lambda: len(self.heard(topic)) >= count, timeout_s)
        return self.heard(topic)

    def close(self) -> None:
        self._client.close()
