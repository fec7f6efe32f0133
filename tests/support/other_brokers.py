"""Brokers that are not mosquitto, as child processes: nats-server, RabbitMQ and aedes; and which of them are to be tested."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.mosquitto import free_port
from tests.support.services import missing
from tests.support.waiting import eventually

CHOSEN = tuple(os.environ.get("BROKERS", "").split())
"""Names of further brokers, as in BROKERS="nats rabbitmq aedes". Then gaps that are known are measured instead of skipped."""

CHOSEN_MEMBERS = tuple(f"{name}-3.1.1" for name in CHOSEN)

REASONS: dict[tuple[str, str], str] = {}

_NODE_MODULES = Path(__file__).parents[2] / ".venv" / "node" / "node_modules"
_PATHS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/lib/rabbitmq/bin"])
_AEDES = """
import { Aedes } from 'aedes'
import { createServer } from 'node:net'
const broker = await Aedes.createBroker()
createServer(broker.handle).listen(Number(process.argv[2]), '127.0.0.1')
"""
_NATS = """
server_name: contract
listen: 127.0.0.1:{other_port}
jetstream {{ store_dir: "{folder}/jetstream" }}
mqtt {{ listen: "127.0.0.1:{port}" }}
"""
_RABBIT = """
listeners.tcp = none
mqtt.listeners.tcp.default = 127.0.0.1:{port}
mqtt.allow_anonymous = true
# A session is kept for as long as the worker asks for on MQTT 5; here an hour.
mqtt.subscription_ttl = 3600000
# Else the anonymous user, guest, is let in from this machine by luck of how localhost is written.
loopback_users = none
"""


def installed(name: str) -> bool:
    match name:
        case "nats":
            return shutil.which("nats-server", path=_PATHS) is not None
        case "rabbitmq":
            return Path("/usr/lib/rabbitmq/bin/rabbitmq-server").exists()
        case "aedes":
            return shutil.which("node") is not None and (_NODE_MODULES / "aedes").exists()
        case _:
            return False


class OtherBroker:
    """One of `nats`, `rabbitmq`, `aedes` on `port`, for anonymous clients. What it keeps on disk outlives a restart."""

    def __init__(self, name: str) -> None:
        if not installed(name):
            missing(f"the broker {name} is not installed")
        self.name = name
        self.host = "127.0.0.1"
        self.port, self._other_port, self._epmd_port = free_port(), free_port(), free_port()
        self._directory = tempfile.TemporaryDirectory(prefix=f"{name}-")
        self.folder = Path(self._directory.name)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> OtherBroker:
        match self.name:
            case "nats":
                text = _NATS.format(port=self.port, other_port=self._other_port, folder=self.folder)
                self._run("nats-server", "-c", str(self._written("nats.conf", text)))
            case "aedes":
                # A module finds its imports beside itself.
                link = self.folder / "node_modules"
                if not link.exists():
                    link.symlink_to(_NODE_MODULES)
                self._run("node", str(self._written("broker.mjs", _AEDES)), str(self.port))
            case _:
                self._start_rabbitmq()
        eventually(self._listens, 90.0, every_s=0.05)
        return self

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()

    def _start_rabbitmq(self) -> None:
        self._written("rabbitmq.conf", _RABBIT.format(port=self.port))
        environment = {
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"n{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._other_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._written("plugins", "[rabbitmq_mqtt].\n")),
        }
        # Erlang would start this name server by itself and leave it running.
        self._run("epmd", "-port", str(self._epmd_port))
        self._run("/usr/lib/rabbitmq/bin/rabbitmq-server", environment=environment)

    def _run(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        program = shutil.which(command[0], path=_PATHS)
        assert program is not None, f"{command[0]} is not installed"
        with (self.folder / "log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [program, *command[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | (environment or {}),
                    start_new_session=True,  # scripts of a shell around Erlang: ended as a group
                )
            )

    def _written(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def _end(self, how: signal.Signals) -> None:
        for process in reversed(self._processes):
            os.killpg(process.pid, how)
            process.wait(60)
        self._processes.clear()

    def _listens(self) -> bool:
        log = self.folder / "log"
        assert all(process.poll() is None for process in self._processes), log.read_text(errors="replace")[-4000:]
        try:
            socket.create_connection((self.host, self.port), 1).close()
        except OSError:
            return False
        return True
