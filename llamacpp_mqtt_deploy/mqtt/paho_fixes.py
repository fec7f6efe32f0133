"""Repairs of what paho cannot read; importing this module makes them."""

from __future__ import annotations

from typing import Any

import paho.mqtt.properties as untyped_properties
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

# Without type information in paho.
paho_properties: Any = untyped_properties


def _read_text(buffer: bytes, most: int) -> tuple[str, int]:
    if most < 2 or len(buffer) < 2:
        raise MalformedPacket("not enough data for a string")
    length = int.from_bytes(buffer[:2], "big")
    if length > most - 2 or length > len(buffer) - 2:
        raise MalformedPacket("string too long")
    return bytes(buffer[2 : 2 + length]).decode("utf-8", "replace"), length + 2


def mend_paho() -> None:
    """Let paho read what brokers send; it hangs up on what it cannot read, and gets it again after each reconnect.

    1. paho 2.2.0 takes U+FEFF in a property for malformed (MQTT-1.5.4-3 allows it). mosquitto forwards it: one user property from
       any client would silence the worker for good.
    2. mosquitto 2.0 answers a publish over its `message_size_limit` with PUBACK 0x95, which the specification knows in DISCONNECT
       only, and paho's table too: one large event would keep the worker reconnecting for ever.
    """
    probe = b"\x00\x03\xef\xbb\xbf"
    try:
        paho_properties.readUTF(probe, len(probe))
    except MalformedPacket:
        paho_properties.readUTF = _read_text
    except AttributeError:
        pass  # a paho that reads its properties in another way
    for code, name in ((0x95, "Packet too large"), (0x9B, "QoS not supported"), (0x9A, "Retain not supported")):
        packets = ReasonCode.names.get(code, {}).get(name)
        if isinstance(packets, list) and PacketTypes.PUBACK not in packets:
            packets.append(PacketTypes.PUBACK)


mend_paho()
