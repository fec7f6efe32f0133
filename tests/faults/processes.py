"""The processes that a run starts and ends: clients of the rig, and what is wrong with how a worker ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.model import Broken
from tests.support.daemon_process import DaemonProcess

ROOT = Path(__file__).parents[2]
END_S = 20.0
"""A worker with a drain of 3 s has ended this long after SIGTERM, whatever hangs."""


@dataclass(slots=True)
class ClientProcess:
    """One client of the rig; MQTT 5 or 3.1.1, with a session that outlives it or without, or a user of the package's own client."""

    name: str
    protocol: str
    clean: bool
    module: str = "tests.faults.client"
    arguments: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        command = [sys.executable, "-m", self.module, *self.arguments]
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def end(self, how: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


def ended(life: DaemonProcess, *, by_term: bool) -> list[Broken]:
    """Wait for the end of a worker that was killed or told to end; what is wrong with it."""
    try:
        code = life.process.wait(END_S)
    except subprocess.TimeoutExpired:
        code = None
        life.kill()
    # Before its first line the worker has not yet asked Python for its signals.
    early = code == -signal.SIGTERM and not life.log("worker.starting")
    if by_term and code != 0 and not early:
        said = "did not end" if code is None else f"ended with {code}"
        return [Broken("process", "", f"after SIGTERM the worker {said} within {END_S:g} s")]
    return []


def clean_end(life: DaemonProcess) -> list[Broken]:
    """SIGTERM when nothing is broken: the exit code is 0."""
    try:
        code = life.stop()
    except AssertionError as error:
        return [Broken("process", "", str(error))]
    return [Broken("process", "", f"the last SIGTERM brought exit code {code}")] if code else []
