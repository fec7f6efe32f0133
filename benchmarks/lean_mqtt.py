"""An MQTT client with as little work as there can be: one socket, whole packets out of large reads, one send of PUBACKs a read.

It shares the processors with what it measures. A client library reads each packet in several system calls and hands it through
callbacks, which at thousands of packets a second would be counted against the bridge; the direct side's reader has no such cost.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque

from benchmarks.samples import LoadFailed

Received = tuple[float, bytes, bytes]
"""When the read that brought it came back, topic, payload."""

# Not more than this many publishes await their PUBACK: mosquitto's own bound, which it tells clients of MQTT 5.
_IN_FLIGHT = 20
_CONNACK, _PUBLISH, _PUBACK, _SUBACK, _DISCONNECT = 2, 3, 4, 9, 14


class LeanClient:
    """A connection without keep-alive; `received` grows by each message, in order."""

    def __init__(self, port: int, *, protocol: str, client_id: str) -> None:
        self.received: list[Received] = []
        self._five = protocol == "5"
        self._buffer = b""
        self._confirmed: set[int] = set()
        self._last_id = 0
        self._awaited = 0
        self._owed = b""
        self._waiting: deque[bytes] = deque()
        self._socket = socket.create_connection(("127.0.0.1", port), 10.0)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        level = b"\x05" if self._five else b"\x04"
        clean = b"\x02"
        # Protocol name and level, flags, keep-alive 0, then (MQTT 5) no properties, then the client id.
        head = b"\x00\x04MQTT" + level + clean + b"\x00\x00" + (b"\x00" if self._five else b"")
        self._socket.sendall(_packet(0x10, head + _text(client_id.encode())))
        self._await(_CONNACK)

    def subscribe(self, *topics: str, qos: int) -> None:
        """Returns when the broker has confirmed."""
        filters = b"".join(_text(topic.encode()) + bytes([qos]) for topic in topics)
        properties = b"\x00" if self._five else b""
        self._socket.sendall(_packet(0x82, struct.pack("!H", self._next_id()) + properties + filters))
        self._await(_SUBACK)

    def publish(self, topic: str, payload: bytes, *, qos: int) -> None:
        """At QoS 1 it may go out a little later, when earlier ones are acknowledged."""
        number = struct.pack("!H", self._next_id()) if qos else b""
        properties = b"\x00" if self._five else b""
        packet = _packet(0x30 | qos << 1, _text(topic.encode()) + number + properties + payload)
        if qos and self._awaited >= _IN_FLIGHT:
            self._waiting.append(packet)
            return
        self._awaited += qos
        self._socket.sendall(packet)

    def step(self, timeout_s: float, *, ack: bool = True) -> None:
        """Wait for the socket and take in what one read brings; without `ack` what it asks for is sent by `acknowledge`."""
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(262144)
        except TimeoutError:
            return
        at = time.monotonic()
        if not data:
            raise LoadFailed("the broker closed the connection of the benchmark's client")
        answers = self._take(self._buffer + data if self._buffer else data, at)
        self._owed += answers
        if ack:
            self.acknowledge()

    def acknowledge(self) -> None:
        if self._owed:
            owed, self._owed = self._owed, b""
            self._socket.settimeout(10.0)
            self._socket.sendall(owed)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _take(self, data: bytes, at: float) -> bytes:
        """Note every whole packet; what has to be sent for them."""
        acks = []
        start, size = 0, len(data)
        while size - start >= 2:
            length, shift, body = data[start + 1] & 127, 7, start + 2
            while data[body - 1] & 128 and body < size:
                length |= (data[body] & 127) << shift
                shift += 7
                body += 1
            end = body + length
            if end > size or data[body - 1] & 128:
                break
            kind = data[start] >> 4
            if kind == _PUBLISH:
                topic_end = body + 2 + (data[body] << 8 | data[body + 1])
                content = topic_end
                if data[start] & 6:
                    acks.append(b"\x40\x02" + data[content : content + 2])
                    content += 2
                if self._five:
                    # Properties of an event are some 30 bytes: their length is one byte.
                    content += 1 + data[content] if data[content] < 128 else _long(data, content)
                self.received.append((at, data[body + 2 : topic_end], data[content:end]))
            elif kind == _PUBACK:
                self._awaited -= 1
                if self._waiting:
                    self._awaited += 1
                    acks.append(self._waiting.popleft())
            elif kind == _DISCONNECT:
                raise LoadFailed(f"the broker sent the benchmark's client away (reason {data[body:end].hex()})")
            else:
                self._confirmed.add(kind)
                if kind == _CONNACK and data[body + 1]:
                    raise LoadFailed(f"the broker refused the benchmark's client (reason {data[body + 1]})")
            start = end
        self._buffer = data[start:]
        return b"".join(acks)

    def _await(self, kind: int) -> None:
        self._confirmed.discard(kind)
        ends_at = time.monotonic() + 10.0
        while kind not in self._confirmed:
            if time.monotonic() > ends_at:
                raise LoadFailed("the broker did not answer the benchmark's client within 10 s")
            self.step(1.0)

    def _next_id(self) -> int:
        self._last_id = self._last_id % 65535 + 1
        return self._last_id


def _packet(head: int, content: bytes) -> bytes:
    length, digits = len(content), bytearray()
    while True:
        length, digit = divmod(length, 128)
        digits.append(digit | (128 if length else 0))
        if not length:
            return bytes([head]) + bytes(digits) + content


def _text(content: bytes) -> bytes:
    return struct.pack("!H", len(content)) + content


def _long(data: bytes, at: int) -> int:
    """The size of properties whose length takes several bytes, that length included."""
    length = shift = 0
    for size in range(1, 5):
        digit = data[at + size - 1]
        length |= (digit & 127) << shift
        shift += 7
        if not digit & 128:
            return size + length
    raise LoadFailed("a packet with a malformed length")
