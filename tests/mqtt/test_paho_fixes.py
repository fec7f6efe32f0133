"""What is mended in paho: its answers stay the same where they were right."""

from __future__ import annotations

from typing import Any

import paho.mqtt._packet as untyped_packet
import pytest
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.exception import MalformedPacket

from llamacpp_mqtt_deploy.mqtt import paho_fixes

packet: Any = untyped_packet
FIVE, THREE = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311


@pytest.mark.parametrize("version", [FIVE, THREE])
@pytest.mark.parametrize("number", [1, 255, 256, 65535])
def test_an_acknowledgement_without_a_reason_is_read_as_paho_reads_it(version: Any, number: int) -> None:
    body = number.to_bytes(2, "big")
    quick, own = packet.decode_puback(0x40, body, version), packet.decode_pubcomp(0x70, body, version)
    assert (quick.mid, quick.reason.value, quick.reason.is_failure) == (number, own.reason.value, False)
    assert str(quick.properties) == str(own.properties)


def test_an_acknowledgement_with_a_reason_and_properties_keeps_them() -> None:
    refused = packet.decode_puback(0x40, b"\x01\x02\x87", FIVE)
    assert (refused.mid, refused.reason.value, refused.reason.is_failure) == (0x0102, 0x87, True)
    told = packet.decode_puback(0x40, b"\x00\x01\x97\x05\x1f\x00\x02no", FIVE)
    assert (told.mid, told.reason.value, told.properties.ReasonString) == (1, 0x97, "no")
    # One after it has none of this.
    plain = packet.decode_puback(0x40, b"\x00\x02", FIVE)
    assert (plain.mid, plain.reason.value, plain.properties.isEmpty()) == (2, 0, True)


def test_half_an_acknowledgement_is_malformed() -> None:
    for version in (FIVE, THREE):
        with pytest.raises(MalformedPacket):
            packet.decode_puback(0x40, b"\x01", version)


def test_mending_twice_changes_nothing() -> None:
    before = packet.decode_puback
    paho_fixes.mend_paho()
    assert packet.decode_puback is before
