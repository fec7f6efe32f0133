"""The processes that the demo starts and their directory: nothing of it outlives the demo, however the demo ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llamacpp_mqtt_deploy.demo import cleanup
from llamacpp_mqtt_deploy.engines.managed import lifeline

LOOK_EVERY_S = 0.02
_TAIL_BYTES = 16 * 1024


class DemoFailed(Exception):
    """The demo cannot go on; the text says what happened and what to do, `lines` are the last words of the process."""

    def __init__(self, message: str, lines: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.lines = tuple(lines)


@dataclass(frozen=True, slots=True)
class DemoProcess:
    """A process of the processes; its output goes to `log`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of its output, as it is: not fit for a terminal yet."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return text.splitlines()[-count:]

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL when it does not end in time."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
                return
            self.process.kill()
            self.process.wait()


class DemoProcesses:
    """A private directory and the processes in it, youngest stopped first. `pause(seconds)` may raise to end every wait.

    Three things hold when the demo itself is killed: the kernel kills each child (`lifeline`), each child's children die
    with it, and the cleanup script removes the directory. Start it and its children from one thread that lives as long as the demo.
    """

    def __init__(self, pause: Callable[[float], None]) -> None:
        self._pause = pause
        self._children: list[DemoProcess] = []
        self._pipe = -1
        self._cleanup: subprocess.Popen[bytes] | None = None
        self.directory = Path()

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="lmd-demo-")).absolute()
        reading, self._pipe = os.pipe()
        try:
            self._cleanup = subprocess.Popen(  # noqa: S603 - our own script
                [sys.executable, "-I", "-S", str(cleanup.__file__), str(self.directory)],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        finally:
            os.close(reading)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for child in reversed(self._children):
                child.stop(timeout_s=12.0)  # more than the worker needs for its own orderly end
        finally:
            os.close(self._pipe)
            if self._cleanup is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._cleanup.wait(6.0)

    def start(self, name: str, command: Sequence[str], *, environ: Mapping[str, str]) -> DemoProcess:
        """Start a program (its path first) that cannot outlive us. Ctrl-C does not reach it: we stop it in our order."""
        log = self.directory / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - no shell, and a list that we made
                [sys.executable, "-I", "-S", str(lifeline.__file__), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environ),
                start_new_session=True,
                pass_fds=(self._pipe,),
            )
        child = DemoProcess(name, process, log)
        self._children.append(child)
        return child

    def wait(self, child: DemoProcess, what: str, predicate: Callable[[], bool], timeout_s: float) -> None:
        """Wait until it is so. Raises DemoFailed when the child ends or the time passes before."""
        ends_at = time.monotonic() + timeout_s
        while not predicate():
            if (code := child.ended) is not None:
                raise DemoFailed(
                    f"The {child.name} ended before it was {what} ({_ending(code)}).", _told(child.last_lines())
                )
            if time.monotonic() >= ends_at:
                raise DemoFailed(f"The {child.name} was not {what} within {timeout_s:g} s.", _told(child.last_lines()))
            self._pause(LOOK_EVERY_S)

    def forget(self, child: DemoProcess) -> None:
        """Stop a child that did not work out."""
        child.stop(timeout_s=2.0)
        self._children.remove(child)

    def last_lines(self, name: str) -> Sequence[str]:
        """The end of a child's output."""
        return next((child.last_lines() for child in self._children if child.name == name), ())

    def watch(self) -> None:
        """Raises DemoFailed when a child has ended."""
        for child in self._children:
            if (code := child.ended) is not None:
                raise DemoFailed(f"The {child.name} ended by itself ({_ending(code)}).", _told(child.last_lines()))


def _told(lines: Sequence[str]) -> Sequence[str]:
    return lines or ("(it said nothing)",)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
