"""Writes log lines to their stream. Whoever reads the stream, and does not, holds up no thread that logs."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import select
import socket
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import IO, Protocol

MOST_LINES = 8192
MOST_BYTES = 4 * 1024 * 1024
"""So much waits while nobody reads: minutes of a busy worker."""
_MUCH_BYTES = 65_536
"""As much as a pipe of Linux holds: no reason to gather more."""
_ONE_WRITE_BYTES = 1024 * 1024
"""Far more than that: among many threads that log, the one that writes gets its turn at the interpreter perhaps every 50 ms,
and has to write then what they have logged meanwhile."""
_QUICK_S = 0.005
"""A line that comes sooner after the last write is gathered with those that follow it."""
_GATHER_S = 0.01
_IDLE_S = 10.0
"""The thread that writes ends when there was nothing for it for so long."""
_CLOSE_S = 1.0

_RWF_NOWAIT = 8
"""linux/fs.h; Python has no name for it."""


class LogOutput(Protocol):
    """Takes finished lines. May be called from any thread, never raises; what cannot be written is lost."""

    def write(self, line: str, *, urgent: bool) -> None:
        """Write the line, and its line feed; an urgent one is not gathered with others."""


def output_to(stream: IO[str], *, lost_line: Callable[[int], str]) -> LogOutput:
    """The output for this stream; `lost_line` makes the line that says how many were lost."""
    try:
        if stream.isatty():
            return PlainOutput(stream)
        mode = os.fstat(stream.fileno()).st_mode
        stream.flush()
    except (AttributeError, OSError, ValueError):
        return PlainOutput(stream)  # in memory
    if stat.S_ISSOCK(mode):
        return QueuedOutput(stream, send=_to_socket, lost_line=lost_line)
    return QueuedOutput(stream, send=_to_pipe if stat.S_ISFIFO(mode) else os.write, lost_line=lost_line)


class PlainOutput:
    """Writes each line by the thread that logs it: to memory, and to a terminal, which shows what a user has just done."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, line: str, *, urgent: bool) -> None:
        del urgent
        try:
            with self._lock:
                self._stream.write(f"{line}\n")
                self._stream.flush()
        except (OSError, ValueError):
            return  # its reader is gone, or the stream is closed


class QueuedOutput:
    """Writes a lone line by the thread that logs it; lines that come quickly, or that the stream does not take, by a thread.

    `send` writes as much as the stream takes at once, and says how much that was. When more waits than may, the oldest lines
    make way: whoever comes back to a log wants to know how things are, and how they began stands in what he has not read yet
    (a pipe holds hundreds of lines). Warnings and errors are in `logs.problems` as well.

    The stream's own `write` is not used: a thread that is held up in it at the end of the process keeps its lock, and the
    interpreter, which flushes stderr then, would abort.
    """

    def __init__(self, stream: IO[str], *, send: Callable[[int, bytes], int], lost_line: Callable[[int], str]) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._errors = getattr(stream, "errors", None) or "strict"
        self._send = send
        self._lost_line = lost_line
        self._lock = threading.Lock()  # held for arithmetic only
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._begun = b""
        """What the stream did not take of the last write: never dropped, else half a line would be glued to another one."""
        self._lost = 0
        self._urgent = False
        self._writing = False
        self._written_at = 0.0
        self._thread: threading.Thread | None = None
        self._idle = False
        self._closed = False
        _open.add(self)

    def write(self, line: str, *, urgent: bool) -> None:
        """Write the line now, or leave it to whoever writes next."""
        try:
            data = f"{line}\n".encode(self._encoding, self._errors)
        except ValueError:
            return  # the encoding of the stream has no such character
        with self._lock:
            alone = not (self._waiting or self._begun) and time.monotonic() - self._written_at >= _QUICK_S
            self._keep(data)
            self._urgent |= urgent
            if self._writing:
                return
            if not (alone or urgent or self._closed or self._waiting_bytes >= _MUCH_BYTES):
                thread = self._call_thread()
                batch = None
            else:
                thread = None
                batch = self._take()
        if batch is not None:
            thread = self._put_back(self._sent(*batch))
        self._start(thread)

    def close(self, within_s: float) -> None:
        """Write what waits, as far as the stream takes it in this time; what is logged later is written at once or lost."""
        ends_at = time.monotonic() + within_s
        while True:
            with self._lock:
                self._closed = self._urgent = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._writing, max(0.0, ends_at - time.monotonic()))
                if self._writing or not (self._waiting or self._begun):
                    return
                batch = self._take()
            self._put_back(rest := self._sent(*batch))
            left_s = ends_at - time.monotonic()
            if left_s <= 0 or (rest and not self._wait_for_reader(left_s)):
                return

    # --- under the lock ------------------------------------------------------------------------------------------------

    def _keep(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        while len(self._waiting) > 1 and (len(self._waiting) > MOST_LINES or self._waiting_bytes > MOST_BYTES):
            self._waiting_bytes -= len(self._waiting.popleft())
            self._lost += 1

    def _take(self) -> tuple[bytes, int]:
        """What is written next, and how many lines were lost before it."""
        if self._begun:
            taken, self._begun, self._writing = self._begun, b"", True
            return taken, 0
        lines: list[bytes] = []
        size = 0
        while self._waiting and (not lines or size + len(self._waiting[0]) <= _ONE_WRITE_BYTES):
            lines.append(self._waiting.popleft())
            size += len(lines[-1])
        self._waiting_bytes -= size
        taken = b"".join(lines)
        lost, self._lost = self._lost, 0
        self._urgent = self._urgent and bool(self._waiting)
        self._writing = True
        return taken, lost

    def _ready(self) -> bool:
        return not self._writing and bool(self._waiting or self._begun)

    def _pressing(self) -> bool:
        return self._urgent or bool(self._begun) or self._waiting_bytes >= _MUCH_BYTES

    def _call_thread(self) -> threading.Thread | None:
        """Wake the thread that writes; gives one that has to be started."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            return self._thread
        if self._idle or self._pressing():
            self._changed.notify_all()
        return None

    # --- writing -------------------------------------------------------------------------------------------------------

    def _sent(self, data: bytes, lost: int) -> bytes:
        """Write without waiting; what the stream did not take."""
        try:
            data = self._with_lost(data, lost)
            return data[self._send(self._stream.fileno(), data) :]
        except BlockingIOError:
            return data
        except Exception:  # noqa: BLE001 - its reader is gone, or memory is short: a log line is never worth a thread
            return b""

    def _with_lost(self, data: bytes, lost: int) -> bytes:
        if not lost:
            return data
        return f"{self._lost_line(lost)}\n".encode(self._encoding, self._errors) + data

    def _put_back(self, rest: bytes) -> threading.Thread | None:
        """After a write by a thread that logs: what is left is the other thread's; gives it when it has to be started."""
        with self._lock:
            self._writing = False
            self._written_at = time.monotonic()
            self._begun = rest
            if self._closed:
                self._changed.notify_all()
                return None
            return self._call_thread() if self._ready() else None

    def _start(self, thread: threading.Thread | None) -> None:
        if thread is None:
            return
        try:
            thread.start()
        except RuntimeError:  # no memory for its stack, or too many processes: the next line tries again
            with self._lock:
                self._thread = None

    def _run(self) -> None:
        """The thread that writes."""
        try:
            while batch := self._next():
                with contextlib.suppress(Exception):  # as above
                    self._write_waiting(self._with_lost(*batch))
                with self._lock:
                    self._writing = False
                    self._written_at = time.monotonic()
                    if self._closed:
                        self._changed.notify_all()
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _next(self) -> tuple[bytes, int] | None:
        """What to write, as soon as enough of it has gathered; None when there was nothing for long, or the end has come."""
        with self._lock:
            while True:
                # Before it looks: under a steady flow it wakes up once for each write, and nobody has to call it.
                self._changed.wait_for(self._pressing, _GATHER_S)
                if self._ready():
                    return self._take()
                self._idle = True
                self._changed.wait_for(lambda: self._closed or self._ready(), _IDLE_S)
                self._idle = False
                if not self._ready():
                    self._thread = None
                    return None

    def _write_waiting(self, data: bytes) -> None:
        """Write all of it, however long that takes."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._stream.fileno(), rest) :]
            except BlockingIOError:  # another process that shares the stream has made it a non-blocking one
                self._wait_for_reader(1.0)

    def _wait_for_reader(self, within_s: float) -> bool:
        """Whether the stream takes something, or fails, in this time."""
        poll = select.poll()
        try:
            poll.register(self._stream.fileno(), select.POLLOUT)
            return bool(poll.poll(1000 * within_s))
        except (OSError, ValueError):
            return False


# --- writing without waiting -------------------------------------------------------------------------------------------
# Not by O_NONBLOCK: it belongs to the open file, which other processes share.


def _to_socket(descriptor: int, data: bytes) -> int:
    """A stream socket that poll calls writable has room for something; a blocking `send` would wait until all has gone."""
    borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=descriptor)
    try:
        return borrowed.send(data, socket.MSG_DONTWAIT)
    finally:
        borrowed.detach()


def _to_pipe(descriptor: int, data: bytes) -> int:
    try:
        return os.pwritev(descriptor, (data,), -1, _RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except (OSError, AttributeError, NotImplementedError) as error:
        if getattr(error, "errno", None) == errno.EPIPE:
            raise
    # Linux before 6.5, another system, or a filter of system calls. A pipe that poll calls writable takes PIPE_BUF bytes, unless
    # another process that writes to the same one comes in between.
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return os.write(descriptor, data[: select.PIPE_BUF]) if poll.poll(0) else 0


# --- the end of the process --------------------------------------------------------------------------------------------

_open: weakref.WeakSet[QueuedOutput] = weakref.WeakSet()


def close_all(within_s: float = _CLOSE_S) -> None:
    """Write what waits anywhere, with a deadline for all of it."""
    ends_at = time.monotonic() + within_s
    for output in list(_open):
        output.close(max(0.0, ends_at - time.monotonic()))


atexit.register(close_all)
