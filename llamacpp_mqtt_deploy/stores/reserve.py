"""Room on the disk that is kept for the ends of requests: a file that is let go of when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

RESERVE_BYTES = 1024 * 1024
"""Some hundred ends. A worker that has accepted a request can end it, however full the disk has become since."""

_TRY_EVERY_S = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Reserve:
    """While `there` says no, nothing new should be written. Every method may be called from any thread."""

    def __init__(self, path: Path, *, size: int = RESERVE_BYTES) -> None:
        self._path = path
        self._size = size
        self._lock = threading.Lock()
        self._held = False
        self._tried_at = -_TRY_EVERY_S

    def there(self) -> bool:
        """Whether the room is kept; looks once a second, and tries to have it again: somebody may have removed the file."""
        with self._lock:
            now = time.monotonic()
            if now - self._tried_at >= _TRY_EVERY_S:
                self._tried_at = now
                self._held = self._take()
            return self._held

    def give_up(self) -> bool:
        """Let go of the room; False when there was none."""
        with self._lock:
            self._held = False
            # Not at once again: what it was given up for comes first.
            self._tried_at = time.monotonic()
            try:
                if self._path.stat().st_size == 0:
                    return False
                os.truncate(self._path, 0)
            except OSError:
                return False
            return True

    def _take(self) -> bool:
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            return error.errno not in _FULL
        try:
            found = os.fstat(fd)
            if found.st_size < self._size or found.st_blocks * 512 < self._size:
                os.posix_fallocate(fd, 0, self._size)
        except OSError as error:
            if error.errno not in _FULL:
                return True  # a file system that cannot do it: better without a reserve than without requests
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)  # the part that there was room for
            return False
        finally:
            os.close(fd)
        return True
