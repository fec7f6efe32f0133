"""A PUBLISH that has come in, from its bytes to a `Delivery` (MQTT 5.0 and 3.1.1, section 3.3).

paho does the same with some thirty objects and a cycle among them: 150 to 250 us before each request where this takes 10. Whatever
is rare or wrong is left to paho, so that there is one place that decides what becomes of it.
"""

from __future__ import annotations

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.ports import Delivery

PAYLOAD_FORMAT = 0x01
EXPIRY = 0x02
CONTENT_TYPE = 0x03
RESPONSE_TOPIC = 0x08
CORRELATION = 0x09
SUBSCRIPTION = 0x0B
USER_PROPERTY = 0x26

_MAY_REPEAT = (USER_PROPERTY, SUBSCRIPTION)


class UncommonError(Exception):
    """These bytes are for paho."""


def leading_publish(raw: memoryview, version: Version, now: float, connection: int) -> tuple[Delivery, int] | None:
    """The message that these bytes begin with, its receipt naming this connection, and how many bytes it takes.

    None when they begin with anything but a whole PUBLISH of QoS 0 or 1 without topic alias, and when it is malformed.
    """
    if len(raw) < 4 or raw[0] & 0xF4 != 0x30:  # the type, and no QoS of 2 or 3
        return None
    try:
        length, start = varint(raw, 1)
    except (UncommonError, IndexError):
        return None
    end = start + length
    if end > len(raw):
        return None
    delivery = publish_from(raw[0], bytes(raw[start:end]), version, now, connection)
    return None if delivery is None else (delivery, end)


def publish_from(first: int, body: bytes, version: Version, now: float, connection: int) -> Delivery | None:
    """The message of a PUBLISH from the packet's first byte and its body; None when it is malformed, or has a topic alias."""
    try:
        return _delivery(first, body, version, now, connection)
    except (UncommonError, IndexError, UnicodeDecodeError):
        return None


def topic_and_mid(first: int, body: bytes | bytearray) -> tuple[str, int, int, int]:
    """Topic, QoS and packet id of a PUBLISH, whatever follows them, and where they end. What is no UTF-8 in the topic is replaced."""
    end = 2 + (body[0] << 8 | body[1])
    topic, qos = str(body[2:end], "utf-8", "replace"), first >> 1 & 1
    return (topic, qos, body[end] << 8 | body[end + 1], end + 2) if qos else (topic, 0, 0, end)


def receipt_of(connection: int, qos: int, mid: int) -> tuple[int, int] | None:
    """What the acknowledgement of a message takes: the number of the connection that it came on, and its packet id."""
    return (connection, mid) if qos else None


def _delivery(first: int, packet: bytes, version: Version, now: float, connection: int) -> Delivery:
    """From the packet's first byte and what follows its length."""
    qos = first >> 1 & 1
    topic, at = _block(packet, 0, len(packet))
    mid = 0
    if qos:
        mid = packet[at] << 8 | packet[at + 1]
        at += 2
    expiry_s: float | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    if version == "5":
        length, at = varint(packet, at)
        if length:
            expiry_s, response_topic, correlation = _properties(packet, at, at + length)
            at += length
    elif not topic:
        raise UncommonError
    return Delivery(
        topic=str(topic, "utf-8"),
        payload=packet[at:],
        qos=qos,
        retain=bool(first & 1),
        received_at=now,
        response_topic=response_topic,
        correlation=correlation,
        expiry_s=expiry_s,
        receipt=receipt_of(connection, qos, mid),
    )


def _properties(packet: bytes, at: int, end: int) -> tuple[float | None, str | None, bytes | None]:
    """Expiry in seconds, response topic and correlation data; what else is known is passed over."""
    if end > len(packet):
        raise UncommonError
    expiry_s: float | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    seen = 0
    while at < end:
        kind = packet[at]
        at += 1
        if kind not in _MAY_REPEAT:
            if seen >> kind & 1:
                raise UncommonError
            seen |= 1 << kind
        if kind == CORRELATION:
            correlation, at = _block(packet, at, end)
        elif kind == RESPONSE_TOPIC:
            text, at = _block(packet, at, end)
            response_topic = str(text, "utf-8")
        elif kind == EXPIRY:
            expiry_s = float(int.from_bytes(packet[at : at + 4], "big"))
            at += 4
        else:
            at = _pass_over(kind, packet, at, end)
    if at != end:
        raise UncommonError
    return expiry_s, response_topic, correlation


def _pass_over(kind: int, packet: bytes, at: int, end: int) -> int:
    """Where a property ends that nobody asks for."""
    if kind == CONTENT_TYPE:
        return _block(packet, at, end)[1]
    if kind == USER_PROPERTY:
        return _block(packet, _block(packet, at, end)[1], end)[1]
    if kind == PAYLOAD_FORMAT and packet[at] <= 1:
        return at + 1
    if kind == SUBSCRIPTION:
        number, at = varint(packet, at)
        if number:
            return at
    raise UncommonError


def _block(packet: bytes, at: int, end: int) -> tuple[bytes, int]:
    """What stands behind its length in two bytes, and where it ends."""
    start = at + 2
    stop = start + (packet[at] << 8 | packet[at + 1])
    if stop > end:
        raise UncommonError
    return packet[start:stop], stop


def varint(raw: bytes | memoryview, at: int) -> tuple[int, int]:
    """A number of at most four bytes, the lowest seven bits first, and where it ends. Raises UncommonError and IndexError."""
    number = raw[at]
    if number < 0x80:
        return number, at + 1
    number &= 0x7F
    for shift in (7, 14, 21):
        at += 1
        number |= (raw[at] & 0x7F) << shift
        if raw[at] < 0x80:
            return number, at + 1
    raise UncommonError
