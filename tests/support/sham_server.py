"""A server of a few lines that answers HTTP requests with exactly the bytes a test wants, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Self

from tests.support.waiting import eventually

Answer = bytes | threading.Event | Callable[[socket.socket], None]
"""Bytes to send; an event to wait for; or something to do with the connection. The connection closes after the last."""

PROPS = {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 2, "model_alias": "sham", "chat_template": ""}


def reply(status: int, body: object = b"", *, kind: str = "application/json", headers: str = "") -> bytes:
    """A whole HTTP reply with a Content-Length."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
    return head.encode() + content


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "finish_reason": finish_reason, "delta": fields}]})


def stream(*contents: bytes) -> bytes:
    """A whole chunked stream with each of these in a chunk of its own."""
    return STREAM + b"".join(map(chunk, contents)) + END


class ShamServer:
    """Listens on a free port of 127.0.0.1. `answers[path]` are given in turn, the last one again and again."""

    def __init__(self, tls: ssl.SSLContext | None = None, listener: socket.socket | None = None) -> None:
        self.answers: dict[str, deque[tuple[Answer, ...]]] = {}
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        """Path, headers with lower-case names and JSON body of each request."""
        self.hung_up = threading.Event()
        """A client went away while an answer waited."""
        self._tls = tls
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.on("/props", reply(200, PROPS))

    def on(self, path: str, *answers: Answer | tuple[Answer, ...]) -> None:
        self.answers[path] = deque(answer if isinstance(answer, tuple) else (answer,) for answer in answers)

    def bodies(self, path: str = "/v1/chat/completions") -> list[Any]:
        return [body for asked, _, body in self.asked if asked == path]

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name="sham", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            path = self._receive(connection)
            if path is None:
                return
            self._answer(connection, self._next(path))
        except OSError:
            self.hung_up.set()
        finally:
            connection.close()

    def _receive(self, connection: socket.socket) -> str | None:
        received = b""
        while b"\r\n\r\n" not in received:
            more = connection.recv(65536)
            if not more:
                return None
            received += more
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(body) < int(headers.get("content-length", 0)):
            body += connection.recv(65536)
        path = first.split(" ")[1]
        self.asked.append((path, headers, json.loads(body) if body else None))
        return path

    def _next(self, path: str) -> Iterable[Answer]:
        answers = self.answers.get(path)
        if answers is None:
            return (reply(404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}),)
        return answers.popleft() if len(answers) > 1 else answers[0]

    def _answer(self, connection: socket.socket, answer: Iterable[Answer]) -> None:
        for step in answer:
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, threading.Event):
                self._hold(connection, step)
            else:
                step(connection)

    def _hold(self, connection: socket.socket, step: threading.Event) -> None:
        connection.setblocking(False)
        try:
            eventually(lambda: step.is_set() or self._closing.is_set() or self._gone(connection), 30)
        finally:
            connection.settimeout(None)

    def _gone(self, connection: socket.socket) -> bool:
        try:
            gone = connection.recv(1) == b""
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            gone = True
        if gone:
            self.hung_up.set()
        return gone


def reset(connection: socket.socket) -> None:
    """End the connection with a RST, as a process that is killed with unread data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()
