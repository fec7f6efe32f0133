"""One wire's life in the I/O loop: its socket, its times, and the work that other threads have for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from llamacpp_mqtt_deploy.io_loop import READ, WRITE, IoLoop, Timer

_MOST_READS = 64
"""Reads in a row of what TLS holds back, so that a flood on one socket leaves the others their turn."""


class Wire(Protocol):
    """A connection that says what it waits for and works when it is told to; it never waits by itself."""

    fd: int
    """The socket, -1 without one."""

    def wants_read(self) -> bool:
        """Whether bytes are there that the socket no longer shows."""

    def wants_write(self) -> bool: ...
    def on_readable(self) -> None: ...
    def on_writable(self) -> None: ...


class WireLoop:
    """Runs one wire after the other in the loop. `work` is called after each of its turns and after each `wake`, and gives False
    when the wire's life is over. It runs for each PUBACK and for each turn of the loop that publishes.

    `on_time(now)` is called before it at the times that `due_in_s(now)` gives. `wake` is for any thread; `run` for the one that owns
    the wires, which waits meanwhile: so a wire belongs to one thread at a time.
    """

    def __init__(
        self,
        loop: IoLoop,
        *,
        work: Callable[[], bool],
        on_time: Callable[[float], None],
        due_in_s: Callable[[float], float],
    ) -> None:
        self._loop = loop
        self._work = work
        self._on_time = on_time
        self._due_in_s = due_in_s
        self._wire: Wire | None = None
        self._fd = -1
        self._interest = 0
        self._tick: Timer | None = None
        self._awake = False
        self._ended = threading.Event()
        self._problem: BaseException | None = None

    def wake(self) -> None:
        """There is something to do for the wire."""
        if not self._awake and self._wire is not None:
            self._awake = True
            if self._loop.is_here():
                # What a turn of the loop brings goes out in one go.
                self._loop.at_end_of_turn(self._woken)
            else:
                self._loop.call_soon(self._woken)

    def run(self, wire: Wire) -> None:
        """Let the wire live in the loop until `work` says that it is over; raises what it, its callbacks or `work` raised."""
        self._ended.clear()
        self._problem = None
        self._loop.call_soon(lambda: self._begin(wire))
        while not self._ended.wait(1.0):
            if not self._loop.is_alive():
                self._wire = None
                raise RuntimeError("the I/O loop has ended")
        if self._problem is not None:
            raise self._problem

    # --- in the loop's thread ------------------------------------------------------------------------------------------

    def _begin(self, wire: Wire) -> None:
        self._wire = wire
        self._awake = False
        self._step(0)
        self._ticked()

    def _ready(self, events: int) -> None:
        if self._wire is not None:
            self._step(events)

    def _woken(self) -> None:
        self._awake = False
        if self._wire is not None:
            self._step(0)

    def _ticked(self) -> None:
        wire = self._wire
        if wire is None:
            return
        now = time.monotonic()
        self._step(0, due_at=now)
        if self._wire is wire:
            self._tick = self._loop.after(self._due_in_s(now), self._ticked)

    def _step(self, events: int, *, due_at: float | None = None) -> None:
        """Serve the wire, then do what is to do after anything, and see whether that was its end."""
        wire = self._wire
        assert wire is not None
        try:
            holds_more = events != 0 and self._serve(wire, events)
            if due_at is not None:
                self._on_time(due_at)
            if self._work():
                self._watch(wire)
                if holds_more:
                    self._loop.call_soon(lambda: self._ready(READ))
                return
        except BaseException as error:  # noqa: BLE001  it is raised in the thread that owns the wire
            self._problem = error
        self._forget()
        self._wire = None
        if self._tick is not None:
            self._tick.cancel()
        self._ended.set()

    def _serve(self, wire: Wire, events: int) -> bool:
        """Read and write; whether TLS holds back more than our share of this turn."""
        holds_more = False
        # Read first, also after an error: the PUBACKs that came before the end still count.
        if events & ~WRITE:
            wire.on_readable()
            for _ in range(_MOST_READS):
                holds_more = wire.wants_read()
                if not holds_more:
                    break
                wire.on_readable()
        if events & WRITE:
            wire.on_writable()
        return holds_more

    def _watch(self, wire: Wire) -> None:
        fd = wire.fd
        interest = READ | WRITE if wire.wants_write() else READ
        if fd == self._fd and interest == self._interest:
            return
        if fd != self._fd:
            self._forget()
        if fd >= 0:
            self._loop.watch(fd, interest, self._ready)
            self._fd, self._interest = fd, interest

    def _forget(self) -> None:
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            self._fd = -1
