"""The packets of a token's way, PUBLISH out and PUBACK in, as bytes (MQTT 5.0 and 3.1.1, sections 3.3 and 3.4).

paho makes both too, with half a dozen objects for each: 100 us where these take 10. Everything else is paho's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.session import Publish

MOST_REMAINING_LENGTH = 268_435_455
MOST_MQTT_PACKET = MOST_REMAINING_LENGTH + 5
MOST_TOPIC_BYTES = 65_535

PUBACK = 0x40
"""First byte of the packet."""


@lru_cache(maxsize=512)
def publish_properties(
    correlation: bytes | None, expiry_s: int | None, content_type: str = "application/json"
) -> bytes:
    """The packed properties of one of our publishes; a stream uses the same ones for all its events."""
    properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = content_type
    if correlation is not None:
        properties.CorrelationData = correlation
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return bytes(properties.pack())


def packet_bytes(publish: Publish, version: Version) -> int:
    """The size of the PUBLISH packet, at most."""
    expiry_s = 0 if publish.expires_at else None
    properties = len(publish_properties(publish.correlation, expiry_s, publish.content_type))
    return 9 + len(publish.topic.encode()) + (properties if version == "5" else 0) + len(publish.payload)


def publish_packet(
    topic: bytes, payload: bytes, *, qos: int, retain: bool, dup: bool, mid: int, properties: bytes
) -> bytes:
    """A PUBLISH; `properties` with their length before them, empty on MQTT 3.1.1. Raises ValueError when no packet can hold it."""
    if len(topic) > MOST_TOPIC_BYTES:
        raise ValueError(f"a topic of {len(topic)} bytes")
    head = len(topic).to_bytes(2, "big") + topic + (mid.to_bytes(2, "big") if qos else b"") + properties
    length = len(head) + len(payload)
    if length > MOST_REMAINING_LENGTH:
        raise ValueError(f"a packet of {length} bytes")
    first = 0x30 | dup << 3 | qos << 1 | retain
    if length < 0x4000:  # spelled out: nearly every event is so small
        size = (length,) if length < 0x80 else (length & 0x7F | 0x80, length >> 7)
        return bytes((first, *size)) + head + payload
    return bytes((first, *_varint(length))) + head + payload


def _varint(number: int) -> tuple[int, ...]:
    if number < 0x80:
        return (number,)
    return (number & 0x7F | 0x80, *_varint(number >> 7))


def leading_pubacks(raw: bytes | memoryview) -> tuple[list[int], int]:
    """The packet ids of the plain PUBACKs (no reason code but success) that these bytes begin with, and how many bytes they take."""
    mids: list[int] = []
    at, last = 0, len(raw) - 4
    while at <= last and raw[at] == PUBACK and raw[at + 1] == 2:
        mids.append(raw[at + 2] << 8 | raw[at + 3])
        at += 4
    return mids, at


def puback_packet(mid: int) -> bytes:
    """The PUBACK of a message, without a reason code: success."""
    return bytes((PUBACK, 2, mid >> 8, mid & 0xFF))


def puback(body: bytes | bytearray, version: Version) -> tuple[int, int] | None:
    """Packet id and reason code of a PUBACK behind its first two bytes; None when it is none. What its properties say is not used."""
    if len(body) < 2 or (version == "3.1.1" and len(body) > 2):
        return None
    return body[0] << 8 | body[1], body[2] if len(body) > 2 else 0


def puback_name(code: int) -> str:
    """What the standard calls the reason code of a PUBACK."""
    try:
        return str(ReasonCode(PacketTypes.PUBACK, identifier=code))
    except (KeyError, AssertionError, ValueError):
        return f"code {code:#04x}"
