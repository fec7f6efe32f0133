"""Repairs of what paho cannot read, or reads too slowly; importing this module makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paho.mqtt.properties as untyped_properties
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

try:
    import paho.mqtt._packet as untyped_packet
except ImportError:  # another paho than 2.2
    untyped_packet = None  # type: ignore[assignment]

# Without type information in paho.
paho_properties: Any = untyped_properties
paho_packet: Any = untyped_packet


def _read_text(buffer: bytes, most: int) -> tuple[str, int]:
    if most < 2 or len(buffer) < 2:
        raise MalformedPacket("not enough data for a string")
    length = int.from_bytes(buffer[:2], "big")
    if length > most - 2 or length > len(buffer) - 2:
        raise MalformedPacket("string too long")
    return bytes(buffer[2 : 2 + length]).decode("utf-8", "replace"), length + 2


def _quick_puback(decode: Callable[..., Any]) -> Callable[..., Any]:
    """The decoder of PUBACK in paho, with a short way for the packet that says no more than its id: the usual one.

    paho makes a new reason code and new, empty properties for each, 30 to 60 us, which was the largest part of an event's way after its system calls.
    """
    known: dict[Any, Any] = {}

    def decode_puback(header: int, packet: bytes | bytearray, protocol: Any) -> Any:
        if len(packet) != 2:
            return decode(header, packet, protocol)
        puback = known.get(protocol)
        if puback is None:
            puback = known[protocol] = decode(header, packet, protocol)
        return puback._replace(mid=packet[0] << 8 | packet[1])

    return decode_puback


def mend_paho() -> None:
    """Let paho read what brokers send; it hangs up on what it cannot read, and gets it again after each reconnect.

    1. paho 2.2.0 takes U+FEFF in a property for malformed (MQTT-1.5.4-3 allows it). mosquitto forwards it: one user property from
       any client would silence the worker for good.
    2. mosquitto 2.0 answers a publish over its `message_size_limit` with PUBACK 0x95, which the specification knows in DISCONNECT
       only, and paho's table too: one large event would keep the worker reconnecting for ever.
    3. The acknowledgement of an event costs as much as the event: see `_quick_puback`.
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
    # In paho's own modules: where a later paho has none of this, it decodes as it likes.
    decode = getattr(paho_packet, "decode_puback", None)
    if decode is not None and not hasattr(decode, "mended"):
        quick: Any = _quick_puback(decode)
        quick.mended = True
        paho_packet.decode_puback = quick


mend_paho()
