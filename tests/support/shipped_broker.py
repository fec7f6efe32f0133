"""A real mosquitto with the configuration and the access list that we ship, and people who try what they may do there."""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import ssl
import subprocess
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.support.ports import free_port
from tests.support.services import require_program
from tests.support.waiting import eventually

CONFIG = Path(__file__).parents[2] / "config"
REFUSED = "Not authorized"


class ShippedBroker:
    """config/mosquitto.conf and config/mosquitto.acl with only paths and ports replaced.

    Each user's password is `NAME-password`. With `tls` (ca, certificate, key) the marks are taken off the TLS lines as the file
    says, those of client certificates too; `tls_port` is its port then.
    """

    def __init__(self, folder: Path, users: Iterable[str], *, tls: tuple[Path, Path, Path] | None = None) -> None:
        self._folder = folder
        self._users = tuple(users)
        self._tls = tls
        self.port = free_port()
        self.tls_port = free_port()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        mosquitto, mosquitto_passwd = require_program("mosquitto"), require_program("mosquitto_passwd")
        passwords = self._folder / "passwd"
        passwords.write_text("".join(f"{user}:{user}-password\n" for user in self._users))
        passwords.chmod(0o600)
        subprocess.run([mosquitto_passwd, "-U", str(passwords)], check=True, capture_output=True, timeout=60)
        acl = self._folder / "acl"
        acl.write_text((CONFIG / "mosquitto.acl").read_text())
        acl.chmod(0o600)
        # Started by root it would become the user mosquitto, who may not read the test's folder.
        (self._folder / "mosquitto.conf").write_text(f"{self._text(passwords, acl)}\nuser root\n")
        self._process = subprocess.Popen(
            [mosquitto, "-c", str(self._folder / "mosquitto.conf")], stderr=subprocess.PIPE, text=True
        )
        eventually(self._answers, 10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.communicate(timeout=10)

    def _text(self, passwords: Path, acl: Path) -> str:
        text = (CONFIG / "mosquitto.conf").read_text()
        replaced = [
            ("/etc/mosquitto/passwd", str(passwords)),
            ("/etc/mosquitto/mosquitto.acl", str(acl)),
            ("listener 1883 ", f"listener {self.port} "),
            ("/var/lib/mosquitto/", f"{self._folder}/"),
        ]
        if self._tls is not None:
            ca, cert, key = self._tls
            marked = "listener 8883|certfile|keyfile|cafile|tls_version|require_certificate|use_identity_as_username"
            text = re.sub(rf"(?m)^#({marked})", r"\1", text)
            replaced += [
                ("listener 8883", f"listener {self.tls_port} 127.0.0.1"),
                ("/etc/mosquitto/certs/server.crt", str(cert)),
                ("/etc/mosquitto/certs/server.key", str(key)),
                ("/etc/mosquitto/certs/ca.crt", str(ca)),
            ]
        for old, new in replaced:
            text, count = re.subn(rf"(?m)^(?!#)(.*){re.escape(old)}", rf"\g<1>{new}", text)
            assert count == 1, old
        return text

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._process.stderr.read() if self._process.stderr else ""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@dataclass
class Person:
    """A connected client that knows the broker's verdict on each publish (on MQTT 5)."""

    name: str
    port: int
    client_id: str = ""
    keeps_session: bool = False
    tls: ssl.SSLContext | None = None
    inbox: queue.Queue[tuple[str, bytes]] = field(default_factory=queue.Queue)
    verdicts: dict[int, str] = field(default_factory=dict)
    connack: Any = None
    online: threading.Event = field(default_factory=threading.Event)
    subscribed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, self.client_id, protocol=mqtt.MQTTv5)
        self.client.username_pw_set(self.name, f"{self.name}-password")
        self.client.on_connect = self._on_connect
        self.client.on_message = lambda _c, _u, message: self.inbox.put((message.topic, bytes(message.payload)))
        self.client.on_publish = lambda _c, _u, mid, code, _p: self.verdicts.__setitem__(mid, str(code))
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        if self.tls is not None:
            self.client.tls_set_context(self.tls)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 300 if self.keeps_session else 0
        self.client.connect("127.0.0.1", self.port, clean_start=not self.keeps_session, properties=properties)
        self.client.loop_start()
        assert self.online.wait(10)

    def _on_connect(self, _c: Any, _u: Any, _f: Any, code: Any, properties: Any) -> None:
        self.connack = (str(code), properties)
        self.online.set()

    def publish(self, topic: str, payload: bytes = b"x") -> str:
        mid = self.client.publish(topic, payload, qos=1).mid
        eventually(lambda: mid in self.verdicts, 10)
        return self.verdicts[mid]

    def subscribe(self, topic: str) -> None:
        self.subscribed.clear()
        self.client.subscribe(topic, qos=1)
        assert self.subscribed.wait(10)

    def read_until(self, last: bytes) -> list[tuple[str, bytes]]:
        """What came before the message with this payload."""
        found: list[tuple[str, bytes]] = []
        while not found or found[-1][1] != last:
            found.append(self.inbox.get(timeout=10))
        return found[:-1]

    def vanish(self) -> None:
        """Lose the connection without a word."""
        self.client.loop_stop()
        wire = self.client.socket()
        assert wire is not None
        wire.close()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def leave_a_will(port: int, name: str, topic: str, payload: bytes) -> None:
    """Connect with this will, where the broker takes it, and lose the connection."""

    def text(value: str | bytes) -> bytes:
        data = value.encode() if isinstance(value, str) else value
        return len(data).to_bytes(2, "big") + data

    # MQTT 3.1.1, section 3.1: clean session, will, user name and password.
    body = text("MQTT") + b"\x04\xc6\x00\x3c" + text(f"ghost-{uuid.uuid4().hex[:8]}")
    body += text(topic) + text(payload) + text(name) + text(f"{name}-password")
    size = bytes([len(body) % 128 | 0x80, len(body) // 128]) if len(body) > 127 else bytes([len(body)])
    with socket.create_connection(("127.0.0.1", port), 5) as wire:
        wire.sendall(b"\x10" + size + body)
        wire.recv(4)
