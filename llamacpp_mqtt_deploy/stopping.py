"""How anything that waits is told to stop: a signal with a reason, and a deadline for closings of many steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from llamacpp_mqtt_deploy.latch import Latch

StopReason = Literal["cancelled", "timeout", "shutting_down", "outbox_full", "put_back", "unjournaled", "engine_away"]
"""`put_back`: it has not reached the engine and stays in the journal for the worker's next start. `unjournaled`: the journal did
not take it, so it was never accepted. `engine_away`: it has waited long enough for an engine that cannot be reached."""


class Stopped(Exception):
    """Raised by an engine whose stop signal was set; the signal carries the reason."""


class StopSignal:
    """Set once, with the first reason; wakes waiters and runs the callbacks that were registered.

    A callback must return at once and must not raise: it runs in the thread that sets the signal (for example the one that
    received a cancel), and typically shuts a socket down.
    """

    def __init__(self) -> None:
        self._latch = Latch()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        self.reason: StopReason | None = None
        self.at: float | None = None

    def set(self, reason: StopReason) -> bool:
        """Stop for this reason; False when it was set already (the first reason stands)."""
        with self._lock:
            if self._latch.is_set():
                return False
            self.reason = reason
            self.at = time.monotonic()
            self._latch.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
        return True

    def is_set(self) -> bool:
        return self._latch.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait at most this long; True when the signal is set."""
        return self._latch.wait(timeout_s)

    def raise_if_set(self) -> None:
        if self._latch.is_set():
            raise Stopped(self.reason)

    def on_stop(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Register a callback, run at once when the signal is set already; returns what takes it back."""
        with self._lock:
            if not self._latch.is_set():
                self._callbacks.append(callback)
                return lambda: self._forget(callback)
        callback()
        return lambda: None

    def _forget(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)


class Deadline:
    """A moment on the monotonic clock, shared by all steps of one closing."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def remaining_s(self) -> float:
        return max(0.0, self._at - time.monotonic())

    def passed(self) -> bool:
        return self.remaining_s() == 0.0


ASK_EVERY_S = 0.5
"""How often whoever waits asks whether to go on."""


def wait_for(event: threading.Event, *, timeout_s: float, give_up: Callable[[], bool] | None = None) -> bool:
    """Wait for an event; False when the time has passed, or when `give_up`, asked every half second, says so.

    For the main thread, which a signal handler cannot wake by the event's own lock.
    """
    deadline = Deadline(timeout_s)
    while not event.wait(min(ASK_EVERY_S, deadline.remaining_s())):
        if deadline.passed() or (give_up is not None and give_up()):
            return event.is_set()
    return True
