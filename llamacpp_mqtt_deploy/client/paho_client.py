"""What both connections of a client have in common: paho's settings, what a CONNACK means, who waits for an acknowledgement."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.client.address import BrokerAddress, explain_refusal
from llamacpp_mqtt_deploy.client.exceptions import BrokerRefused, BrokerUnreachable, BusError
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient
from llamacpp_mqtt_deploy.ports import Delivery

log = logging.getLogger(__name__)  # the host program's log: this part is a library

Spoken = Literal["5", "3.1.1"]

UNSUPPORTED_PROTOCOL_VERSION = 0x84
REFUSED = 0x80
NOT_AUTHORIZED = 0x87
NO_MATCHING_SUBSCRIBERS = 0x10
PACKET_TOO_LARGE = 0x95
OUTGOING_MESSAGES = 1000  # requests and controls without PUBACK; a person has one, a busy program some dozens
IN_FLIGHT = 10  # what the strictest public brokers allow; paho does not read Receive Maximum
LONGEST_PAUSE_S = 10
MOST_INCOMING_BYTES = 64 * 1024 * 1024
"""Longest message that is taken in; an event has 128 KiB at most unless a worker's limits.max_event_bytes is raised."""
PACKET_OVERHEAD_BYTES = 64
"""More than the header, the packet id and the properties of our publishes need."""


class TryOlder(Exception):
    """The broker may speak MQTT 3.1.1 only; `reason` is what to say when it does not."""

    def __init__(self, reason: BusError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def versions(address: BrokerAddress) -> tuple[Spoken, ...]:
    """The MQTT versions to try, in this order."""
    return ("5", "3.1.1") if address.protocol == "auto" else (address.protocol,)


def client_options(version: Spoken) -> dict[str, Any]:
    """What makes a paho client of this version begin with an empty session."""
    five = version == "5"
    return {
        "clean_session": None if five else True,
        "protocol": MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
    }


def configure(
    client: GatheringClient,
    address: BrokerAddress,
    version: Spoken,
    *,
    on_message: Callable[[str, bytes, bool], None],
) -> None:
    """Tell a new client of this version who we are, how to get to the broker, and whom to tell of messages (topic, payload, retain)."""
    if address.username is not None:
        client.username_pw_set(address.username, address.password)
    if address.tls is not None:
        client.tls_set_context(address.tls)
    client.connect_timeout = max(0.1, address.connect_timeout_s)
    client.max_queued_messages_set(OUTGOING_MESSAGES)
    client.version = version
    if address.transport == "websockets":
        client.websocket_path = address.websocket_path
    client.max_incoming_bytes = lambda: MOST_INCOMING_BYTES

    def delivered(delivery: Delivery) -> None:
        if delivery.left_out:
            log.warning("message.too_long topic=%.200r bytes=%d", delivery.topic, delivery.payload_bytes)
            return
        guarded(on_message, delivery.topic, delivery.payload, delivery.retain)

    def rare(_client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        guarded(on_message, topic, message.payload, message.retain)

    client.on_delivery = delivered
    client.on_message = rare


def connect_arguments(address: BrokerAddress, version: Spoken) -> dict[str, Any]:
    """The arguments of paho's `connect`."""
    return {
        "host": address.host,
        "port": address.effective_port,
        "keepalive": address.keepalive_s,
        "clean_start": True if version == "5" else paho.MQTT_CLEAN_START_FIRST_ONLY,
    }


def check_connack(connack: ReasonCode | None, address: BrokerAddress, *, in_time: bool) -> None:
    """Raise what a CONNACK, or its absence, means: `TryOlder`, `BrokerRefused`, `BrokerUnreachable`; nothing for a welcome.

    `in_time` is false when the broker said nothing at all.
    """
    if connack is not None:
        if connack.value < REFUSED:
            return
        refused = BrokerRefused(explain_refusal(connack, address))
        if connack.value == UNSUPPORTED_PROTOCOL_VERSION:
            raise TryOlder(refused)
        raise refused
    hint = "" if address.tls else " If its port expects TLS, switch TLS on."
    reason = "closed the connection before answering" if in_time else "did not answer in time"
    unreachable = BrokerUnreachable(f"The broker at {address} {reason}.{hint}")
    if in_time:
        raise TryOlder(unreachable)  # RabbitMQ before 3.13 closes on MQTT 5 without a word
    raise unreachable


def check_size(topic: str, payload: bytes, max_packet_bytes: int | None) -> None:
    """Raise `BusError` for a publish that the broker does not take."""
    if max_packet_bytes is not None and len(payload) + len(topic) + PACKET_OVERHEAD_BYTES > max_packet_bytes:
        raise BusError(f"The request has {len(payload)} bytes; the broker takes at most {max_packet_bytes}.")


def publish_properties(version: Spoken | None, expiry_s: int | None) -> Properties | None:
    """The properties of a publish; none on 3.1.1."""
    if version != "5":
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = "application/json"
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return properties


class Acknowledgements:
    """Who waits for which packet's PUBACK or SUBACK. No lock is held while somebody is told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Callable[[list[ReasonCode]], None]] = {}
        self._early: dict[int, list[ReasonCode]] = {}

    def expect(self, mid: int, answered: Callable[[list[ReasonCode]], None]) -> None:
        """The acknowledgement may be here before paho has returned the number of its packet. No lock of ours is held over a call
        into paho: it calls back under its own."""
        with self._lock:
            early = self._early.pop(mid, None)
            if early is None:
                self._waiting[mid] = answered
        if early is not None:
            answered(early)

    def came(self, mid: int, reasons: list[ReasonCode]) -> None:
        """One is here."""
        with self._lock:
            answered = self._waiting.pop(mid, None)
            if answered is None:
                self._early[mid] = reasons
                return
        guarded(answered, reasons)

    def clear(self) -> None:
        """The connection is lost, and with it every number."""
        with self._lock:
            self._waiting.clear()
            self._early.clear()


def guarded(call: Callable[..., None], *arguments: Any) -> None:
    """An exception would end the thread or the loop that paho runs in: it stops here."""
    try:
        call(*arguments)
    except Exception:
        log.exception("bus.callback_failed")
