"""A bare relay, to know what this machine and Python allow: one thread, one selector, a journal of two commits a request.

`python -m benchmarks.relay BROKER_PORT ENGINE_PORT ROOT FOLDER PAUSE_S [checked]` prints `ready` first and serves until it is killed. It takes a
request as the worker does (subscription with QoS 1, journal before the acknowledgement and the first event), asks the same
server, and publishes `start`, joined chunks and `done`. It has none of what makes a worker: no checks, no history, no limits,
no cancel, no recovery, no flow control, no errors; two clients' answers are told apart, and that is all. `checked` adds the worker's own
checks (`benchmarks/checks.py`), in the same thread.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sqlite3
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.direct import request
from benchmarks.lean_mqtt import LeanClient

_TOKEN = re.compile(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")')
_USAGE = re.compile(rb'"usage":(\{.*?\})(?:,"timings"|\}\n)', re.DOTALL)
_LAST = b"\r\n0\r\n\r\n"


@dataclass(slots=True)
class _Answer:
    session: str
    request_id: str
    socket: socket.socket
    waiting: list[str] = field(default_factory=list)
    tail: bytes = b""
    text: list[str] = field(default_factory=list)
    seq: int = 0
    sent_at: float = 0.0


Read = Callable[[str, bytes], tuple[str, str, bytes]]
"""From a request's topic and payload: its session, its id and the body for the engine."""


def _unchecked(topic: str, payload: bytes) -> tuple[str, str, bytes]:
    asked: dict[str, Any] = json.loads(payload)
    wanted = {
        "messages": [{"role": "user", "content": asked["prompt"]}],
        "max_tokens": asked["max_tokens"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return topic.rsplit("/", 1)[1], asked["request_id"], json.dumps(wanted).encode()


class Relay:
    def __init__(
        self, broker: int, engine: int, root: str, folder: str, pause_s: float, read: Read = _unchecked
    ) -> None:
        self._read_request = read
        self._engine, self._root, self._pause_s = engine, root, pause_s
        self._client = LeanClient(broker, protocol="5", client_id=f"relay-{root}")
        self._client.subscribe(f"{root}/request/#", qos=1)
        self._journal = sqlite3.connect(f"{folder}/relay.db", isolation_level=None)
        self._journal.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS requests"
            " (id TEXT PRIMARY KEY, session TEXT, payload BLOB, ended BLOB) WITHOUT ROWID"
        )
        self._poll = select.epoll()
        self._poll.register(self._client.fileno(), select.EPOLLIN)
        self._answers: dict[int, _Answer] = {}
        self._paused: dict[int, _Answer] = {}

    def serve(self) -> None:
        while True:
            due = min((answer.sent_at + self._pause_s for answer in self._paused.values()), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            for fd, events in self._poll.poll(timeout):
                if fd == self._client.fileno():
                    self._hear()
                elif events & ~select.EPOLLIN or fd not in self._paused:
                    self._read(self._answers[fd])
            now = time.monotonic()
            for answer in [each for each in self._paused.values() if now >= each.sent_at + self._pause_s]:
                self._read(answer)

    def _hear(self) -> None:
        self._client.step(1.0, ack=False)
        for _, topic, payload in self._client.received:
            self._accept(topic.decode(), payload)
        self._client.received.clear()
        self._client.acknowledge()

    def _accept(self, topic: str, payload: bytes) -> None:
        session, request_id, content = self._read_request(topic, payload)
        connection = socket.create_connection(("127.0.0.1", self._engine))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request(content))
        # The engine reads its prompt while the disk writes.
        self._journal.execute("INSERT INTO requests VALUES (?, ?, ?, NULL)", (request_id, session, payload))
        connection.setblocking(False)
        answer = _Answer(session, request_id, connection)
        self._answers[connection.fileno()] = answer
        self._poll.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
        self._tell(answer, {"type": "start"})

    def _read(self, answer: _Answer) -> None:
        fd = answer.socket.fileno()
        try:
            data = answer.socket.recv(262144)
        except BlockingIOError:
            data = b""
        found = [json.loads(text) for text in _TOKEN.findall(data)]
        answer.tail = (answer.tail + data)[-2048:]
        if found:
            text = "".join(found)
            answer.text.append(text)
            self._tell(answer, {"type": "chunk", "seq": answer.seq, "content": text})
            answer.seq += 1
            answer.sent_at = time.monotonic()
            if len(answer.text) > 1 or len(found) > 1:
                self._rest(fd, answer)
        elif fd in self._paused:
            del self._paused[fd]
            self._poll.modify(fd, select.EPOLLIN | select.EPOLLRDHUP)
        if answer.tail.endswith(_LAST):
            self._end(fd, answer)

    def _rest(self, fd: int, answer: _Answer) -> None:
        if fd not in self._paused:
            self._paused[fd] = answer
            self._poll.modify(fd, select.EPOLLRDHUP)

    def _end(self, fd: int, answer: _Answer) -> None:
        usage = _USAGE.search(answer.tail)
        done = {"type": "done", "seq": answer.seq, "final": True, "full_content": "".join(answer.text)}
        done["usage"] = json.loads(usage[1]) if usage else {}
        event = self._event(answer, done)
        self._journal.execute("UPDATE requests SET ended = ? WHERE id = ?", (event, answer.request_id))
        self._client.publish(f"{self._root}/reply/{answer.session}", event, qos=1)
        self._poll.unregister(fd)
        self._paused.pop(fd, None)
        del self._answers[fd]
        answer.socket.close()

    def _tell(self, answer: _Answer, fields: dict[str, Any]) -> None:
        self._client.publish(f"{self._root}/reply/{answer.session}", self._event(answer, fields), qos=1)

    @staticmethod
    def _event(answer: _Answer, fields: dict[str, Any]) -> bytes:
        fields = {"type": fields.pop("type"), "request_id": answer.request_id, "session_id": answer.session, **fields}
        return json.dumps(fields, separators=(",", ":")).encode()


if __name__ == "__main__":
    read = _unchecked
    if sys.argv[6:] == ["checked"]:
        from benchmarks.checks import Checks

        read = Checks(sys.argv[3]).read
    relay = Relay(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5]), read)
    print("ready", flush=True)
    relay.serve()
