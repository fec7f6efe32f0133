"""The daemon as systemd starts it: a child process with a configuration file, a notify socket of its own and its log in a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.waiting import eventually

# Lines that mean a defect in the worker, whatever the test was about.
DEFECTS = (
    "generation.failed",
    "intake.failed",
    "io.call_failed",
    "link.failed",
    "link.thread_died",
    "link.callback_failed",
    "link.close_timed_out",
    "engine.probe_failed",
    "worker.failed",
    "worker.close_failed",
    "thread.died",
    "process.failed",
    "log.failed",
)
_CONTROL_CHARACTERS = re.compile(rb"[\x00-\x09\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


class NotifySocket:
    """What systemd would hear: each datagram as text with the time of its arrival (monotonic seconds)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="notify-")  # short: a socket's path has at most 107 bytes
        self.path = str(Path(self._folder.name) / "s")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(0.2)
        self._condition = threading.Condition()
        self._heard: list[tuple[float, str]] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="notify", daemon=True)
        self._thread.start()

    def heard(self) -> list[tuple[float, str]]:
        with self._condition:
            return list(self._heard)

    def words(self) -> list[str]:
        return [word for _, word in self.heard()]

    def close(self) -> None:
        self._closed.set()
        self._thread.join(5)
        self._socket.close()
        self._folder.cleanup()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                word = self._socket.recv(65536).decode("utf-8", "replace")
            except TimeoutError:
                continue
            with self._condition:
                self._heard.append((time.monotonic(), word))


class DaemonProcess:
    """One life of a worker: `lmd run` with these settings (`limits__queue_size=3`, later ones win) in a folder of its own.

    The same folder again is the next life: state and worker id stay. `environment` adds variables. `stderr` is where its log goes
    instead of a file.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        stderr: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.settings: dict[str, Any] = {
            "sessions.path": str(folder / "state.db"),
            "mqtt.worker_id": "w1",
            "mqtt.host": "127.0.0.1",
            "limits.drain_timeout_s": 20,
            "logging.format": "json",
        }
        self.settings |= {name.replace("__", "."): value for name, value in (settings or {}).items()}
        self.config_path = folder / "config.toml"
        self.log_path = folder / f"log-{len(list(folder.glob('log-*')))}"
        self._environment = dict(environment or {})
        self._stderr = stderr
        self._notify: NotifySocket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0

    # --- life ----------------------------------------------------------------------------------------------------------

    def write_config(self, **settings: Any) -> None:
        """Write the configuration file, changed by these settings."""
        self.settings |= {name.replace("__", "."): value for name, value in settings.items()}
        # Strings, numbers, booleans and lists of them are the same in TOML and JSON.
        lines = (f"{key} = {json.dumps(value)}" for key, value in self.settings.items())
        self.config_path.write_text("\n".join(lines) + "\n")

    def start(self) -> DaemonProcess:
        self.write_config()
        self._notify = NotifySocket()
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self.started_at = time.monotonic()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llamacpp_mqtt_deploy", "run", "--config", str(self.config_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log if self._stderr is None else self._stderr,
                env=environment | {"NOTIFY_SOCKET": self._notify.path} | self._environment,
                cwd=Path(__file__).parents[2],
            )
        return self

    def wait_ready(self, timeout_s: float = 30.0) -> float:
        """Wait for READY=1; returns the seconds since the start of the process."""
        self.until(lambda: "READY=1" in self.notify.words(), timeout_s, "READY=1")
        at = next(at for at, word in self.notify.heard() if word == "READY=1")
        return at - self.started_at

    def until(self, predicate: Callable[[], object], timeout_s: float, what: str) -> None:
        """Wait while the process lives; its end, or the timeout, fails the test with the end of its log."""

        def held() -> bool:
            if predicate():
                return True
            code = self.process.poll()
            assert code is None, f"the worker ended with {code} before {what}:\n{self.log_text()[-4000:]}"
            return False

        try:
            eventually(held, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"no {what} within {timeout_s:g} s: {error}\n{self.log_text()[-4000:]}") from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            raise AssertionError(f"the worker did not end within {timeout_s:g} s:\n{self.log_text()[-4000:]}") from None

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        self.send(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory is short."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End whatever is left; never fails."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        if self._notify is not None:
            self._notify.close()

    # --- looking -------------------------------------------------------------------------------------------------------

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def notify(self) -> NotifySocket:
        assert self._notify is not None, "not started"
        return self._notify

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of the log as they are at the moment; only those of one event when it is given."""
        lines = []
        for text in self.log_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text)
                if isinstance(line, dict) and (event is None or line.get("event") == event):
                    lines.append(line)
        return lines

    def rss_bytes(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def check_log(self) -> None:
        """Nothing in the log may tell of a defect, draw a line of its own, or be anything but JSON (exit code 2 excepted)."""
        raw = self.log_path.read_bytes() if self.log_path.exists() else b""
        assert not (found := _CONTROL_CHARACTERS.search(raw)), raw[max(0, found.start() - 200) : found.end() + 200]
        assert b"Traceback" not in raw, raw[-8000:].decode(errors="replace")
        defects = [line for line in self.log() if line.get("event") in DEFECTS]
        assert not defects, defects[:3]
