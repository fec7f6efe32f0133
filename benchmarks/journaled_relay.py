"""The relay of (k) with what the protocol asks of a worker before the first chunk: its checks, and its journal in a thread.

`python -m benchmarks.journaled_relay BROKER_PORT ENGINE_PORT ROOT FOLDER PAUSE_S` prints `ready` first. Checks, journal and commits are the
worker's own (`benchmarks/checks.py`, `SqliteStore`): the id is looked up; the accept is written while the engine reads the prompt, and the
acknowledgement and `start` wait for it; the mark is begun when the engine's answer opens, and the first chunk waits for it; `done`
waits for the end. All else is the bare relay: one thread, no queue, limits, cancel, flow control, errors and metrics.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from typing_extensions import override

from benchmarks.checks import Checks
from benchmarks.relay import Answer, Relay
from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Pending, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore

_ROUTE = "default"


class JournaledRelay(Relay):
    """The journal's thread only says that something is written; the loop looks after it."""

    def __init__(self, broker: int, engine: int, root: str, folder: str, pause_s: float) -> None:
        super().__init__(broker, engine, root, folder, pause_s, Checks(root).read)
        self._store = SqliteStore(Path(folder) / "state.db")
        self._store.open()
        self._written: deque[Callable[[], None]] = deque()
        self._writing: Counter[str] = Counter()
        """How many writes the events of a request wait for, by its id."""
        self._held: dict[str, list[bytes]] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK)
        self.watch(self._wake_read)

    def _when_written(self, write: Pending, call: Callable[[], None]) -> None:
        def over(problem: StoreError | None) -> None:
            assert problem is None, problem
            self._written.append(call)
            with suppress(BlockingIOError):
                os.write(self._wake_write, b"\0")

        write.on_done(over)

    @override
    def other(self, fd: int) -> None:
        os.read(fd, 4096)
        while self._written:
            self._written.popleft()()

    @override
    def accepted(self, answer: Answer, topic: str, payload: bytes) -> None:
        key, now = _key(answer), time.time()
        assert self._store.find(key) is None
        entry = Entry(key=key, topic=topic, payload=payload, digest="0" * 32, accepted_at=now, expires_at=now + 60.0)
        self._writing[answer.request_id] += 1
        self._when_written(self._store.accept_soon([entry]), partial(self._journaled, answer))

    def _journaled(self, answer: Answer) -> None:
        self.client.acknowledge()
        self._let_go(answer)

    @override
    def acknowledge(self) -> None:
        if not self._writing:
            self.client.acknowledge()  # publishes that waited for the broker

    @override
    def opened(self, answer: Answer) -> None:
        self.tell(answer, {"type": "start"})
        self._writing[answer.request_id] += 1
        self._when_written(self._store.mark_streaming_soon(_key(answer)), partial(self._let_go, answer))

    def _let_go(self, answer: Answer) -> None:
        self._writing[answer.request_id] -= 1
        if not self._writing[answer.request_id]:
            del self._writing[answer.request_id]
            for event in self._held.pop(answer.request_id, ()):
                super().send(answer, event)

    @override
    def send(self, answer: Answer, event: bytes) -> None:
        if answer.request_id in self._writing:
            self._held.setdefault(answer.request_id, []).append(event)
        else:
            super().send(answer, event)

    @override
    def finished(self, answer: Answer, event: bytes) -> None:
        spent = Spent(first_level=answer.session.partition("/")[0], tokens_out=answer.seq)
        write = self._store.finish_soon(_key(answer), event, now=time.time(), spent=spent)
        self._when_written(write, partial(self.send, answer, event))


def _key(answer: Answer) -> EntryKey:
    return EntryKey(_ROUTE, answer.session, answer.request_id)


if __name__ == "__main__":
    relay = JournaledRelay(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5]))
    print("ready", flush=True)
    relay.serve()
