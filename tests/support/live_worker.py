"""A worker that runs in a thread of the test: the real daemon at a real broker, with an engine that the test holds in its hand."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.service.daemon import Daemon
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine


class LiveWorker:
    """Serves `llm/...` at the broker of this port from `with` to its end; settings as `load` takes them."""

    def __init__(self, port: int, folder: Path, engine: ScriptedEngine, **settings: str) -> None:
        self.engine = engine
        given = {
            "mqtt.host": "127.0.0.1",
            "mqtt.port": str(port),
            "mqtt.worker_id": "live",
            "mqtt.reconnect_max_s": "0.5",
            "sessions.path": str(folder / "state.db"),
            "limits.drain_timeout_s": "2",
            "status.every_s": "1",
        }
        given |= {name.replace("__", "."): value for name, value in settings.items()}
        self.port = port
        self._user = given.get("mqtt.username")
        self._password = Path(given["mqtt.password_file"]).read_text("utf-8") if "mqtt.password_file" in given else None
        self._status_topic = f"{given.get('mqtt.root', 'llm')}/status/{given['mqtt.worker_id']}"
        self.daemon = Daemon(load(None, given, environ={}), engine=engine)
        self._thread = threading.Thread(target=self.daemon.run, name="live-worker", daemon=True)

    def __enter__(self) -> Self:
        online = threading.Event()
        watcher = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        if self._user is not None:
            watcher.username_pw_set(self._user, self._password)
        watcher.on_connect = lambda client, *_: client.subscribe(self._status_topic, qos=1)

        def received(_client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
            if message.payload and json.loads(message.payload)["state"] == "online":
                online.set()

        watcher.on_message = received
        watcher.connect("127.0.0.1", self.port)
        watcher.loop_start()
        self._thread.start()
        try:
            assert online.wait(20), "the worker does not come online"
        finally:
            watcher.disconnect()
            watcher.loop_stop()
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.stop()
        self.daemon.stop()
        self._thread.join(20)
        assert not self._thread.is_alive(), "the daemon does not end"
