"""A mosquitto of its own for each test that needs to stop, restrict or encrypt it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path

from tests.support.waiting import eventually

PROGRAM = "/usr/sbin/mosquitto"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """One broker on a loopback port; `configuration` is added to the listener's."""

    def __init__(self, folder: Path, configuration: str = "allow_anonymous true") -> None:
        self.folder = folder
        self.port = free_port()
        self._configuration = configuration
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        path = self.folder / f"mosquitto-{self.port}.conf"
        path.write_text(f"user root\nlistener {self.port} 127.0.0.1\nset_tcp_nodelay true\n{self._configuration}\n")
        self._process = subprocess.Popen(
            [PROGRAM, "-c", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self._listens, 10)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5):
            return True
        return False


def password_file(folder: Path, **users: str) -> Path:
    """A file for `password_file`; mosquitto 2.0 reads plain text only when mosquitto_passwd has hashed it."""
    path = folder / "passwords"
    path.write_text("".join(f"{user}:{password}\n" for user, password in users.items()))
    path.chmod(0o600)
    subprocess.run(["mosquitto_passwd", "-U", str(path)], check=True, capture_output=True)
    return path


ACCESS_LIST = """
pattern write llm/request/%u/#
pattern write llm/control/%u/#
pattern read llm/reply/%u/#
pattern read llm/status/#
pattern read llm/health/#

user worker
topic read llm/request/#
topic read llm/control/#
topic read llm/admin/#
topic write llm/reply/#
topic write llm/admin-reply/#
topic readwrite llm/status/#
topic readwrite llm/health/#
"""
