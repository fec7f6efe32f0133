"""The way to the broker, step by step: name, port, TLS handshake and certificate."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterator

from llamacpp_mqtt_deploy.checking.findings import Finding, fail, ok, warn
from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.mqtt.tls import build_context

CONNECT_S = 5.0
EXPIRES_SOON_DAYS = 14


def check_network(mqtt: MqttSettings) -> Iterator[Finding]:
    """Find out how far a connection to the broker gets; stops at the first failure."""
    if mqtt.transport == "unix":
        yield _socket_file(mqtt.host)
        return
    port = mqtt.port or (8883 if mqtt.tls.enabled else 1883)
    try:
        addresses = socket.getaddrinfo(mqtt.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host name"
        yield fail("broker.name", f"{mqtt.host} does not resolve ({why})", "check mqtt.host and the name service")
        return
    found = sorted({str(address[4][0]) for address in addresses})
    yield ok("broker.name", f"{mqtt.host} is {', '.join(found[:4])}")
    try:
        sock = socket.create_connection((mqtt.host, port), CONNECT_S)
    except ConnectionRefusedError:
        yield fail(
            "broker.port",
            f"nothing listens at {mqtt.host}:{port}",
            "start the broker, or check mqtt.port; mosquitto without a `listener` line only serves its own machine",
        )
        return
    except OSError as error:
        yield fail("broker.port", f"{mqtt.host}:{port} does not answer ({error})", "check the network and the firewall")
        return
    with sock:
        yield ok("broker.port", f"{mqtt.host}:{port} is open")
        if mqtt.tls.enabled:
            yield from _tls(mqtt, sock)


def _socket_file(path: str) -> Finding:
    if not os.path.exists(path):  # noqa: PTH110 - also right for a path that holds a NUL
        return fail("broker.socket", f"there is no {path}", "start the broker, or check mqtt.host")
    if not os.access(path, os.R_OK | os.W_OK):
        return fail("broker.socket", f"this user may not use {path}", "add the user to the group of the socket")
    return ok("broker.socket", f"{path} is there")


def _tls(mqtt: MqttSettings, sock: socket.socket) -> Iterator[Finding]:
    try:
        context = build_context(mqtt.tls)
    except ValueError as error:
        yield fail("broker.tls", str(error), "mend [mqtt.tls]")
        return
    try:
        with context.wrap_socket(sock, server_hostname=mqtt.host) as wrapped:
            version, certificate = wrapped.version() or "TLS", wrapped.getpeercert()
    except ssl.SSLCertVerificationError as error:
        yield fail(
            "broker.tls",
            f"the broker's certificate is not accepted: {error.verify_message}",
            "set mqtt.tls.ca_file to the authority that signed it, and mqtt.host to a name in it",
        )
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        yield fail("broker.tls", f"no TLS handshake ({reason})", "check that mqtt.port is the broker's TLS port")
        return
    if mqtt.tls.insecure:
        yield warn(
            "broker.tls",
            f"{version}, certificate not verified",
            "remove mqtt.tls.insecure: anyone can pose as the broker",
        )
        return
    yield ok("broker.tls", f"{version}, certificate verified")
    yield from _expiry(certificate)


def _expiry(certificate: object) -> Iterator[Finding]:
    not_after = certificate.get("notAfter") if isinstance(certificate, dict) else None
    if not isinstance(not_after, str):
        return
    days = (ssl.cert_time_to_seconds(not_after) - time.time()) / 86400
    text = f"the broker's certificate is valid for {days:.0f} more days (until {not_after})"
    if days < EXPIRES_SOON_DAYS:
        yield warn("broker.certificate", text, "renew it")
    else:
        yield ok("broker.certificate", text)
