"""Chooses the members of the families that the configuration names; each one's libraries are imported only when it is chosen."""

from __future__ import annotations

import hashlib

from pydantic import SecretStr

from llamacpp_mqtt_deploy.credentials import engine_api_key, mqtt_password
from llamacpp_mqtt_deploy.ports import Engine, Link, Store
from llamacpp_mqtt_deploy.settings import MqttSettings, Settings


def client_id(settings: MqttSettings) -> str:
    """Stable over restarts, and another one for each root: `lmd-{hash of root}-{worker_id}`."""
    return f"lmd-{hashlib.sha256(settings.root.encode()).hexdigest()[:8]}-{settings.worker_id}"


def make_engine(settings: Settings) -> Engine:
    """The engine that `engine.kind` names."""
    key = engine_api_key(settings)
    engine = settings.engine.model_copy(update={"api_key": SecretStr(key) if key else None, "api_key_file": None})
    match engine.kind:
        case "server":
            from llamacpp_mqtt_deploy.engines.server import ServerEngine

            return ServerEngine(engine)
        case "managed":
            from llamacpp_mqtt_deploy.engines.managed import ManagedEngine

            return ManagedEngine(engine)
        case "inprocess":
            from llamacpp_mqtt_deploy.engines.inprocess import InprocessEngine

            return InprocessEngine(engine)


def make_store(settings: Settings) -> Store:
    """The store that `sessions.store` names."""
    if settings.sessions.store == "memory":
        from llamacpp_mqtt_deploy.stores.memory import MemoryStore

        return MemoryStore()
    from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore

    return SqliteStore(settings.sessions.path)


def make_link(settings: Settings) -> Link:
    """The link to the broker of `[mqtt]`."""
    from llamacpp_mqtt_deploy.mqtt.link import MqttLink

    return MqttLink(settings.mqtt, client_id=client_id(settings.mqtt), password=mqtt_password(settings))
