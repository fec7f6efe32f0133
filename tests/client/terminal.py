"""`lmd` as a process: on a pipe, or on a pseudo terminal, as a person would run it: typed lines, Ctrl-C, and everything it printed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.support.waiting import eventually


def lmd(
    *arguments: str, environment: Mapping[str, str], stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "llamacpp_mqtt_deploy", *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=60,
        check=False,
        env=dict(environment),
    )


class Terminal:
    """`lmd` with these arguments under a pty of 100 columns; `text` grows while it prints."""

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self.text = ""
        self.code: int | None = None
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                # As under a terminal: a shell starts what runs in its background with Ctrl-C ignored, and that is inherited.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.environ.clear()
                os.environ.update(environment)
                os.execv(sys.executable, [sys.executable, "-m", "llamacpp_mqtt_deploy", *arguments])
            os._exit(127)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self._reader = threading.Thread(target=self._read, name="test-terminal")
        self._reader.start()

    def enter(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self._master, b"\x03")

    def end_of_input(self) -> None:
        """Ctrl-D."""
        os.write(self._master, b"\x04")

    def shows(self, text: str, timeout_s: float = 20.0) -> None:
        eventually(lambda: text in self.text or self.code is not None, timeout_s)
        assert text in self.text, f"ended with {self.code} before it showed {text!r}: {self.text!r}"

    def wait(self, timeout_s: float = 20.0) -> int:
        eventually(lambda: self.code is not None, timeout_s)
        assert self.code is not None
        return self.code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.code is None:
            os.kill(self._pid, signal.SIGKILL)
        self._reader.join(10)
        os.close(self._master)

    def _read(self) -> None:
        # Linux ends the reading with EIO when the last process has closed its side.
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self.text += data.decode("utf-8", "replace")
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
