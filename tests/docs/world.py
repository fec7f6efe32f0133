"""What the commands of the documentation meet: a broker at the usual place, a llama.cpp server, and a worker started by `lmd run`."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from llamacpp_mqtt_deploy import demo_model
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.services import require_program
from tests.support.waiting import eventually

DEMO_MODEL = Path(demo_model.__file__).with_name("demo.gguf")

# Each takes the place of the real program in PATH and adds the port that stands for 1883 here.
_WRAPPER = '#!/bin/sh\nexec {program} -h 127.0.0.1 -p {port} "$@"\n'


class World:
    """A broker and a worker of their own; the model server may be shared."""

    def __init__(self, folder: Path, server: LlamaServer, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.server = server
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.broker = Mosquitto(folder / "broker", websockets=True).start()
        self.environment = self._environment() | dict(settings or {})
        self.worker_log: list[str] = []
        self._worker: subprocess.Popen[str] | None = None

    def _environment(self) -> dict[str, str]:
        wrappers = self.folder / "bin"
        wrappers.mkdir()
        for name in ("mosquitto_pub", "mosquitto_sub", "mosquitto_rr"):
            file = wrappers / name
            file.write_text(_WRAPPER.format(program=shlex.quote(require_program(name)), port=self.broker.port))
            file.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMD_", "XDG_"))}
        path = [str(wrappers), str(Path(sys.executable).parent), kept.get("PATH", "")]
        return kept | {
            "PATH": os.pathsep.join(path),
            "HOME": str(self.home),
            "NO_COLOR": "1",
            "PYTHONFAULTHANDLER": "1",
            "BROKER_LOG": str(self.broker.log_path),
            "LMD_MQTT__HOST": "localhost",
            "LMD_MQTT__PORT": str(self.broker.port),
            "LMD_MQTT__WORKER_ID": "kitchen",
            "LMD_ENGINE__URL": self.server.url,
            "LMD_GENERATION__TEMPERATURE": "0",
            "LMD_LOGGING__FORMAT": "console",
        }

    def start_worker(self, command: str = "lmd run") -> list[str]:
        """Start the worker unless it runs, and wait until it is ready; its log up to then."""
        if self._worker is None:
            self._worker = subprocess.Popen(
                shlex.split(command),
                env=self.environment,
                cwd=self.home,
                executable=shutil.which("lmd", path=self.environment["PATH"]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self._reader = threading.Thread(target=self._read, args=[self._worker], name="docs-worker-log")
            self._reader.start()
            try:
                eventually(lambda: self._ready() is not None, 60.0)
            except AssertionError as error:
                self._worker.send_signal(signal.SIGABRT)
                self._reader.join(5)
                raise AssertionError(
                    "the worker is not ready; its log and threads:\n" + "\n".join(self.worker_log)
                ) from error
        ready = self._ready()
        assert ready is not None
        return self.worker_log[: ready + 1]

    def _ready(self) -> int | None:
        assert self._worker is not None
        assert self._worker.poll() is None, "\n".join(self.worker_log)
        return next((at for at, line in enumerate(self.worker_log) if "worker.ready" in line), None)

    def _read(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        self.worker_log.extend(line.rstrip("\n") for line in worker.stdout)

    def at_home(self, text: str) -> str:
        """The output with the ports and paths that a reader has."""
        text = text.replace(str(self.broker.port), "1883").replace(str(self.server.port), "8080")
        return text.replace(str(self.home), "/home/you")

    def here(self, text: str) -> str:
        """A snippet with this world's ports in the place of the usual ones."""
        return text.replace("1883", str(self.broker.port)).replace("8080", str(self.server.port))

    def close(self) -> None:
        if self._worker is not None:
            self._worker.send_signal(signal.SIGTERM)
            try:
                self._worker.wait(15)
            except subprocess.TimeoutExpired:
                self._worker.kill()
                self._worker.wait(5)
            self._reader.join(5)
            assert self._worker.stdout is not None
            self._worker.stdout.close()
        self.broker.close()
