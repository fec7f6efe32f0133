"""`lmd` as a process: on a pipe, or on a pseudo terminal, as a person would run it: typed lines, Ctrl-C, and everything it printed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.cells import cell_len

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


def screen(output: str, columns: int) -> list[str]:
    """The lines that a terminal of this width shows: it wraps by itself, moves back, erases to the end of the line."""
    lines, cells = [""], 0
    for part in re.findall(r"\x1b\[\d+D|\x1b\[K|.|\n", output):
        if part == "\n":
            lines.append("")
            cells = 0
        elif part.endswith("D") and len(part) > 1:
            assert cells < columns, "the cursor waits behind the last column"
            cells -= int(part[2:-1])
            assert cells >= 0
        elif part == "\x1b[K":
            while cell_len(lines[-1]) > cells:
                lines[-1] = lines[-1][:-1]
        else:
            if cells + cell_len(part) > columns:
                lines.append("")
                cells = 0
            lines[-1] += part
            cells += cell_len(part)
    return lines


class Terminal:
    """`lmd` with these arguments under a pty of 100 columns; `text` grows while it prints."""

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str]) -> None:
        self.text = ""
        self.code: int | None = None
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                # As under a terminal: a shell starts what runs in its background with Ctrl-C ignored, nohup all with SIGHUP, and
                # that is inherited.
                for number in (signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                os.environ.clear()
                os.environ.update(environment)
                os.execv(sys.executable, [sys.executable, "-m", "llamacpp_mqtt_deploy", *arguments])
            os._exit(127)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self._reader = threading.Thread(target=self._read, name="test-terminal")
        self._reader.start()

    def enter(self, line: str) -> None:
        os.write(self._master, f"{line}\n".encode("utf-8", "surrogateescape"))

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def paste(self, text: str) -> None:
        """What a terminal sends for a paste, once a program has asked it to mark pastes; then Enter."""
        self.shows("\x1b[?2004h")
        os.write(self._master, f"\x1b[200~{text}\x1b[201~\n".encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.write(self._master, b"\x03")

    def end_of_input(self) -> None:
        """Ctrl-D at the prompt: in the moment before it the terminal itself takes it, and nobody gets it."""
        eventually(lambda: self.text.endswith("> ") or self.code is not None)
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
