"""Waits for one wire's socket and for other threads that have work for it: all that a loop of another kind would replace."""

from __future__ import annotations

import contextlib
import os
import select
import time
import weakref
from typing import Protocol


class Pollable(Protocol):
    """A connection that says what it waits for and works when it is told to; it never waits by itself."""

    def fileno(self) -> int:
        """The socket, -1 without one."""

    def wants_read(self) -> bool:
        """Whether bytes are there that the socket no longer shows."""

    def wants_write(self) -> bool: ...
    def on_readable(self) -> None: ...
    def on_writable(self) -> None: ...
    def on_time(self, now: float) -> None:
        """Do what is due; to be called at least every half second."""


class Poller:
    """`wake` is for any thread; the rest belongs to the one that waits."""

    def __init__(self) -> None:
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        # Not in a close(): another thread may be about to write its byte, and the number could be another file's by then.
        weakref.finalize(self, _close_pipe, self._wake_read, self._wake_write).atexit = False
        self._awake = False
        self._poll = select.poll()
        self._poll.register(self._wake_read, select.POLLIN)
        self._fd = -1
        self._mask = 0

    def wake(self) -> None:
        """End the wait, or keep the next one from beginning."""
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):
                os.write(self._wake_write, b"\0")

    def listen(self) -> None:
        """From here on `wake` counts. Whoever adds work after this line writes a byte; what was added before it the caller has to
        find before it waits. While the thread works, nobody needs to pay for the write."""
        self._awake = False

    def wait(self, wire: Pollable, timeout_s: float) -> None:
        """Wait for the socket, the wake-up or the time, and let the wire work. Its callbacks run in here."""
        read, write = wire.wants_read(), False
        self._watch(wire.fileno(), select.POLLIN | select.POLLOUT if wire.wants_write() else select.POLLIN)
        for fd, event in self._poll.poll(0.0 if read else timeout_s * 1000.0):
            if fd == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            else:
                write = bool(event & select.POLLOUT)
                # Read first, also after an error: the PUBACKs that came before the end still count.
                read = read or bool(event & ~select.POLLOUT)
        self._awake = True
        if read:
            wire.on_readable()
        if write:
            wire.on_writable()
        wire.on_time(time.monotonic())

    def _watch(self, fd: int, mask: int) -> None:
        if fd != self._fd:
            if self._fd >= 0:
                self._poll.unregister(self._fd)
            self._fd, self._mask = fd, 0
        if fd >= 0 and mask != self._mask:
            self._poll.register(fd, mask)
            self._mask = mask


def _close_pipe(*ends: int) -> None:
    for end in ends:
        os.close(end)
