"""Reads a streamed answer in the I/O loop, so that a token's way crosses no thread."""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence

from llamacpp_mqtt_deploy.core.completion_stream import CompletionStream
from llamacpp_mqtt_deploy.core.deltas import Delta
from llamacpp_mqtt_deploy.core.transfer_coding import BadChunk
from llamacpp_mqtt_deploy.engines.server.failures import Broken, Silent, reason_of
from llamacpp_mqtt_deploy.engines.server.http import READ_BYTES
from llamacpp_mqtt_deploy.engines.server.streaming import StreamingExchange
from llamacpp_mqtt_deploy.io_loop import HANG_UP, READ, IoLoop, Timer
from llamacpp_mqtt_deploy.latch import Latch

_LONGEST_PAUSE_S = 0.1

_WORTH_READING_BYTES = 65_536
"""So much is read although it is no time yet: more than an engine says in a pause, less than the system takes in."""

Feed = Callable[[Sequence[Delta]], float]
"""Takes deltas; gives the seconds for which reading may rest, because what came could not go out before anyway."""


class Pump:
    """One answer on its way from the engine's socket to `feed`, in the loop's thread; `run` waits for its end in another.

    While it rests, what the engine says collects in the socket, where it costs nothing, and one read then takes all of it.
    The end of the answer ends a rest at once.

    TCP acknowledges what nobody reads only after 40 ms, and a sender may have no more than 18 packets, each of them a token,
    under way: the rest of an answer, its end too, would wait for the next read. A receiver that said how much is worth a read
    (SO_RCVLOWAT) acknowledges at once up to there, and the selector tells of nothing before.
    """

    def __init__(self, loop: IoLoop, exchange: StreamingExchange, stream: CompletionStream, feed: Feed) -> None:
        self._loop = loop
        self._exchange = exchange
        self._stream = stream
        self._feed = feed
        self._ended = False
        self._over = Latch()
        self._problem: BaseException | None = None
        self._rest: Timer | None = None
        self._hung_up = False
        self._heard_at = time.monotonic()
        self._socket, self._first = exchange.unbuffered()
        self._fd = self._socket.fileno()
        self._pending = getattr(self._socket, "pending", None)
        is_tcp = self._socket.family in (socket.AF_INET, socket.AF_INET6)
        self._has_low_water = is_tcp and sys.platform == "linux"
        self._is_awaited = True
        """Whether the first byte is to be told."""

    def run(self, silence_s: float) -> None:
        """Pump until the end of the body, or of the stream in it.

        Raises `Silent` when the engine says nothing of use for `silence_s`, `Broken`, or what reading and feeding raised.
        """
        self._heard_at = time.monotonic()
        self._loop.call_soon(self._begin)
        left_s = silence_s
        while not self._over.wait(left_s):
            # The server's pings keep the socket readable; only output counts.
            left_s = self._heard_at + silence_s - time.monotonic()
            if left_s <= 0:
                self._loop.call_soon(lambda: self._end(Silent("no token in time")))
                left_s = 5.0
                if not self._loop.is_alive():
                    raise Broken("the I/O loop has ended")
        if self._problem is not None:
            raise self._problem

    # --- in the loop's thread ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        first, self._first = self._first, b""
        if first:
            self._safely(lambda: self._take(first))
        if self._ended:
            return
        self._loop.watch(self._fd, READ | HANG_UP, self._ready)
        if self._pending is not None and self._pending():
            self._safely(self._read)
        self._await()

    def _ready(self, events: int) -> None:
        if events & ~READ:
            self._hung_up = True
        self._end_rest()
        self._safely(self._read)
        self._await()

    def _safely(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  it is raised in the thread that waits for the end
            self._end(error)

    def _read(self) -> None:
        while not (self._ended or self._is_resting()):
            try:
                raw = self._socket.recv(READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            except (OSError, ValueError) as error:
                raise Broken(reason_of(error)) from error
            if not raw:
                complete = self._exchange.body.ended or self._exchange.body.ends_with_connection
                self._end(None if complete else Broken("the answer ended before it was complete"))
                return
            self._take(raw)
            # What has arrived was read whole; a TLS socket, and one whose other side is done, may hold more.
            if len(raw) < READ_BYTES and self._pending is None and not self._hung_up:
                return

    def _take(self, raw: bytes) -> None:
        try:
            body = self._exchange.body.feed(raw)
        except BadChunk as error:
            raise Broken(reason_of(error)) from error
        deltas = self._stream.feed(body) if body else []
        if deltas:
            self._heard_at = time.monotonic()
            pause_s = self._feed(deltas)
            if pause_s > 0 and not self._hung_up:
                self._rest = self._loop.after(min(pause_s, _LONGEST_PAUSE_S), self._rested)
        if self._stream.reader.done or self._exchange.body.ended:
            self._end(None)

    def _rested(self) -> None:
        self._rest = None
        self._safely(self._read)  # something has collected, most likely
        self._await()

    def _await(self) -> None:
        """Have the system tell what is awaited now: the next byte, or in a rest the end; it is told only what it does not know."""
        awaited = self._rest is None
        if self._ended or awaited == self._is_awaited:
            return
        self._is_awaited = awaited
        if self._has_low_water:
            least = 1 if awaited else _WORTH_READING_BYTES
            with contextlib.suppress(OSError):  # ended, as the next read says
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
        else:
            self._loop.watch(self._fd, READ | HANG_UP if awaited else HANG_UP, self._ready)

    def _is_resting(self) -> bool:
        return self._rest is not None

    def _end_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _end(self, problem: BaseException | None) -> None:
        if self._ended:
            return
        self._loop.unwatch(self._fd)
        self._end_rest()
        self._problem = problem
        self._ended = True
        self._over.set()
