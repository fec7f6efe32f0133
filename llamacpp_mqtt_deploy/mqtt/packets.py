"""The properties of our publishes, packed once, and how large a packet becomes with them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.session import Publish

MOST_MQTT_PACKET = 268_435_455 + 5


class _Packed(Properties):
    """Properties whose bytes are made once: packing them anew for each chunk costs 20 us."""

    def __init__(self, properties: Any) -> None:
        super().__init__(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        # Properties refuses attributes that are no MQTT properties.
        object.__setattr__(self, "packed", bytes(properties.pack()))

    def pack(self) -> bytes:
        packed: bytes = self.__dict__["packed"]
        return packed


@lru_cache(maxsize=512)
def publish_properties(
    correlation: bytes | None, expiry_s: int | None, content_type: str = "application/json"
) -> _Packed:
    """The properties of one of our publishes; a stream uses the same ones for all its events."""
    properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = content_type
    if correlation is not None:
        properties.CorrelationData = correlation
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return _Packed(properties)


def packet_bytes(publish: Publish, version: Version) -> int:
    """The size of the PUBLISH packet, at most."""
    expiry_s = 0 if publish.expires_at else None
    properties = len(publish_properties(publish.correlation, expiry_s, publish.content_type).pack())
    return 9 + len(publish.topic.encode()) + (properties if version == "5" else 0) + len(publish.payload)
