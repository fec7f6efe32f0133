"""A second connection to the broker: publishes probes and sees which of them arrive, without disturbing a live worker."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from llamacpp_mqtt_deploy.client.address import BrokerAddress
from llamacpp_mqtt_deploy.client.connection import Connection
from llamacpp_mqtt_deploy.client.exceptions import BusError, NotPermitted
from llamacpp_mqtt_deploy.client.paho_client import REFUSED

# What the broker passes on arrives about when its acknowledgement does: ten times that, and some for a busy machine.
ARRIVES_WITHIN_S = 0.3
ARRIVES_WITHIN_ROUND_TRIPS = 10
LONGEST_WAIT_S = 3.0
ACKED_WITHIN_S = 5.0
KEPT_MESSAGES = 2000


@dataclass(frozen=True, slots=True)
class ProbeMessage:
    """A message that a probe's connection received."""

    topic: str
    payload: bytes
    retain: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a publish: `refused` is the broker's reason (MQTT 5), `acked` that it was acknowledged at all."""

    acked: bool
    refused: str | None = None


class PermissionProbe:
    """One connection with a random client id, so that the live worker's connection stays; `received` is bounded."""

    def __init__(self, address: BrokerAddress) -> None:
        self.address = replace(address, client_id=None)
        self.received: list[ProbeMessage] = []
        self._changed = threading.Condition()
        self._round_trip_s = 0.0
        self._connection = Connection(self.address, on_message=self._note)

    def __enter__(self) -> Self:
        self._connection.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    @property
    def protocol(self) -> str | None:
        return self._connection.protocol

    def subscribe(self, topic_filter: str) -> str | None:
        """Subscribe; the reason when the broker refuses it, None when it grants it (which mosquitto always does)."""
        began_at = time.monotonic()
        try:
            self._connection.subscribe(topic_filter, timeout_s=ACKED_WITHIN_S)
            self._round_trip_s = max(self._round_trip_s, time.monotonic() - began_at)
        except NotPermitted as error:
            return error.message
        except BusError as error:
            return error.message
        return None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> Outcome:
        """Publish at QoS 1 and wait for the acknowledgement."""
        done = threading.Event()
        refused: list[str] = []

        def acked(value: int, reason: str) -> None:
            if value >= REFUSED:
                refused.append(reason)
            done.set()

        began_at = time.monotonic()
        try:
            taken = self._connection.publish(topic, payload, retain=retain, on_ack=acked)
        except BusError as error:
            return Outcome(acked=False, refused=error.message)
        if not taken or not done.wait(ACKED_WITHIN_S):
            return Outcome(acked=False, refused="the broker closed the connection or did not acknowledge it")
        self._round_trip_s = max(self._round_trip_s, time.monotonic() - began_at)
        return Outcome(acked=True, refused=refused[0] if refused else None)

    def saw(self, topic: str, *, after: int = 0, payload: bytes | None = None) -> bool:
        """Whether a message on this topic (or below it, when it ends with a slash) arrives; `after` is an earlier
        `len(received)`."""

        def wanted(message: ProbeMessage) -> bool:
            fits = message.topic.startswith(topic) if topic.endswith("/") else message.topic == topic
            return fits and payload in (None, message.payload)

        wait_s = min(LONGEST_WAIT_S, ARRIVES_WITHIN_S + ARRIVES_WITHIN_ROUND_TRIPS * self._round_trip_s)
        with self._changed:
            return self._changed.wait_for(lambda: any(map(wanted, self.received[after:])), wait_s)

    def _note(self, topic: str, payload: bytes, retain: bool) -> None:
        with self._changed:
            if len(self.received) < KEPT_MESSAGES:
                self.received.append(ProbeMessage(topic, payload, retain))
            self._changed.notify_all()
