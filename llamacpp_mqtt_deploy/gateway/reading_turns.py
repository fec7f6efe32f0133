"""Sockets take turns at having what they sent read, so that a flood of tiny frames holds up nobody else."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from llamacpp_mqtt_deploy.core.fair_queue import FairQueue


class ReadingTurns:
    """For one event loop: at each of its turns one slice is read, of whoever's socket; owners take turns, and then their sockets."""

    def __init__(self) -> None:
        # Unbounded: a socket waits here once, and how many sockets there are is bounded elsewhere.
        self._waiting: FairQueue[Callable[[], None]] = FairQueue(per_level=sys.maxsize, in_all=sys.maxsize)
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
