"""The I/O loop: one thread with one selector for the broker's socket, the engines' response sockets, and everything timed.

A token's way from the engine's socket to the broker's is taken in this thread alone: no lock that anybody waits for, no
wake-up of another thread. Nothing that is called here may wait: not for a disk, not for a connection, not for a lock that is
held while somebody waits.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

READ, WRITE, HANG_UP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP
"""What a socket is watched for; `HANG_UP` alone tells that the other side has finished, without reading."""

_LONGEST_WAIT_S = 1.0
"""The watchdog wants to see this thread come round."""

Call = Callable[[], None]


class Timer:
    """A call that is still to come; `cancel` takes it back."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call: Call | None = call
        """None once it was cancelled, or has run."""

    def cancel(self) -> None:
        self.call = None

    def run(self) -> None:
        call, self.call = self.call, None
        if call is not None:
            call()


class IoLoop:
    """Runs calls when a socket is ready, when their time has come, or soon; all in the thread `io`.

    `call_soon`, `after`, `soon` and `every` may be called from any thread; `watch`, `unwatch` and `at_end_of_turn` only in
    the loop's own. What a call raises is logged and ends nothing else.
    """

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._calls: deque[Call] = deque()
        self._ends: list[Call] = []
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll.register(self._wake_read, READ)
        self._waiting_until = 0.0
        # Not in close(): another thread may be about to write its byte, and the number could be another file's by then.
        weakref.finalize(self, _close_pipe, self._wake_read, self._wake_write).atexit = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)
        self._ident: int | None = None
        self.beat_at = time.monotonic()
        """When the loop last came round, for the watchdog (monotonic seconds)."""

    # --- its life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread; what was still to be called is dropped. Idempotent."""
        self._closed = True
        self._wake()
        if self._thread.is_alive() and not self.is_here():
            self._thread.join(timeout_s)

    def is_here(self) -> bool:
        """Whether the caller is the loop's own thread."""
        return threading.get_ident() == self._ident

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # --- calls ---------------------------------------------------------------------------------------------------------

    def call_soon(self, call: Call) -> None:
        """Run `call` in the loop's thread, in the order of these calls."""
        self._calls.append(call)
        if not self.is_here():
            self._wake()

    def after(self, seconds: float, call: Call) -> Timer:
        """Run `call` once when this time has passed."""
        at = time.monotonic() + max(0.0, seconds)
        timer = Timer(call)
        with self._lock:
            heapq.heappush(self._heap, (at, next(self._numbers), timer))
        if at < self._waiting_until and not self.is_here():
            self._wake()
        return timer

    def soon(self, call: Call) -> Timer:
        return self.after(0.0, call)

    def every(self, seconds: Callable[[], float], call: Callable[[], object]) -> None:
        """Run now and again; the pause is asked each time, so that a reload can change it."""

        def again() -> None:
            try:
                call()
            finally:
                self.after(seconds(), again)

        self.after(seconds(), again)

    def at_end_of_turn(self, call: Call) -> None:
        """Run `call` once when all sockets that are ready now have been served: for writing what they brought in one go."""
        self._ends.append(call)

    # --- sockets -------------------------------------------------------------------------------------------------------

    def watch(self, fd: int, interest: int, on_ready: Callable[[int], None]) -> None:
        """Call `on_ready(events)` when the descriptor is ready for `interest`; again to change either."""
        known = self._watched.get(fd)
        if known is None:
            self._poll.register(fd, interest)
        elif known[0] != interest:
            self._poll.modify(fd, interest)
        self._watched[fd] = (interest, on_ready)

    def unwatch(self, fd: int) -> None:
        """Forget the descriptor; to be called before it is closed."""
        if self._watched.pop(fd, None) is not None:
            try:  # noqa: SIM105 - three calls less; so it is done below, where a request waits for it
                self._poll.unregister(fd)
            except OSError:
                pass

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        # While the thread is at work it looks for calls before it waits again: nobody needs to pay for the write.
        if self._waiting_until:
            try:  # noqa: SIM105
                os.write(self._wake_write, b"\0")
            except OSError:
                pass  # the pipe is full, and wakes it all the same

    def _run(self) -> None:
        self._ident = threading.get_ident()
        try:
            while not self._closed:
                self._turn()
        finally:
            self._ident = None  # which another thread may get
        self._poll.close()

    def _turn(self) -> None:
        now = self.beat_at = time.monotonic()
        # From here on whoever adds something writes to the pipe; what was added before is seen by the looks that follow.
        self._waiting_until = now + _LONGEST_WAIT_S
        wait_s = self._until_next(now)
        self._waiting_until = now + wait_s
        if self._calls or self._ends:
            wait_s = 0.0
        try:
            ready = self._poll.poll(wait_s)
        finally:
            self._waiting_until = 0.0
        for fd, events in ready:
            if fd == self._wake_read:
                try:  # noqa: SIM105
                    os.read(self._wake_read, 4096)
                except BlockingIOError:
                    pass
                continue
            watched = self._watched.get(fd)
            if watched is None:  # unwatched by a call before it in this turn
                continue
            try:  # as `_guarded` does; it runs for each read
                watched[1](events)
            except Exception:
                log.exception("io.call_failed")
        for _ in range(len(self._calls)):
            self._guarded(self._calls.popleft())
        # Without the lock: others only add to the heap.
        if self._heap and self._heap[0][0] <= time.monotonic():
            self._run_due()
        while self._ends:
            ends, self._ends = self._ends, []
            for call in ends:
                self._guarded(call)

    def _until_next(self, now: float) -> float:
        with self._lock:
            while self._heap and self._heap[0][2].call is None:  # nobody needs to be woken for it
                heapq.heappop(self._heap)
            return min(_LONGEST_WAIT_S, max(0.0, self._heap[0][0] - now)) if self._heap else _LONGEST_WAIT_S

    def _run_due(self) -> None:
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > now:
                    return
                _, _, timer = heapq.heappop(self._heap)
            self._guarded(timer.run)

    def _guarded(self, call: Call) -> None:
        try:
            call()
        except Exception:
            log.exception("io.call_failed")


def _close_pipe(*ends: int) -> None:
    for end in ends:
        os.close(end)
