"""One server process: started so that it dies with us, heard, told to end, and its end taken note of."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamacpp_mqtt_deploy.engines.managed.launching import CannotLaunch, tied

READ_BYTES = 65536
EXITED_LOOK_EVERY_S = 0.1
"""How often to look whether it ended, on kernels that cannot tell (before Linux 5.3, or forbidden in a container)."""


def oom_kills() -> int | None:
    """How many processes of our control group the kernel has killed for lack of memory; None where it does not tell."""
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").partition("::")[2].splitlines()[0]
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text(encoding="ascii")
        return int(events.partition("oom_kill ")[2].splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None


class Child:
    """Made, and reaped by `reap`, in one thread that outlives it: Linux kills the child when that thread ends. `send` may be
    called from any."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        try:
            # A session of its own: the terminal's Ctrl-C must not end the server before the worker has drained.
            self._process = subprocess.Popen(  # noqa: S603 - the operator's own program, without a shell
                tied(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=dict(environment),
                bufsize=0,
            )
        except OSError as error:
            raise CannotLaunch(f"{command[0]} cannot be started: {error.strerror}") from error
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.output, False)
        self.ending: int | None = None
        """Becomes readable when the process ends; None where the kernel does not offer it."""
        with contextlib.suppress(OSError, AttributeError):
            self.ending = os.pidfd_open(self.pid)
        self._lock = threading.Lock()
        self._reaped = False

    def read(self) -> bytes | None:
        """What it wrote since; empty when it closed its output, None when there is nothing now."""
        try:
            return os.read(self.output, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and what it started."""
        with self._lock:
            if not self._reaped:  # until then nobody else can have its number
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, number)

    def reap(self) -> int | None:
        """Its exit code once it has ended, negative for a signal, with what it left behind killed; None before."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self.send(signal.SIGKILL)
        with self._lock:
            self._reaped = True
            return self._process.wait()

    def close(self) -> None:
        """Kill it if it still runs, and let go of everything."""
        if not self._reaped:
            self.send(signal.SIGKILL)
            with self._lock:
                self._reaped = True
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self.ending is not None:
            os.close(self.ending)
            self.ending = None
