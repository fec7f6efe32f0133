"""Connections take turns at having what they sent read, so that a flood of tiny frames or chunks holds up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llamacpp_mqtt_deploy.core.fair_queue import FairQueue

# An empty WebSocket frame and a chunk of one byte have 6 bytes and take 10 to 30 us; one read of the loop brings up to 256 KiB of them.
_SLICE = 2048


class ReadingTurns:
    """For one event loop: at each of its turns one slice is read, of whoever's connection; owners take turns, and then their
    connections."""

    def __init__(self) -> None:
        # Unbounded: a connection waits here once, and how many connections there are is bounded elsewhere.
        self._waiting: FairQueue[Callable[[], None]] = FairQueue()
        self._taken = False
        """Whether a slice was read at this turn of the loop."""

    def take(self, owner: str, read: Callable[[], None]) -> None:
        """Call `read` at the next turn that is free, which may be this one."""
        if self._taken:
            self._waiting.put(owner, read)
            return
        self._taken = True
        asyncio.get_running_loop().call_soon(self._next)
        read()

    def _next(self) -> None:
        read = self._waiting.take()
        if read is None:
            self._taken = False
            return
        asyncio.get_running_loop().call_soon(self._next)
        read()


class Slices:
    """What came on one connection, given to `read` in slices. Until all of it is read nothing more comes.

    `may_read` says whether the protocol takes more just now; when it does so again, it calls `go_on`.
    """

    def __init__(
        self,
        turns: ReadingTurns,
        transport: asyncio.Transport,
        *,
        read: Callable[[bytes], None],
        may_read: Callable[[], bool],
        owner: Callable[[], str],
    ) -> None:
        self._turns = turns
        self._transport = transport
        self._read = read
        self._may_read = may_read
        self._owner = owner
        self._data = memoryview(b"")
        self._in_turn = False

    def __bool__(self) -> bool:
        """Whether something is still to be read."""
        return len(self._data) > 0

    def add(self, data: bytes) -> None:
        """Read some of it as soon as it is our turn, and the rest after that."""
        waits = bool(self)
        self._data = memoryview(bytes(self._data) + data)
        if not waits:
            self._take_turn()
        if self:
            self._transport.pause_reading()

    def go_on(self) -> None:
        """The protocol may be amid something: nothing is read before it has returned."""
        if self:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._take_turn)

    def drop(self) -> None:
        """Nothing of it will be read any more."""
        self._data = memoryview(b"")

    def _take_turn(self) -> None:
        if self and not self._in_turn:
            self._in_turn = True
            self._turns.take(self._owner(), self._read_one)

    def _read_one(self) -> None:
        self._in_turn = False
        data, self._data = self._data[:_SLICE], self._data[_SLICE:]
        if data:
            self._read(bytes(data))
        if self._transport.is_closing():
            self.drop()
        elif self:
            self._transport.pause_reading()  # the protocol may have resumed it
            if self._may_read():
                self._take_turn()
        elif self._may_read():
            self._transport.resume_reading()
