"""A gateway in front of a real broker and a real worker whose engine plays scripts: what the tests of HTTP talk to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.gateway.key_ring import KeyEntry, KeyRing, hash_of, new_key, write_keys
from llamacpp_mqtt_deploy.gateway.serving import Gateway, listen, url_of
from llamacpp_mqtt_deploy.service.daemon import Daemon
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.client.looped import LoopThread
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually


class ScriptedWorker:
    """The real daemon over a real broker, with a scripted engine, in a thread."""

    def __init__(self, port: int, folder: Path, engine: ScriptedEngine | None = None, **settings: Any) -> None:
        self.engine = engine or ScriptedEngine(slots=4)
        given = {name.replace("__", "."): str(value) for name, value in settings.items()}
        base = {
            "sessions.path": str(folder / "state.db"),
            "mqtt.worker_id": "w1",
            "mqtt.host": "127.0.0.1",
            "mqtt.port": str(port),
            "limits.drain_timeout_s": "2",
            "status.health_every_s": "1",
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.daemon = Daemon(load(None, base | given, environ={}), engine=self.engine)
        self._thread = threading.Thread(target=self.daemon.run, name="worker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.daemon.stop()
        self.daemon.stop()
        self._thread.join(20)
        assert not self._thread.is_alive(), "the worker does not end"


class Manager:
    """What systemd would hear."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def ready(self) -> None:
        self.words.append("ready")

    def stopping(self) -> None:
        self.words.append("stopping")

    def status(self, text: str) -> None:
        self.words.append(f"status {text}")

    def watchdog(self) -> None:
        self.words.append("watchdog")


class RunningGateway:
    """A gateway in a loop of its own; `settings` as `gateway__heartbeat_s=1`, keys as `keys={"alice": {...}}`."""

    def __init__(
        self, port: int, folder: Path, *, keys: dict[str, dict[str, Any]] | None = None, **settings: Any
    ) -> None:
        given = {name.replace("__", "."): str(value) for name, value in settings.items()}
        base = {"mqtt.host": "127.0.0.1", "mqtt.port": str(port), "gateway.port": "0", "gateway.drain_timeout_s": "2"}
        self.keys: dict[str, str] = {}
        ring = None
        if keys is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.keys_file = folder / "keys.toml"
            self.write_keys(keys)
            base["gateway.keys_file"] = str(self.keys_file)
            ring = KeyRing(self.keys_file)
            ring.load()
        self.settings = load(None, base | given, environ={}).settings
        self.manager = Manager()
        sock: socket.socket = listen(self.settings.gateway)
        self.url = url_of(sock)
        self.port = int(sock.getsockname()[1])
        mqtt = self.settings.mqtt
        password = None if mqtt.password is None else mqtt.password.get_secret_value()
        options = {"host": mqtt.host, "port": mqtt.port, "username": mqtt.username, "password": password}
        self.gateway = Gateway(self.settings, bus_options=options, keys=ring, manager=self.manager)
        self._thread = LoopThread()
        self._done = asyncio.run_coroutine_threadsafe(self.gateway.run(sock, signals=False), self._thread.loop)
        self._closed = False

    def write_keys(self, keys: dict[str, dict[str, Any]]) -> None:
        for name in keys:
            self.keys.setdefault(name, new_key())
        entries = {
            name: KeyEntry(**({"level": name} | wishes), sha256=hash_of(self.keys[name]))
            for name, wishes in keys.items()
        }
        write_keys(self.keys_file, entries)

    def wait_ready(self) -> None:
        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            return False

        eventually(ready, 20)

    def stop_soon(self) -> None:
        """As SIGTERM does."""
        self._thread.loop.call_soon_threadsafe(self.gateway.stop)

    def join(self, timeout_s: float = 20.0) -> None:
        self._done.result(timeout_s)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._done.done():
            self.stop_soon()
            self.stop_soon()
        self.join()
        self._thread.close()


class World:
    """Broker, worker and gateway of one test."""

    def __init__(self, broker: Mosquitto, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self.workers: list[ScriptedWorker] = []
        self.gateways: list[RunningGateway] = []

    def worker(self, engine: ScriptedEngine | None = None, **settings: Any) -> ScriptedWorker:
        worker = ScriptedWorker(self.broker.port, self.folder / "worker", engine, **settings)
        self.workers.append(worker)
        return worker

    def gateway(self, *, ready: bool = True, **wishes: Any) -> RunningGateway:
        gateway = RunningGateway(self.broker.port, self.folder / f"gateway-{len(self.gateways)}", **wishes)
        self.gateways.append(gateway)
        if ready:
            gateway.wait_ready()
        return gateway

    def close(self) -> None:
        for gateway in self.gateways:
            gateway.close()
        for worker in self.workers:
            worker.stop()


@contextlib.contextmanager
def world_of(broker: Mosquitto, folder: Path) -> Iterator[World]:
    world = World(broker, folder)
    try:
        yield world
    finally:
        world.close()
