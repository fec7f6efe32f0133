"""uvicorn's HTTP/1.1 with bounds where it has none: how long a request may take to come, and how long its body may keep all others waiting."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from llamacpp_mqtt_deploy.gateway.closing_watch import ClosingWatch
from llamacpp_mqtt_deploy.gateway.reading_turns import ReadingTurns, Slices

MOST_BEHIND_BYTES = 8192
"""What is read behind a request that is not answered yet; see `BoundedHttp.handle_events`."""


class _Flow(FlowControl):
    """uvicorn's, where reading goes on with what has come already."""

    def __init__(self, transport: asyncio.Transport, slices: Slices) -> None:
        super().__init__(transport)
        self._slices = slices

    def resume_reading(self) -> None:
        super().resume_reading()
        self._slices.go_on()


class BoundedHttp(H11Protocol):
    """uvicorn's HTTP/1.1 with bounds where it has none: for how long a connection may be without a whole request, or a client that
    sends a byte a minute would keep its connection for ever; and for how long the chunks of one body may keep all others waiting."""

    head_timeout_s = 10.0
    slow_reader_s = 60.0
    turns: ReadingTurns
    """Those of all connections of the loop."""
    _slices: Slices
    _ending: ClosingWatch | None = None
    _timer: asyncio.TimerHandle | None = None
    _waiting_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting_since = self.loop.time()
        self._ending = ClosingWatch(transport, self.loop, within_s=self.slow_reader_s)
        self._look()
        self._slices = Slices(
            self.turns,
            transport,
            read=super().data_received,
            may_read=lambda: not self.flow.read_paused,
            owner=lambda: self.client[0] if self.client else "",
        )
        self.flow = _Flow(transport, self._slices)

    def data_received(self, data: bytes) -> None:
        self._slices.add(data)

    def handle_events(self) -> None:
        """Uvicorn reads nothing behind a request before that is answered, and so would not see that a client has left that sent but
        a line end more: its answer would go on for nobody."""
        super().handle_events()
        cycle: RequestResponseCycle | None = self.cycle
        is_whole = cycle is not None and not cycle.more_body
        if self.flow.read_paused and is_whole and len(self.conn.trailing_data[0]) <= MOST_BEHIND_BYTES:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._slices.drop()
        self._look_no_more()
        self._end_watch()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._look_no_more()
        self._end_watch()
        self._slices.drop()  # no frame may come before the answer to this
        super().handle_websocket_upgrade(event)

    def _look(self) -> None:
        now = self.loop.time()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._waiting_since = now
        elif now - self._waiting_since >= self.head_timeout_s:
            self.transport.close()  # not abort(): a client between two requests should see an end, not a reset
            return
        self._timer = self.loop.call_later(self.head_timeout_s / 4, self._look)

    def _end_watch(self) -> None:
        if self._ending is not None:
            self._ending.stop()

    def _look_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
