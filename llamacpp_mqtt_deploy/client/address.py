"""Where a client's broker is, and sentences for a person when it cannot be used."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paho.mqtt.reasoncodes import ReasonCode

from llamacpp_mqtt_deploy.mqtt.websocket_upgrade import UpgradeError

Transport = Literal["tcp", "websockets", "unix"]
Version = Literal["auto", "5", "3.1.1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerAddress:
    """Where the broker is and who we are. `tls` is a ready context, or None for a plain connection."""

    host: str = "localhost"
    port: int | None = None
    transport: Transport = "tcp"
    websocket_path: str = "/mqtt"
    protocol: Version = "auto"
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    client_id: str | None = None
    keepalive_s: int = 30
    connect_timeout_s: float = 10.0

    def __repr__(self) -> str:  # the password must not reach a log or a traceback
        return f"BrokerAddress({self})"

    def __str__(self) -> str:
        if self.transport == "unix":
            return f"unix:{self.host}"
        scheme = {"tcp": "mqtt", "websockets": "ws"}[self.transport] + ("s" if self.tls else "")
        return f"{scheme}://{self.host}:{self.effective_port}"

    @property
    def effective_port(self) -> int:
        return self.port or (8883 if self.tls else 1883)


def tls_context(
    *,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    insecure: bool = False,
) -> ssl.SSLContext:
    """A client context: TLS 1.2 or newer, certificate and host name verified unless `insecure`. Raises ValueError."""
    from llamacpp_mqtt_deploy.config.settings import TlsSettings  # noqa: PLC0415
    from llamacpp_mqtt_deploy.mqtt.tls import build_context  # noqa: PLC0415 - loads pydantic, for those who use TLS

    files = {"ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    paths = {name: None if file is None else Path(file) for name, file in files.items()}
    return build_context(TlsSettings(enabled=True, insecure=insecure, **paths))


def not_permitted(verb: str, topic: str, address: BrokerAddress, reason: str) -> str:
    who = f"User {address.username!r}" if address.username else "A client without a user name"
    return f"{who} may not {verb} {topic} at {address} ({reason}). Check the broker's access list."


def explain_failure(error: Exception, address: BrokerAddress) -> str:
    """Why there is no connection, and what to look at."""
    where = str(address)
    match error:
        case socket.gaierror() | UnicodeError():
            return f"The name of the broker, {address.host!r}, does not resolve. Check mqtt.host and the name service."
        case ssl.SSLCertVerificationError():
            return f"The certificate of the broker at {where} is not accepted: {error.verify_message}. Check mqtt.tls.ca_file."
        case ssl.SSLError():
            reason = getattr(error, "reason", None) or error
            return f"TLS with the broker at {where} failed ({reason}). Is the port right, and is it a TLS port?"
        case ConnectionResetError() if address.tls:
            return f"The broker at {where} closed the connection during the TLS handshake. Is it a TLS port?"
        case ConnectionRefusedError():
            return f"Nothing listens at {where}. Is the broker running, and is the port right?"
        case FileNotFoundError():
            return f"There is no socket {address.host!r}. Is the broker running, and is the path right?"
        case PermissionError():
            return f"This user may not open the socket {address.host!r}."
        case UpgradeError():
            return f"No MQTT websocket at {where}: the other side {error}. Check mqtt.port, mqtt.websocket_path, and a proxy before it."
        case TimeoutError():
            return f"The broker at {where} did not answer in time. Check the host, the network and the firewall."
        case _:
            return f"No connection to the broker at {where}: {error}."


def explain_refusal(reason: ReasonCode, address: BrokerAddress) -> str:
    """Why the broker said no at CONNECT, and what to look at."""
    who = f"user {address.username!r}" if address.username else "a client without a user name"
    match reason.value:
        case 0x84:
            return f"The broker at {address} does not speak MQTT {address.protocol}. Set mqtt.protocol to auto."
        case 0x86 | 0x87:
            check = "Check mqtt.username and the password" if address.username else "Set mqtt.username and a password"
            return f"The broker at {address} refuses {who}: {reason}. {check}."
        case 0x85:
            return f"The broker at {address} refuses the client id: {reason}."
        case 0x88 | 0x89:
            return f"The broker at {address} is not available or busy: {reason}. Try again later."
        case _:
            return f"The broker at {address} refuses {who}: {reason}."
