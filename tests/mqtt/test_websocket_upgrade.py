"""The handshake of a websocket: what is asked, what is agreed to, and how a refusal is said."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from websockets.frames import Frame, Opcode

from llamacpp_mqtt_deploy.mqtt.websocket_upgrade import MOST_HEAD_BYTES, UpgradeError, upgrade


@contextmanager
def _answering(answer: Callable[[socket.socket, str], None]) -> Iterator[socket.socket]:
    """A connection to somebody who answers our request by this function, which gets the request's head."""
    here, there = socket.socketpair()

    def serve() -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += there.recv(4096)
        answer(there, request.decode())

    with here, there:
        thread = threading.Thread(target=serve, name="answering")
        thread.start()
        try:
            yield here
        finally:
            here.close()
            thread.join(10)


def _accept(request: str) -> str:
    key = next(line for line in request.split("\r\n") if line.startswith("Sec-WebSocket-Key: ")).partition(": ")[2]
    proof = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode(), usedforsecurity=False).digest()
    return base64.b64encode(proof).decode()


def _agreeing(
    request: str, *, more: str = "", upgrade: str = "websocket", accept: str | None = None, protocol: str = "mqtt"
) -> bytes:
    return (
        f"HTTP/1.1 101 Switching Protocols\r\nUPGRADE: {upgrade}\r\nconnection: keep-alive, Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept or _accept(request)}\r\nSec-WebSocket-Protocol: {protocol}\r\n{more}\r\n"
    ).encode()


def _asked(answer: Callable[[str], bytes], **arguments: object) -> bytes:
    with _answering(lambda there, request: there.sendall(answer(request))) as here:
        options = {"host": "broker", "port": 8083, "path": "/mqtt", "timeout_s": 5.0} | arguments
        return upgrade(here, **options)  # type: ignore[arg-type]


def test_what_comes_behind_the_answer_is_not_lost() -> None:
    ping = Frame(Opcode.PING, b"?").serialize(mask=False, extensions=[])
    assert _asked(lambda request: _agreeing(request) + ping) == ping


@pytest.mark.parametrize(
    "host, port, path, line, where",
    [
        ("broker", 8083, "/mqtt", "/mqtt", "broker:8083"),
        ("broker", 80, "/a/b?token=x%2F&c=1", "/a/b?token=x%2F&c=1", "broker"),
        ("fe80::1", 9001, "/", "/", "[fe80::1]:9001"),
        ("broker", 8083, "/ü x\r\nEvil: 1#", "/%C3%BC%20x%0D%0AEvil:%201%23", "broker:8083"),
    ],
)
def test_the_request_names_path_and_host(host: str, port: int, path: str, line: str, where: str) -> None:
    seen: list[str] = []

    def answer(request: str) -> bytes:
        seen.append(request)
        return _agreeing(request)

    assert _asked(answer, host=host, port=port, path=path) == b""
    lines = seen[0].split("\r\n")
    assert lines[0] == f"GET {line} HTTP/1.1"
    assert f"Host: {where}" in lines
    assert "Sec-WebSocket-Protocol: mqtt" in lines
    assert not any(one.startswith("Evil") for one in lines)


@pytest.mark.parametrize(
    "answer, words, status",
    [
        (lambda _: b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404 Not Found", 404),
        (lambda _: b"HTTP/1.1 503\r\n\r\n", "answered 503", 503),
        (lambda _: b"HTTP/1.1 403 \x1b[31m\xfc\r\n\r\n", r"answered 403 \\x1b\[31m\\xfc", 403),
        (lambda _: b"HTTP/1.1 200 OK\r\n\r\n", "answered 200 OK", 200),
        (lambda _: b"220 mail.example ESMTP\r\n\r\n", "does not answer in HTTP", None),
        (lambda _: b"x" * (MOST_HEAD_BYTES + 5000), "does not answer in HTTP", None),
        (lambda request: _agreeing(request, upgrade="h2c"), "did not change to a websocket", 101),
        (lambda request: _agreeing(request, accept="AAAA"), "another handshake", 101),
        (lambda request: _agreeing(request, protocol="wamp"), "another protocol", 101),
        (lambda request: _agreeing(request, more="Sec-WebSocket-Extensions: x-zip\r\n"), "another protocol", 101),
    ],
    ids=["path", "no-reason", "escapes", "web-page", "mail", "endless", "upgrade", "accept", "protocol", "extension"],
)  # fmt: skip
def test_a_refusal_is_said(answer: Callable[[str], bytes], words: str, status: int | None) -> None:
    with pytest.raises(UpgradeError, match=words) as caught:
        _asked(answer)
    assert caught.value.status == status


def test_who_hangs_up_or_stays_silent_is_told_from_one_another() -> None:
    with _answering(lambda there, _: there.close()) as here, pytest.raises(UpgradeError, match="hung up"):
        upgrade(here, "broker", 80, path="/mqtt", timeout_s=5.0)
    with (
        _answering(lambda there, _: there.recv(1)) as here,  # type: ignore[arg-type]
        pytest.raises(UpgradeError, match=r"did not answer within 0\.2 s"),
    ):
        upgrade(here, "broker", 80, path="/mqtt", timeout_s=0.2)


def test_an_answer_that_never_ends_does_not_hold_up_the_worker() -> None:
    # A byte now and then: each read is in time, the whole is not.
    def drip(there: socket.socket, _request: str) -> None:
        there.sendall(b"HTTP/1.1 101 ")
        with contextlib.suppress(OSError):
            while True:
                there.sendall(b"x")
                time.sleep(0.02)

    with _answering(drip) as here, pytest.raises(UpgradeError, match=r"did not answer within 0\.5 s"):
        upgrade(here, "broker", 80, path="/mqtt", timeout_s=0.5)
