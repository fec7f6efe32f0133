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
class Answer:
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
        self.client = LeanClient(broker, protocol="5", client_id=f"relay-{root}")
        self.client.subscribe(f"{root}/request/#", qos=1)
        self._journal = sqlite3.connect(f"{folder}/relay.db", isolation_level=None)
        self._journal.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE IF NOT EXISTS requests"
            " (id TEXT PRIMARY KEY, session TEXT, payload BLOB, ended BLOB) WITHOUT ROWID"
        )
        self._poll = select.epoll()
        self._poll.register(self.client.fileno(), select.EPOLLIN)
        self._answers: dict[int, Answer] = {}
        self._paused: dict[int, Answer] = {}

    def serve(self) -> None:
        while True:
            due = min((answer.sent_at + self._pause_s for answer in self._paused.values()), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            for fd, events in self._poll.poll(timeout):
                if fd == self.client.fileno():
                    self._hear()
                elif fd not in self._answers:
                    self.other(fd)
                elif events & ~select.EPOLLIN or fd not in self._paused:
                    self._read(self._answers[fd])
            now = time.monotonic()
            for answer in [each for each in self._paused.values() if now >= each.sent_at + self._pause_s]:
                self._read(answer)

    def _hear(self) -> None:
        self.client.step(1.0, ack=False)
        for _, topic, payload in self.client.received:
            self._accept(topic.decode(), payload)
        self.client.received.clear()
        self.acknowledge()

    def acknowledge(self) -> None:
        self.client.acknowledge()

    def _accept(self, topic: str, payload: bytes) -> None:
        session, request_id, content = self._read_request(topic, payload)
        connection = socket.create_connection(("127.0.0.1", self._engine))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request(content))
        # The engine reads its prompt while the disk writes.
        connection.setblocking(False)
        answer = Answer(session, request_id, connection)
        self._answers[connection.fileno()] = answer
        self._poll.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
        self.accepted(answer, topic, payload)

    def watch(self, fd: int) -> None:
        """Have `other` called when this descriptor can be read."""
        self._poll.register(fd, select.EPOLLIN)

    def other(self, fd: int) -> None:
        """A descriptor that `watch` was told of can be read."""

    # --- the journal ---------------------------------------------------------------------------------------------------

    def accepted(self, answer: Answer, topic: str, payload: bytes) -> None:
        """Journal the request, then tell its start."""
        self._journal.execute(
            "INSERT INTO requests VALUES (?, ?, ?, NULL)", (answer.request_id, answer.session, payload)
        )
        self.tell(answer, {"type": "start"})

    def opened(self, answer: Answer) -> None:
        """The first bytes of an engine's answer are here."""

    def finished(self, answer: Answer, event: bytes) -> None:
        """Journal the end, then tell it."""
        self._journal.execute("UPDATE requests SET ended = ? WHERE id = ?", (event, answer.request_id))
        self.send(answer, event)

    # --- an answer -----------------------------------------------------------------------------------------------------

    def _read(self, answer: Answer) -> None:
        fd = answer.socket.fileno()
        try:
            data = answer.socket.recv(262144)
        except BlockingIOError:
            data = b""
        if data and not answer.tail:
            self.opened(answer)
        found = [json.loads(text) for text in _TOKEN.findall(data)]
        answer.tail = (answer.tail + data)[-2048:]
        if found:
            text = "".join(found)
            answer.text.append(text)
            self.tell(answer, {"type": "chunk", "seq": answer.seq, "content": text})
            answer.seq += 1
            answer.sent_at = time.monotonic()
            if len(answer.text) > 1 or len(found) > 1:
                self._rest(fd, answer)
        elif fd in self._paused:
            del self._paused[fd]
            self._poll.modify(fd, select.EPOLLIN | select.EPOLLRDHUP)
        if answer.tail.endswith(_LAST):
            self._end(fd, answer)

    def _rest(self, fd: int, answer: Answer) -> None:
        if fd not in self._paused:
            self._paused[fd] = answer
            self._poll.modify(fd, select.EPOLLRDHUP)

    def _end(self, fd: int, answer: Answer) -> None:
        usage = _USAGE.search(answer.tail)
        done = {"type": "done", "seq": answer.seq, "final": True, "full_content": "".join(answer.text)}
        done["usage"] = json.loads(usage[1]) if usage else {}
        self.finished(answer, self._event(answer, done))
        self._poll.unregister(fd)
        self._paused.pop(fd, None)
        del self._answers[fd]
        answer.socket.close()

    def tell(self, answer: Answer, fields: dict[str, Any]) -> None:
        self.send(answer, self._event(answer, fields))

    def send(self, answer: Answer, event: bytes) -> None:
        self.client.publish(f"{self._root}/reply/{answer.session}", event, qos=1)

    @staticmethod
    def _event(answer: Answer, fields: dict[str, Any]) -> bytes:
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
