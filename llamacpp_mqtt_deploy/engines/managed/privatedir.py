"""A directory that only this user can enter, for the server's socket; those of workers that were killed are cleared away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PREFIX = "lmd-engine-"
SOCKET_NAME = "llama.sock"
LONGEST_SOCKET_PATH = 107
"""sockaddr_un has 108 bytes with the final zero, unix(7)."""
STALE_AFTER_S = 60.0
"""A younger one may be between its making and its lock."""
MOST_SWEPT = 100


class PrivateDir:
    """Made under `$RUNTIME_DIRECTORY` where systemd gives one, else under the temporary directory. Raises OSError."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        under_systemd = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        base = under_systemd or tempfile.gettempdir()
        if len(os.fsencode(base)) + len(PREFIX) + len(SOCKET_NAME) + 10 > LONGEST_SOCKET_PATH:
            base = "/tmp"  # noqa: S108 - mkdtemp makes a private one in it
        _sweep(Path(base))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self.socket_path = self.path / SOCKET_NAME
        # The lock says that we live; it goes with us, however we end.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, name: str, text: str) -> Path:
        """A file that only this user can read."""
        path = self.path / name
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        return path

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _sweep(base: Path) -> None:
    with contextlib.suppress(OSError):
        for path in sorted(base.glob(f"{PREFIX}*"))[:MOST_SWEPT]:
            with contextlib.suppress(OSError):
                _clear_if_stale(path)


def _clear_if_stale(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(lock)
        if found.st_uid == os.geteuid() and time.time() - found.st_mtime > STALE_AFTER_S:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its worker lives
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
