"""An engine with a pace, as a process of its own: it passes for a llama.cpp server and says `word` so many times a second.

`python -m benchmarks.pace TOKENS_PER_S SLOTS` prints its port. 0 tokens a second: as fast as they can be sent. One thread; each
token is an event in an HTTP chunk of its own, in the bytes of llama.cpp. It ends when its standard input does.
"""

from __future__ import annotations

import heapq
import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
_TAIL = (
    b'}}],"created":1795264984,"id":"chatcmpl-RZkxm0dxMpmfhThPV8CSBHDq1WxZb0Cm","model":"pace",'
    b'"system_fingerprint":"b0-unknown","object":"chat.completion.chunk"}\n\n'
)


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


_OPEN = _chunk(b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null' + _TAIL)
_TOKEN = _chunk(b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" word"' + _TAIL)


def _end(tokens: int) -> bytes:
    usage = {"completion_tokens": tokens, "prompt_tokens": 20, "total_tokens": tokens + 20}
    last = {"choices": [], "object": "chat.completion.chunk", "usage": usage, "timings": {"predicted_n": tokens}}
    return (
        _chunk(b'data: {"choices":[{"finish_reason":"length","index":0,"delta":{' + _TAIL)
        + _chunk(b"data: " + json.dumps(last, separators=(",", ":")).encode() + b"\n\n")
        + _chunk(b"data: [DONE]\n\n")
        + b"0\r\n\r\n"
    )


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    received: bytes = b""
    unsent: bytes = b""
    left: int = 0
    tokens: int = 0
    last: bool = False


class PacedEngine:
    """Serves until standard input ends."""

    def __init__(self, tokens_per_s: float, slots: int) -> None:
        self._pause_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._props = {
            "default_generation_settings": {"n_ctx": 8192},
            "total_slots": slots,
            "model_alias": "pace",
            "chat_template": "",
            "build_info": "pace",
        }
        self._selector = selectors.DefaultSelector()
        self._due: list[tuple[float, int, _Connection]] = []
        self._count = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    def serve(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        print(self._listener.getsockname()[1], flush=True)
        while True:
            for key, mask in self._selector.select(self._pause()):
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif mask & selectors.EVENT_WRITE:
                    self._send(key.data, b"")
                else:
                    self._read(key.data)
            self._say_what_is_due()

    def _pause(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _accept(self) -> None:
        made, _ = self._listener.accept()
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(made, selectors.EVENT_READ, _Connection(made))

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        connection.received += data
        head, blank, content = connection.received.partition(b"\r\n\r\n")
        if not blank:
            return
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if len(content) < (int(lengths[0].partition(b":")[2]) if lengths else 0):
            return
        connection.received = b""
        if head.startswith(b"POST /v1/chat/completions"):
            self._begin(connection, int(json.loads(content).get("max_tokens", 100)))
        else:
            self._answer(connection, head.split(b" ", 2)[1])

    def _begin(self, connection: _Connection, tokens: int) -> None:
        connection.left = connection.tokens = tokens
        if not self._pause_s:
            connection.left, connection.last = 0, True
            self._send(connection, _HEAD + _OPEN + _TOKEN * tokens + _end(tokens))
            return
        self._send(connection, _HEAD + _OPEN)
        self._plan(connection, time.monotonic() + self._pause_s)

    def _plan(self, connection: _Connection, at: float) -> None:
        self._count += 1
        heapq.heappush(self._due, (at, self._count, connection))

    def _say_what_is_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            at, _, connection = heapq.heappop(self._due)
            if connection.socket.fileno() < 0:
                continue
            connection.left -= 1
            if connection.left:
                self._send(connection, _TOKEN)
                self._plan(connection, at + self._pause_s)
            else:
                connection.last = True
                self._send(connection, _TOKEN + _end(connection.tokens))

    def _answer(self, connection: _Connection, path: bytes) -> None:
        known: dict[bytes, object] = {b"/health": {"status": "ok"}, b"/props": self._props, b"/slots": []}
        status, document = ("200 OK", known[path]) if path in known else ("404 Not Found", {"error": {"code": 404}})
        content = json.dumps(document).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        self._send(connection, head.encode() + content)

    def _send(self, connection: _Connection, data: bytes) -> None:
        unsent = connection.unsent + data
        try:
            unsent = unsent[connection.socket.send(unsent) :] if unsent else b""
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)
            return
        connection.unsent = unsent
        if not unsent and connection.last:
            self._close(connection)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
        self._selector.modify(connection.socket, wanted, connection)

    def _close(self, connection: _Connection) -> None:
        if connection.socket.fileno() >= 0:
            self._selector.unregister(connection.socket)
            connection.socket.close()


if __name__ == "__main__":
    PacedEngine(float(sys.argv[1]), int(sys.argv[2])).serve()
