"""A WebSocket by hand: a plain socket after its handshake, and frames as no library would send them."""

from __future__ import annotations

import base64
import contextlib
import socket

TEXT, BINARY, CLOSE, PING, PONG, CONT = 1, 2, 8, 9, 10, 0

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: " + base64.b64encode(b"sixteen bytes ok") + b"\r\n"
)


def frame(opcode: int, data: bytes = b"", *, fin: bool = True, masked: bool = True, rsv: int = 0) -> bytes:
    """One frame (RFC 6455, section 5.2), masked with zeros."""
    first = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    mask = 0x80 if masked else 0
    if len(data) < 126:
        size = bytes([mask | len(data)])
    elif len(data) < 65536:
        size = bytes([mask | 126]) + len(data).to_bytes(2, "big")
    else:
        size = bytes([mask | 127]) + len(data).to_bytes(8, "big")
    return first + size + (b"\0\0\0\0" if masked else b"") + data


def plain(port: int, timeout_s: float = 10.0) -> socket.socket:
    wire = socket.create_connection(("127.0.0.1", port), timeout_s)
    wire.settimeout(timeout_s)
    return wire


def upgraded(port: int) -> socket.socket:
    """A socket on which frames may be sent."""
    wire = plain(port)
    wire.sendall(UPGRADE + b"\r\n")
    head = b""
    while b"\r\n\r\n" not in head:
        part = wire.recv(4096)
        assert part, head
        head += part
    assert head.startswith(b"HTTP/1.1 101 "), head
    return wire


def rest(wire: socket.socket) -> bytes:
    """All until the other side closes; raises TimeoutError when it does not."""
    seen = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := wire.recv(65536):
            seen += part
    return bytes(seen)


def close_code(answer: bytes) -> int | None:
    """The code of the close frame that ends these frames of a server; None without one."""
    at = 0
    while at + 2 <= len(answer):
        opcode, size = answer[at] & 15, answer[at + 1] & 127
        at += 2
        if size == 126:
            size, at = int.from_bytes(answer[at : at + 2], "big"), at + 2
        elif size == 127:
            size, at = int.from_bytes(answer[at : at + 8], "big"), at + 8
        if opcode == CLOSE:
            return int.from_bytes(answer[at : at + 2], "big")
        at += size
    return None


def until(wire: socket.socket, word: bytes) -> bytes:
    seen = b""
    while word not in seen:
        part = wire.recv(65536)
        assert part, seen
        seen += part
    return seen
