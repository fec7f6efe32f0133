"""The link to a real broker as the daemon sees it: publish, subscribe, acknowledge, flush, close."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.core.topics import filter_fault, topic_fault
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.mqtt.connection_thread import HEADER_ROOM, ConnectionThread
from llamacpp_mqtt_deploy.mqtt.packets import MOST_MQTT_PACKET, packet_bytes
from llamacpp_mqtt_deploy.mqtt.receiving import Subscription
from llamacpp_mqtt_deploy.mqtt.session import Publish
from llamacpp_mqtt_deploy.ports import Delivery, LinkInfo, Published, Retained, Share
from llamacpp_mqtt_deploy.stopping import Deadline, wait_for

log = structlog.get_logger(__name__)


class MqttLink:
    """One connection to an MQTT broker; see `ports.Link` for the contract. What it takes, its thread carries.

    `password` wins over the one in the settings (the daemon reads files and credentials: again before each attempt). `max_payload_bytes` bounds our
    publishes; of messages that come with a payload over `max_incoming_bytes` (asked for each time) the beginning is delivered. Raises
    ValueError, from the constructor, when a TLS file is missing or unfit. Its connections live in `loop`, or in one of its own.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        client_id: str,
        password: str | Callable[[], str | None] | None = None,
        max_payload_bytes: int | None = None,
        max_incoming_bytes: Callable[[], int] | None = None,
        loop: IoLoop | None = None,
    ) -> None:
        if password is None and settings.password is not None:
            password = settings.password.get_secret_value()
        given = password
        self._max_payload_bytes = max_payload_bytes
        self._own_loop = loop is None
        self._loop = loop or IoLoop()
        self._connection = ConnectionThread(
            settings,
            loop=self._loop,
            client_id=client_id,
            password=given if callable(given) else lambda: given,
            max_incoming_bytes=max_incoming_bytes,
        )

    def open(
        self,
        *,
        will: Retained,
        on_delivery: Callable[[Delivery], bool],
        on_online: Callable[[LinkInfo], None],
        on_lost: Callable[[LinkInfo], None],
    ) -> None:
        if self._own_loop:
            self._loop.start()
        self._connection.open(will=will, on_delivery=on_delivery, on_online=on_online, on_lost=on_lost)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        on_done: Callable[[bool], None] | None = None,
        share: Share = "event",
        content_type: str = "application/json",
    ) -> Published:
        fault = topic_fault(topic) or self._size_fault(topic, payload, correlation)
        if fault is not None:
            # A bounded, escaped piece: the topic may be anything.
            log.warning("publish.unfit", topic=ascii(topic[:200]), bytes=len(payload), why=fault)
            return "unfit"
        expires_at = None if expiry_s is None else time.monotonic() + expiry_s
        publish = Publish(
            topic,
            payload,
            qos,
            retain,
            correlation,
            expires_at,
            on_done,
            answer=share == "answer",
            content_type=content_type,
        )
        return "queued" if self._connection.enqueue(publish) else "full"

    def room_for_answers(self, largest: int, *, timeout_s: float = 0.0) -> int:
        return self._connection.room_for_answers(largest, timeout_s)

    def acknowledge(self, delivery: Delivery) -> None:
        self._connection.acknowledge(delivery)

    def subscribe(
        self,
        filters: Sequence[tuple[str, int]],
        *,
        timeout_s: float,
        retained: bool = False,
        give_up: Callable[[], bool] | None = None,
    ) -> Mapping[str, str]:
        if self._connection.is_current():
            raise RuntimeError("subscribe was called from a callback of the link; it would wait for itself")
        refused = {f: fault for f, _ in filters if (fault := filter_fault(f)) is not None}
        fit = [(f, qos) for f, qos in filters if f not in refused]
        if not fit:
            return refused
        return {**refused, **self._await(Subscription(fit, retained), timeout_s, give_up)}

    def unsubscribe(self, filters: Sequence[str], *, timeout_s: float) -> None:
        if self._connection.is_current():
            raise RuntimeError("unsubscribe was called from a callback of the link; it would wait for itself")
        self._await(Subscription([(each, 0) for each in filters], retained=False, ends=True), timeout_s, None)

    def _await(
        self, subscription: Subscription, timeout_s: float, give_up: Callable[[], bool] | None
    ) -> Mapping[str, str]:
        """What the broker refused of it."""
        where = self._connection.where
        if not self._connection.subscribe(subscription):
            raise ConnectionError(f"not connected to the broker at {where}")
        if not wait_for(subscription.done, timeout_s=timeout_s, give_up=give_up):
            packet = "UNSUBACK" if subscription.ends else "SUBACK"
            raise TimeoutError(f"the broker at {where} sent no {packet} within {timeout_s:g} s")
        if subscription.refused is None:
            raise ConnectionError(f"the connection to {where} was lost while waiting for SUBACK")
        return subscription.refused

    def info(self) -> LinkInfo:
        return self._connection.info()

    def max_payload_bytes(self) -> int | None:
        return self._connection.max_payload_bytes()

    def flush(self, deadline: Deadline) -> bool:
        return self._connection.flush(deadline)

    def close(self, deadline: Deadline, *, last_message: Retained | None = None) -> None:
        self._connection.close(deadline, last_message)
        if self._own_loop:
            self._loop.close()

    def _size_fault(self, topic: str, payload: bytes, correlation: bytes | None) -> str | None:
        if self._max_payload_bytes is not None and len(payload) > self._max_payload_bytes:
            return f"its {len(payload)} bytes are more than the configured {self._max_payload_bytes}"
        limit = self._connection.max_packet_bytes() or MOST_MQTT_PACKET
        if len(payload) + HEADER_ROOM <= limit:
            return None
        size = packet_bytes(Publish(topic, payload, 1, False, correlation, 1.0, None), "5")
        return None if size <= limit else f"its {size} bytes are more than the {limit} that the broker takes"
