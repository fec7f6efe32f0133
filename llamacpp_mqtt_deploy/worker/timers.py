"""One thread for everything that has to happen later: pacing, heartbeats, limits, renewals."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class Timer:
    """A call that is still to come; `cancel` takes it back."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def run(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class Timers:
    """Runs short calls at their time, one after the other, in a thread of its own. A call must not wait for anything."""

    def __init__(self, name: str = "timers") -> None:
        self._condition = threading.Condition()
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self.beat_at = time.monotonic()
        """When the loop last came round, for the watchdog (monotonic seconds)."""

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        entry = (time.monotonic() + max(0.0, seconds), next(self._numbers), timer)
        with self._condition:
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._condition.notify()
        return timer

    def soon(self, call: Callable[[], None]) -> Timer:
        return self.after(0.0, call)

    def every(self, seconds: Callable[[], float], call: Callable[[], None]) -> None:
        """Run now and again; the pause is asked each time, so that a reload can change it."""

        def again() -> None:
            try:
                call()
            finally:
                self.after(seconds(), again)

        self.after(seconds(), again)

    def _loop(self) -> None:
        while True:
            with self._condition:
                self.beat_at = time.monotonic()
                if self._closed:
                    return
                wait_s = self._heap[0][0] - self.beat_at if self._heap else None
                if wait_s is None or wait_s > 0:
                    # At least one look a second: the watchdog wants to see this thread alive.
                    self._condition.wait(1.0 if wait_s is None else min(wait_s, 1.0))
                    continue
                _, _, timer = heapq.heappop(self._heap)
            try:
                timer.run()
            except Exception:
                log.exception("timer.failed")
