"""What is mended in paho: its answers stay the same where they were right."""

from __future__ import annotations

from typing import Any

import paho.mqtt.properties as untyped_properties
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.mqtt import paho_fixes

properties: Any = untyped_properties


def test_mending_twice_changes_nothing() -> None:
    before = (
        properties.readUTF,
        {code: {name: list(of) for name, of in ReasonCode.names[code].items()} for code in (0x95,)},
    )
    paho_fixes.mend_paho()
    after = (
        properties.readUTF,
        {code: {name: list(of) for name, of in ReasonCode.names[code].items()} for code in (0x95,)},
    )
    assert after == before


def test_a_refusal_for_its_size_has_a_name() -> None:
    assert str(ReasonCode(PacketTypes.PUBACK, identifier=0x95)) == "Packet too large"


def test_a_property_with_a_byte_order_mark_is_read() -> None:
    assert properties.readUTF(b"\x00\x03\xef\xbb\xbf", 5) == ("\ufeff", 5)
