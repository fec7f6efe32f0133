"""Each refusal is one sentence that says what happened and what to do."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.mqtt import explain

WHERE = "bus.example:8883"


def codes_of(packet: int) -> list[int]:
    return [
        code
        for code, names in ReasonCode.names.items()
        if code >= 0x80 and any(packet in packets for packets in names.values())
    ]


@pytest.mark.parametrize("code", codes_of(PacketTypes.CONNACK))
def test_every_reason_of_a_connack_has_its_sentence(code: int) -> None:
    assert explain.of_connack(code, "?").text != explain.of_connack(0xFE, "?").text


@pytest.mark.parametrize("code", codes_of(PacketTypes.SUBACK))
def test_every_reason_of_a_suback_has_its_words(code: int) -> None:
    assert "?" not in explain.of_suback(code, "?")


@given(st.integers(0, 255), st.text(max_size=30))
def test_unknown_codes_are_told_with_their_name(code: int, name: str) -> None:
    for text in (
        explain.of_connack(code, name).text,
        explain.of_disconnect(code, name).text,
        explain.of_puback(code, name),
        explain.of_suback(code, name),
    ):
        assert text


@pytest.mark.parametrize(
    "error,words,person",
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), ("Nothing listens", WHERE), False),
        (TimeoutError("timed out"), ("timeout", "firewall"), False),
        (socket.gaierror(socket.EAI_NONAME, "x"), ("mqtt.host",), True),
        (socket.gaierror(socket.EAI_AGAIN, "x"), ("DNS",), False),
        (OSError(errno.EHOSTUNREACH, "x"), ("network",), False),
        (PermissionError(errno.EACCES, "x"), ("access",), True),
        (FileNotFoundError(errno.ENOENT, "x"), ("no socket",), False),
        (OSError(errno.EMFILE, "x"), ("LimitNOFILE",), False),
        (OSError(errno.EIO, "Input/output error"), ("Input/output error",), False),
        (ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] x"), ("mqtt.tls.cert_file",), True),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), ("mqtt.tls.enabled",), True),
        (ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] x"), ("authority of our client certificate",), True),
        (ssl.SSLEOFError(8, "EOF occurred"), ("TLS on this port",), True),
        (RuntimeError("odd"), ("odd",), True),
    ],
)
def test_what_connecting_raises_becomes_a_sentence(error: Exception, words: tuple[str, ...], person: bool) -> None:
    refusal = explain.of_exception(error, WHERE)
    assert all(word in refusal.text for word in words), refusal.text
    assert refusal.needs_person is person


def test_silence_hints_at_tls_only_where_tls_is_off() -> None:
    assert "mqtt.tls.enabled" in explain.of_silence(WHERE, tls=False).text
    assert "mqtt.tls.enabled" not in explain.of_silence(WHERE, tls=True).text
