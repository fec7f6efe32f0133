"""A wire to a broker that is played byte by byte: what it is told to read, in which pieces, and what it tells and writes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.paho_wire import Connack, PahoWire
from llamacpp_mqtt_deploy.ports import Delivery, Retained

CONNACKS: dict[Version, bytes] = {"5": b"\x20\x03\x00\x00\x00", "3.1.1": b"\x20\x02\x00\x00"}


class Told:
    """What a wire told its owner, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def connack(self, answer: Connack) -> None:
        self.events.append(answer)

    def puback(self, mid: int, code: int) -> None:
        self.events.append(("puback", mid, code))

    def suback(self, mid: int, codes: Sequence[tuple[int, str]]) -> None:
        self.events.append(("suback", mid, list(codes)))

    def message(self, delivery: Delivery) -> None:
        assert type(delivery.payload) is bytes
        self.events.append(replace(delivery, received_at=0.0))


class Connection:
    """A wire that is connected, and the broker's end of it."""

    def __init__(
        self,
        listener: socket.socket,
        version: Version,
        *,
        own_way: bool = True,
        keepalive_s: int = 60,
        max_incoming_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.told = Told()
        self.problem = ""
        self.wire = PahoWire(
            MqttSettings(host=listener.getsockname(), transport="unix", keepalive_s=keepalive_s),
            version=version,
            client_id="w",
            password=None,
            will=Retained(topic="w/status", payload=b"offline"),
            tls=None,
            events=self.told,
            max_incoming_bytes=max_incoming_bytes,
        )
        if not own_way:
            self.wire._client.on_delivery = None
        self.wire.connect(1, 3)
        self.broker, _ = listener.accept()
        self.broker.setblocking(False)
        self.sent()
        self.feed(CONNACKS[version])

    def sent(self) -> bytes:
        """What the wire has written since the last look."""
        self.wire.on_writable()
        try:
            return self.broker.recv(100_000)
        except BlockingIOError:
            return b""

    def feed(self, raw: bytes) -> bool:
        """Let the wire read this as one piece; False when its life is over."""
        try:
            if raw:
                self.broker.sendall(raw)
                self.wire.on_readable()
            while self.wire.wants_read():
                self.wire.on_readable()
        except Exception as error:  # noqa: BLE001 - whatever paho raises
            self.problem = repr(error)
        return not self.problem and self.wire.closed is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wire.abort()
        self.broker.close()


@contextlib.contextmanager
def listening(folder: Path) -> Iterator[socket.socket]:
    """A socket that wires can connect to."""
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.bind(str(folder / "socket"))
        waiting.listen()
        yield waiting


def varint(number: int) -> bytes:
    digits = bytearray()
    while True:
        number, digit = divmod(number, 128)
        digits.append(digit | 0x80 if number else digit)
        if not number:
            return bytes(digits)


def block(content: bytes) -> bytes:
    return len(content).to_bytes(2, "big") + content
