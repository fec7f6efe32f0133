"""How a connection becomes a websocket for MQTT: the handshake (RFC 6455, section 4; MQTT 5.0, section 6), the client's side.

paho's own waits for the answer as long as the other side likes, a byte at a time.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import ssl
import time
from urllib.parse import quote

MOST_HEAD_BYTES = 16_384
_ACCEPT_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PATH = "/?%:@!$&'()*+,;=-._~"
"""What stands for itself in a path with a query (RFC 3986)."""


class UpgradeError(OSError):
    """There is no websocket for MQTT. The text goes on after "the other side"; `status` is that of its HTTP answer, if it gave one."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


def upgrade(sock: socket.socket, host: str, port: int, *, path: str, timeout_s: float) -> bytes:
    """Ask for a websocket on a new connection (TCP or TLS); what has come behind the answer, which belongs to `websocket_frames.Frames`.

    Raises UpgradeError, also when there is no answer within `timeout_s`, and OSError. Changes the socket's timeout.
    """
    key = base64.b64encode(os.urandom(16))
    ends_at = time.monotonic() + timeout_s
    try:
        sock.settimeout(timeout_s)
        sock.sendall(_request(sock, host, port, path, key))
        head, rest = _head_of_answer(sock, ends_at)
    except TimeoutError:
        raise UpgradeError(f"did not answer within {timeout_s:g} s") from None
    except ConnectionError:
        raise UpgradeError("hung up") from None
    _check(head.decode("latin-1"), key)
    return rest


def _head_of_answer(sock: socket.socket, ends_at: float) -> tuple[bytes, bytes]:
    """The head of an HTTP answer without its last empty line, and what has come behind it. Raises TimeoutError at `ends_at`, ConnectionError."""
    read = b""
    while (left_s := ends_at - time.monotonic()) > 0.0:
        sock.settimeout(left_s)
        more = sock.recv(4096)
        if not more:
            raise ConnectionAbortedError
        read += more
        head, end, rest = read.partition(b"\r\n\r\n")
        if end:
            return head, rest
        if len(read) > MOST_HEAD_BYTES:
            raise UpgradeError("does not answer in HTTP")
    raise TimeoutError


def _request(sock: socket.socket, host: str, port: int, path: str, key: bytes) -> bytes:
    at = f"[{host}]" if ":" in host else host
    scheme, usual = ("https", 443) if isinstance(sock, ssl.SSLSocket) else ("http", 80)
    if port != usual:
        at += f":{port}"
    return (
        f"GET {quote(path, safe=_PATH)} HTTP/1.1\r\nHost: {at}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: {scheme}://{at}\r\n"
        f"Sec-WebSocket-Key: {key.decode()}\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n"
    ).encode()


def _check(head: str, key: bytes) -> None:
    """Raise UpgradeError unless this answer's head agrees to what was asked (RFC 6455, section 4.1)."""
    status_line, *lines = head.split("\r\n")
    version, _, rest = status_line.partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or len(status) != 3 or not status.isdecimal():
        raise UpgradeError("does not answer in HTTP")
    if status != "101":
        raise UpgradeError(f"answered {status} {ascii(reason[:80])[1:-1]}".rstrip(), int(status))
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    # SHA-1 is what the standard asks for: it proves that the other side knows websockets, nothing else.
    accept = base64.b64encode(hashlib.sha1(key + _ACCEPT_SUFFIX, usedforsecurity=False).digest()).decode()
    wanted = [part.strip().lower() for part in fields.get("connection", "").split(",")]
    if fields.get("upgrade", "").lower() != "websocket" or "upgrade" not in wanted:
        raise UpgradeError("did not change to a websocket", 101)
    if fields.get("sec-websocket-accept") != accept:
        raise UpgradeError("answered another handshake than ours", 101)
    if fields.get("sec-websocket-protocol", "mqtt") != "mqtt" or "sec-websocket-extensions" in fields:
        raise UpgradeError("agreed to another protocol than MQTT", 101)
