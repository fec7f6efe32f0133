"""A message that is longer than anybody takes: its beginning is kept, to answer whoever sent it, and the rest is passed over.

No broker has to bound what it forwards (mosquitto's limit is 256 MiB unless it is told another), MQTT 3.1.1 has no way to ask for less,
and on MQTT 5 a message over our own Maximum Packet Size would vanish without an answer (section 3.1.2.11.4). Held as a whole, one such
message costs three times its size, more than the service may have; and at QoS 1 it is there again after each restart.
"""

from __future__ import annotations

from dataclasses import replace

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.incoming import UncommonError, publish_from, receipt_of, topic_and_mid, varint
from llamacpp_mqtt_deploy.ports import Delivery

HEADER_BYTES = 4 * (2 + 65_535) + 16
"""Room for topic, response topic, correlation data and content type, the longest that there are."""
KEPT_PAYLOAD_BYTES = 65_536
"""What is searched for the ids of a request that cannot be read as a whole (`core/guessing.py`)."""
_KEPT_BYTES = HEADER_BYTES + KEPT_PAYLOAD_BYTES
_LONGEST_START = 5
"""A packet's first byte, and its length in at most four."""


class Beginning:
    """Collects the beginning of a PUBLISH. `first` is the packet's first byte, `length` that of its body."""

    def __init__(self, first: int, length: int) -> None:
        self._first = first
        self._length = length
        self._kept = bytearray()

    def add(self, raw: memoryview) -> int:
        """Take what comes next of the body, as far as it is kept; how many bytes that is."""
        taken = raw[: _KEPT_BYTES - len(self._kept)]
        self._kept += taken
        return len(taken)

    @property
    def is_whole(self) -> bool:
        return len(self._kept) == _KEPT_BYTES

    @property
    def left_out(self) -> int:
        """How many bytes of the body follow."""
        return self._length - len(self._kept)

    def delivery(self, version: Version, now: float, connection: int) -> Delivery:
        """The message as far as it is here. Where its properties fill all that is kept, or are malformed, it has neither them nor a
        payload: its topic and receipt are enough to refuse it."""
        found = publish_from(self._first, bytes(self._kept), version, now, connection)
        if found is not None:
            return replace(found, left_out=self.left_out)
        topic, qos, mid, size = topic_and_mid(self._first, self._kept)
        return Delivery(
            topic=topic,
            payload=b"",
            left_out=self._length - size,
            qos=qos,
            retain=bool(self._first & 1),
            received_at=now,
            receipt=receipt_of(connection, qos, mid),
        )


def beginning_of(raw: memoryview, most_payload: int) -> tuple[Beginning, int] | None:
    """What collects the packet that these bytes begin with, and where its body begins; None unless it is a PUBLISH of QoS 0 or 1 that
    is too long for a payload of `most_payload` bytes, whatever else is in it."""
    if not _is_publish(raw):
        return None
    try:
        length, start = varint(raw, 1)
    except (UncommonError, IndexError):
        return None
    if length <= max(most_payload, KEPT_PAYLOAD_BYTES) + HEADER_BYTES:
        return None
    return Beginning(raw[0], length), start


def has_no_length(raw: memoryview) -> bool:
    """Whether more has to come of a PUBLISH of QoS 0 or 1 before its length can be read."""
    return 0 < len(raw) < _LONGEST_START and _is_publish(raw) and all(byte & 0x80 for byte in raw[1:])


def _is_publish(raw: memoryview) -> bool:
    return len(raw) > 0 and raw[0] & 0xF4 == 0x30
