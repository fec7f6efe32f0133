"""Reads a streamed answer in the I/O loop, so that a token's way crosses no thread."""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence

from llamacpp_mqtt_deploy.core.completion_stream import CompletionStream
from llamacpp_mqtt_deploy.core.deltas import Delta
from llamacpp_mqtt_deploy.core.transfer_coding import BadChunk
from llamacpp_mqtt_deploy.engines.server.failures import Broken, NoAnswer, Silent, reason_of
from llamacpp_mqtt_deploy.engines.server.http import READ_BYTES
from llamacpp_mqtt_deploy.engines.server.streaming import PROMPT_S, StreamingExchange
from llamacpp_mqtt_deploy.io_loop import HANG_UP, READ, IoLoop, Timer
from llamacpp_mqtt_deploy.latch import Latch

_LONGEST_PAUSE_S = 0.1

_WORTH_READING_BYTES = 65_536
"""So much is read although it is no time yet: more than an engine says in a pause, less than the system takes in."""

Feed = Callable[[Sequence[Delta]], float]
"""Takes deltas; gives the seconds for which reading may rest, because what came could not go out before anyway."""


class Pump:
    """One answer on its way from the engine's socket to `feed`, in the loop's thread; `run` waits for its end in another.

    `opened` is called when the headers have come, and says whether the body is to be read here; `on_slow` when they do not come
    within some milliseconds.

    While it rests, what the engine says collects in the socket, where it costs nothing, and one read then takes all of it.
    The end of the answer ends a rest at once.

    TCP acknowledges what nobody reads only after 40 ms, and a sender may have no more than 18 packets, each of them a token,
    under way: the rest of an answer, its end too, would wait for the next read. A receiver that said how much is worth a read
    (SO_RCVLOWAT) acknowledges at once up to there, and the selector tells of nothing before.
    """

    def __init__(
        self,
        loop: IoLoop,
        exchange: StreamingExchange,
        stream: CompletionStream,
        *,
        opened: Callable[[], bool],
        feed: Feed,
        on_slow: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._exchange = exchange
        self._stream = stream
        self._opened = opened
        self._feed = feed
        self._on_slow = on_slow
        self._has_head = False
        self._late: Timer | None = None
        self._ended = False
        self._over = Latch()
        self._problem: BaseException | None = None
        self._rest: Timer | None = None
        self._hung_up = False
        self._heard_at = time.monotonic()
        self._socket = exchange.unbuffered()
        self._fd = self._socket.fileno()
        self._pending = getattr(self._socket, "pending", None)
        is_tcp = self._socket.family in (socket.AF_INET, socket.AF_INET6)
        self._has_low_water = is_tcp and sys.platform == "linux"
        self._is_awaited = True
        """Whether the first byte is to be told."""

    def run(self, silence_s: float) -> None:
        """Pump until the end of the body, or of the stream in it, or until `opened` says no.

        Raises `Silent` when the engine says nothing of use for `silence_s`, its headers or an event, `NoAnswer`, `Broken`, or what
        reading and feeding raised.
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
        self._try_to_read()  # a quick engine has answered by now; and TLS may have read ahead
        if self._ended:
            return
        self._loop.watch(self._fd, READ | HANG_UP, self._ready)
        if not self._has_head:
            self._late = self._loop.after(PROMPT_S, self._on_slow)
        self._await()

    def _ready(self, events: int) -> None:
        if events & ~READ:
            self._hung_up = True
        if self._rest is not None:
            self._end_rest()
        self._try_to_read()
        if self._is_awaited is not (self._rest is None):
            self._await()

    def _rested(self) -> None:
        self._rest = None
        self._try_to_read()  # something has collected, most likely
        if self._is_awaited is not (self._rest is None):
            self._await()

    def _try_to_read(self) -> None:
        try:
            self._read()
        except Exception as error:  # noqa: BLE001  it is raised in the thread that waits for the end
            self._end(error)

    def _read(self) -> None:
        while not self._ended and self._rest is None:
            try:
                raw = self._socket.recv(READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            except (OSError, ValueError) as error:
                raise (Broken if self._has_head else NoAnswer)(reason_of(error)) from error
            if not self._has_head:
                self._take_head(raw)
            elif raw:
                self._take(raw)
            else:
                complete = self._exchange.body.ended or self._exchange.body.ends_with_connection
                self._end(None if complete else Broken("the answer ended before it was complete"))
                return
            # What has arrived was read whole; a TLS socket, and one whose other side is done, may hold more.
            if len(raw) < READ_BYTES and self._pending is None and not self._hung_up:
                return

    def _take_head(self, raw: bytes) -> None:
        if not self._exchange.take_head(raw):
            return
        self._has_head = True
        self._heard_at = time.monotonic()
        self._forget_late()
        if not self._opened():
            self._end(None)
            return
        ahead = self._exchange.take_ahead()
        if ahead:
            self._take(ahead)

    def _take(self, raw: bytes) -> None:
        try:
            parts = self._exchange.body.parts(raw)
        except BadChunk as error:
            raise Broken(reason_of(error)) from error
        deltas = self._stream.feed_parts(parts) if parts else []
        if deltas:
            self._heard_at = time.monotonic()
            pause_s = self._feed(deltas)
            if pause_s > 0 and not self._hung_up:
                self._rest = self._loop.after(min(pause_s, _LONGEST_PAUSE_S), self._rested)
        if self._stream.reader.done or self._exchange.body.ended:
            self._end(None)

    def _await(self) -> None:
        """Have the system tell what is awaited now: the next byte, or in a rest the end."""
        awaited = self._rest is None
        if self._ended or awaited == self._is_awaited:
            return
        self._is_awaited = awaited
        if self._has_low_water:
            least = 1 if awaited else _WORTH_READING_BYTES
            try:  # noqa: SIM105 - three calls less, twice for each chunk
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            except OSError:
                pass  # ended, as the next read says
        else:
            self._loop.watch(self._fd, READ | HANG_UP if awaited else HANG_UP, self._ready)

    def _end_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _forget_late(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self, problem: BaseException | None) -> None:
        if self._ended:
            return
        self._loop.unwatch(self._fd)
        self._end_rest()
        self._forget_late()
        self._problem = problem
        self._ended = True
        self._over.set()
