"""A socket that does not wait, for a thread that does: each call is tried first, and waited for only where it would block.

A timeout of the `socket` module asks the system whether it may read before each read, and twice more to set it: a dozen system calls
for the beginning of a request, and at each of them another thread may take Python's lock away. `ends_at` is monotonic seconds.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from typing import Any

NON_BLOCKING = getattr(socket, "SOCK_NONBLOCK", 0)
"""Makes a socket that does not wait, where the system can do so in one call."""


def connect_within(sock: socket.socket, target: Any, timeout_s: float) -> None:
    """Connect, or wait for what was begun before. Raises OSError, TimeoutError included."""
    if sock.gettimeout() != 0.0:
        sock.setblocking(False)
    code = sock.connect_ex(target)
    if code == errno.EISCONN:
        return
    if code in (errno.EINPROGRESS, errno.EALREADY):
        _wait(sock, select.POLLOUT, time.monotonic() + timeout_s)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def send_within(sock: socket.socket, data: bytes, ends_at: float) -> None:
    """Send all of it. Raises OSError, TimeoutError included."""
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            _wait(sock, select.POLLOUT, ends_at)
        except ssl.SSLWantReadError:
            _wait(sock, select.POLLIN, ends_at)


def recv_within(sock: socket.socket, size: int, ends_at: float) -> bytes:
    """What is there, at most so much; nothing at the end of the connection. Raises OSError, TimeoutError included."""
    while True:
        try:
            return sock.recv(size)
        except (BlockingIOError, ssl.SSLWantReadError):
            _wait(sock, select.POLLIN, ends_at)
        except ssl.SSLWantWriteError:
            _wait(sock, select.POLLOUT, ends_at)


def readable_within(sock: socket.socket, seconds: float) -> bool:
    """Whether there is something to read, or the end of the connection, before this time has passed."""
    return _ready(sock, select.POLLIN, seconds)


def _wait(sock: socket.socket, events: int, ends_at: float) -> None:
    if not _ready(sock, events, ends_at - time.monotonic()):
        raise TimeoutError("timed out")


def _ready(sock: socket.socket, events: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(sock, events)
    return bool(poll.poll(max(0.0, seconds) * 1000.0))
