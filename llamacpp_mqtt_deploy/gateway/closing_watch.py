"""Cuts a connection that was closed and does not end, because its client takes nothing of what is still to be sent."""

from __future__ import annotations

import asyncio


class ClosingWatch:
    """Looks at a transport until `stop`. asyncio keeps one that is closed, and its file descriptor, until all is sent, and says
    that a client is slow only from 64 KiB on."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, *, within_s: float) -> None:
        self._transport = transport
        self._loop = loop
        self._within_s = within_s
        self._closing_since: float | None = None
        self._look()

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self._transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since >= self._within_s:
                self._transport.abort()
        self._timer = self._loop.call_later(self._within_s / 4, self._look)
