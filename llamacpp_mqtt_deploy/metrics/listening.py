"""The socket on which the metrics are served: a port, or a file that takes the place of one that a dead worker left."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path

from llamacpp_mqtt_deploy.config.listen_address import ListenAddress

BACKLOG = 16
SOCKET_MODE = 0o660
"""Owner and group: whoever shall read the metrics is put into the worker's group."""
_PROBE_S = 1.0


class Listening:
    """An open socket; `close` removes its file, unless another program has put its own there. Raises OSError."""

    def __init__(self, address: ListenAddress) -> None:
        self._path = address.path
        self._file: tuple[int, int] | None = None
        if address.path is not None:
            self.socket = self._at(address.path)
            self.shown = f"unix://{address.path}"
            return
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.socket = _socket(family)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind((address.host, address.port))
            self.socket.listen(BACKLOG)
        except BaseException:
            self.socket.close()
            raise
        host, port = self.socket.getsockname()[:2]
        self.shown = f"http://{ListenAddress(host=host, port=port)}/metrics"

    def _at(self, path: Path) -> socket.socket:
        """Listen under a name of its own, then take the place of what is there: so it is never seen with other permissions, and
        two that start together do not remove each other's."""
        _look_at(path)
        new = path.with_name(f".{path.name[:20]}.{os.getpid()}")
        new.unlink(missing_ok=True)
        sock = _socket(socket.AF_UNIX)
        try:
            sock.bind(str(new))
            new.chmod(SOCKET_MODE)
            sock.listen(BACKLOG)
            new.rename(path)
            made = path.lstat()
        except BaseException:
            sock.close()
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        self._file = (made.st_dev, made.st_ino)
        return sock

    def close(self) -> None:
        self.socket.close()
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            there = self._path.lstat()
            if (there.st_dev, there.st_ino) == self._file:
                self._path.unlink()


def _look_at(path: Path) -> None:
    """Raise OSError when what is there is no socket, or one on which a program listens."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise FileExistsError(17, f"{path} is there already and is no socket; remove it, or set metrics.listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return  # left behind by a worker that was killed
    raise OSError(98, f"another program listens at {path}; end it, or set metrics.listen")


def _socket(family: socket.AddressFamily) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock
