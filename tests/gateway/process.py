"""The gateway as systemd starts it: a child process that can be killed, with a notify socket of its own and its log in a file."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.daemon_process import NotifySocket
from tests.support.ports import free_port
from tests.support.waiting import eventually


class GatewayProcess:
    """`lmd gateway` with these settings (`gateway__heartbeat_s=1`) on a port that stays the same over its lives."""

    def __init__(self, folder: Path, broker_port: int, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.notify = NotifySocket()
        self._config = folder / "gateway.toml"
        self._log = folder / "gateway.log"
        given = {
            "mqtt.host": "127.0.0.1",
            "mqtt.port": broker_port,
            "gateway.port": self.port,
            "logging.format": "json",
        } | {name.replace("__", "."): value for name, value in settings.items()}
        self._config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> GatewayProcess:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        heard = len(self.notify.words())
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llamacpp_mqtt_deploy", "gateway", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"NOTIFY_SOCKET": self.notify.path},
                cwd=Path(__file__).parents[2],
            )
        eventually(lambda: "READY=1" in self.notify.words()[heard:] or self._ended(), 30)
        return self

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout_s)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        self.notify.close()

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def log(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def rss_bytes(self) -> int:
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, timeout_s: float = 20.0) -> None:
        """Until a request would be answered: the broker is there, and a worker is known."""

        def ready() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/readyz")
                return connection.getresponse().status == 200
            return False

        eventually(ready, timeout_s)

    def _ended(self) -> bool:
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"the gateway ended with {code}:\n{self.log_text()[-4000:]}"
        return False
