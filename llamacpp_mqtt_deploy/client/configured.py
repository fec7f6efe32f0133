"""A client for the broker that the configuration names: what `[mqtt]` says as the arguments of a bus client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.config.settings import Settings


def bus_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `BusClient` and `AsyncBusClient`; raises ValueError for TLS files that cannot be used."""
    from llamacpp_mqtt_deploy.config.credentials import mqtt_password  # noqa: PLC0415 - loads pydantic, for those who use it
    from llamacpp_mqtt_deploy.mqtt.tls import build_context  # noqa: PLC0415

    mqtt = settings.mqtt
    return {
        "host": mqtt.host,
        "port": mqtt.port,
        "username": mqtt.username,
        "password": mqtt_password(settings),
        "tls": build_context(mqtt.tls) if mqtt.tls.enabled else False,
        "root": mqtt.root,
        "protocol": mqtt.protocol,
        "transport": mqtt.transport,
        "websocket_path": mqtt.websocket_path,
        "keepalive_s": mqtt.keepalive_s,
    }
