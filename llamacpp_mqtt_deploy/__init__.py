"""llamacpp_mqtt_deploy puts a local language model on an MQTT bus; importing it loads nothing but this version.

`LlamaCppClient` and `DeploymentConfig` talk to a server directly, `BusClient` and, for asyncio programs, `AsyncBusClient` ask a
worker over the bus; each is loaded when it is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client import AsyncBusClient, BusClient
    from llamacpp_mqtt_deploy.direct import DeploymentConfig, LlamaCppClient

__version__ = "0.1.0"

__all__ = ["AsyncBusClient", "BusClient", "DeploymentConfig", "LlamaCppClient", "__version__"]

_HOMES = {"AsyncBusClient": "client", "BusClient": "client", "DeploymentConfig": "direct", "LlamaCppClient": "direct"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - only for whoever asks for a name

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
