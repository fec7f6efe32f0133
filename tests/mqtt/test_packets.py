"""Our own packets, PUBLISH and PUBACK: byte for byte what paho makes of the same, and read as paho reads it."""

from __future__ import annotations

import socket
from typing import Any

import paho.mqtt._packet as untyped_packet
import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.mqtt import paho_fixes  # noqa: F401 - repairs paho's names of reasons
from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.packets import (
    MOST_REMAINING_LENGTH,
    leading_pubacks,
    puback,
    publish_packet,
    publish_properties,
)

packet: Any = untyped_packet
FIVE, THREE = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311
PROTOCOLS: dict[Version, Any] = {"5": FIVE, "3.1.1": THREE}


def _of_paho(
    version: Version, *, topic: str, payload: bytes, qos: int, retain: bool, dup: bool, mid: int, **said: Any
) -> bytes:
    """What paho writes for this publish."""
    client: Any = paho.Client(CallbackAPIVersion.VERSION2, protocol=PROTOCOLS[version])
    here, there = socket.socketpair()
    with here, there:
        client._sock = here
        client.on_socket_register_write = lambda *_: None
        properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = said["content_type"]
        if said["correlation"] is not None:
            properties.CorrelationData = said["correlation"]
        if said["expiry_s"] is not None:
            properties.MessageExpiryInterval = said["expiry_s"]
        client._send_publish(mid, topic.encode(), payload, qos, retain, dup, None, properties)
        return bytes(client._out_packet[0]["packet"])


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@given(
    topic=st.text(min_size=1, max_size=40),
    payload=st.binary(max_size=300) | st.integers(0, 70_000).map(bytes),
    qos=st.sampled_from([0, 1]),
    retain=st.booleans(),
    dup=st.booleans(),
    mid=st.integers(1, 65_535),
    correlation=st.none() | st.binary(max_size=64),
    expiry_s=st.none() | st.integers(1, 2**32 - 1),
)
def test_a_publish_has_the_bytes_that_paho_would_send(
    version: Version,
    topic: str,
    payload: bytes,
    qos: int,
    retain: bool,
    dup: bool,
    mid: int,
    correlation: Any,
    expiry_s: Any,
) -> None:
    said = {"content_type": "application/json", "correlation": correlation, "expiry_s": expiry_s}
    ours = publish_packet(
        topic.encode(),
        payload,
        qos=qos,
        retain=retain,
        dup=dup,
        mid=mid,
        properties=publish_properties(correlation, expiry_s, "application/json") if version == "5" else b"",
    )
    assert ours == _of_paho(version, topic=topic, payload=payload, qos=qos, retain=retain, dup=dup, mid=mid, **said)


def test_what_no_packet_can_hold_is_refused() -> None:
    rest: dict[str, Any] = {"qos": 1, "retain": False, "dup": False, "mid": 1, "properties": b""}
    with pytest.raises(ValueError, match="a topic of 65536 bytes"):
        publish_packet(b"t" * 65_536, b"", **rest)
    largest = bytes(MOST_REMAINING_LENGTH - 5)
    assert publish_packet(b"t", largest, **rest)[:5] == b"\x32\xff\xff\xff\x7f"
    with pytest.raises(ValueError, match="a packet of 268435456 bytes"):
        publish_packet(b"t", largest + b"x", **rest)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("number", [1, 255, 256, 65535])
def test_an_acknowledgement_without_a_reason_is_read_as_paho_reads_it(version: Version, number: int) -> None:
    body = number.to_bytes(2, "big")
    own = packet.decode_puback(0x40, body, PROTOCOLS[version])
    assert puback(body, version) == (own.mid, own.reason.value) == (number, 0)
    assert leading_pubacks(b"\x40\x02" + body) == ([number], 4)


def test_an_acknowledgement_with_a_reason_and_properties_gives_its_reason() -> None:
    for body in (b"\x01\x02\x87", b"\x00\x01\x97\x05\x1f\x00\x02no", b"\x00\x01\x10", b"\x00\x01\x95"):
        own = packet.decode_puback(0x40, body, FIVE)
        assert puback(body, "5") == (own.mid, own.reason.value)
        raw = bytes((0x40, len(body))) + body
        assert leading_pubacks(b"\x40\x02\x00\x09" + raw) == ([9], 4), (
            "what says more than its id is left to be read whole"
        )


def test_what_is_no_acknowledgement_is_left_to_paho() -> None:
    for version, body in (("5", b"\x01"), ("5", b""), ("3.1.1", b"\x01"), ("3.1.1", b"\x00\x01\x00")):
        assert puback(body, version) is None  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 65_535), max_size=50), st.binary(max_size=6))
def test_acknowledgements_are_taken_up_to_the_first_other_byte(numbers: list[int], rest: bytes) -> None:
    raw = b"".join(b"\x40\x02" + number.to_bytes(2, "big") for number in numbers)
    mids, size = leading_pubacks(memoryview(raw + b"\x30" + rest))
    assert (mids, size) == (numbers, len(raw))
    for cut in range(len(raw) + 1):
        assert leading_pubacks(raw[:cut]) == (numbers[: cut // 4], cut // 4 * 4)


def test_every_reason_that_a_broker_may_give_has_a_name() -> None:
    for code in (0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x95, 0x97, 0x99, 0x9A, 0x9B):
        assert str(ReasonCode(PacketTypes.PUBACK, identifier=code))
