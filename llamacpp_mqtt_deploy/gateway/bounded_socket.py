"""uvicorn's WebSocket protocol with bounds where it has none: what waits for a client that reads nothing, what is held of frames and for
how long, fragments, handshakes, and how long a client's frames may keep all others waiting."""

from __future__ import annotations

import asyncio
from typing import Any

from typing_extensions import override
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from llamacpp_mqtt_deploy.core.errors import Busy
from llamacpp_mqtt_deploy.gateway.closing_watch import ClosingWatch
from llamacpp_mqtt_deploy.gateway.incoming_bytes import Holding, IncomingBytes
from llamacpp_mqtt_deploy.gateway.reading_turns import ReadingTurns, Slices

_REFUSED = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
POLICY_VIOLATION, TRY_AGAIN_LATER = 1008, 1013
CUT = 1006
"""The code for an end without a close frame (RFC 6455, section 7.1.5)."""


class BoundedSocket(WebSocketsSansIOProtocol):
    """A client that reads nothing is not read either, and is cut after `slow_reader_s`; uvicorn would gather the answers to its
    pings without end. Empty fragments cost nothing, others no more than their bytes, which are bounded for all connections together.
    A message has to be whole within `frame_timeout_s`. Of many frames a few are read at each turn of the loop, or the answers of all
    others would stand still meanwhile."""

    slow_reader_s = 60.0
    frame_timeout_s = 30.0
    incoming: IncomingBytes
    turns: ReadingTurns
    """Those of all connections of the loop, as is `incoming`."""
    _holding: Holding
    _unread = 0
    """Bytes of messages that the app has not received yet."""
    _part_of_one: asyncio.TimerHandle | None = None
    _slices: Slices
    _cutting: asyncio.TimerHandle | None = None
    _ending: ClosingWatch | None = None

    @override
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.ping_timeout is not None:
            # A ping stands behind all that waits for this client, and its answer is not read while too much does.
            self.ping_timeout = max(self.ping_timeout, self.slow_reader_s)
        self._ending = ClosingWatch(transport, self.loop, within_s=self.slow_reader_s)
        self._holding = self.incoming.holding("")
        self._slices = Slices(
            self.turns,
            transport,
            read=self._read,
            may_read=lambda: not self.read_paused and self.writable.is_set(),
            owner=self._owner,
        )

    @override
    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            self._shake_hands(data)
            return
        self._slices.add(data)

    def _shake_hands(self, data: bytes) -> None:
        super().data_received(data)
        # The head was fit for HTTP but not for a WebSocket. uvicorn would neither answer nor close.
        if not self.handshake_initiated and not self.transport.is_closing():
            self.transport.write(_REFUSED)
            self.transport.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._cut_no_more()
        self._slices.drop()
        self._count_no_more()
        if self._ending is not None:
            self._ending.stop()
        if self.conn.close_rcvd is None:
            # Before uvicorn says 1005, which is a close frame without a code.
            self.queue.put_nowait({"type": "websocket.disconnect", "code": CUT, "reason": ""})
        super().connection_lost(exc)

    # --- a client that reads nothing -------------------------------------------------------------------------------------

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()
        if self._cutting is None:
            self._cutting = self.loop.call_later(self.slow_reader_s, self.transport.abort)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._cut_no_more()
        if self._slices:
            self._slices.go_on()
        elif not self.read_paused:
            self.transport.resume_reading()

    @override
    async def receive(self) -> Any:
        if not self.queue.empty():
            await asyncio.sleep(0)  # or nobody else would have a turn until all these messages are answered
        message = await super().receive()
        if self.queue.empty():
            self._unread = 0
            self._count()
        if not self.disconnected:  # uvicorn has perhaps resumed reading
            if not self.writable.is_set():
                self.transport.pause_reading()
            elif not self.read_paused:
                self._slices.go_on()
        return message

    @override
    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.close_sent:
            self._slices.go_on()  # uvicorn reads on after that, up to the client's own close frame

    def _cut_no_more(self) -> None:
        if self._cutting is not None:
            self._cutting.cancel()
            self._cutting = None

    def _owner(self) -> str:
        notes: Any = self.scope.get("lmd.notes", {})
        return str(notes.get("owner", ""))

    # --- what is held ----------------------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        super().data_received(data)
        self._count()

    def _count(self) -> None:
        if self.disconnected:
            return
        part = len(self.conn.reader.buffer) + sum(map(len, self.frames))
        if not self._holding.count:
            self._holding = self.incoming.holding(self._owner())  # the handshake does not tell yet whose it is
        try:
            self._holding.set(part + self._unread)
        except Busy:
            self._fail(TRY_AGAIN_LATER, "too much is being read already")
            return
        if part and self._part_of_one is None:
            self._part_of_one = self.loop.call_later(self.frame_timeout_s, self._too_slow)
        elif not part:
            self._wait_for_no_part()

    def _count_no_more(self) -> None:
        self._holding.set(0)
        self._wait_for_no_part()

    def _wait_for_no_part(self) -> None:
        if self._part_of_one is not None:
            self._part_of_one.cancel()
            self._part_of_one = None

    def _too_slow(self) -> None:
        if self.read_paused or self._slices or not self.writable.is_set():  # it is we who do not read
            self._part_of_one = self.loop.call_later(1.0, self._too_slow)
        else:
            self._fail(POLICY_VIOLATION, "the message did not become whole in time")

    def _fail(self, code: int, reason: str) -> None:
        self._slices.drop()
        self._count_no_more()
        self.conn.fail(code, reason)
        if self.conn.close_sent is None:
            self.transport.abort()
        else:
            self.handle_parser_exception()

    # --- fragments -------------------------------------------------------------------------------------------------------

    @override
    def handle_text(self, event: Any) -> None:
        super().handle_text(event)
        self._gather(event)

    @override
    def handle_bytes(self, event: Any) -> None:
        super().handle_bytes(event)
        self._gather(event)

    def _gather(self, event: Any) -> None:
        if not event.fin:
            self.frames = [bytearray(event.data)]  # type: ignore[list-item]

    @override
    def send_receive_event_to_app(self) -> None:
        self._unread += sum(map(len, self.frames))
        super().send_receive_event_to_app()

    @override
    def handle_cont(self, event: Any) -> None:
        gathered: Any = self.frames[0]
        gathered += event.data
        if event.fin:
            self.frames = [bytes(gathered)]
            self.send_receive_event_to_app()
