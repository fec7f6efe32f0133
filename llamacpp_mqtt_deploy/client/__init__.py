"""The client side of the bus for Python programs: `BusClient` and `AsyncBusClient`, their answers and errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llamacpp_mqtt_deploy.client.address import tls_context
from llamacpp_mqtt_deploy.client.answer import Answer
from llamacpp_mqtt_deploy.client.bus import BusClient
from llamacpp_mqtt_deploy.client.exceptions import (
    AnswerError,
    AnswerLost,
    BrokerRefused,
    BrokerUnreachable,
    BusError,
    NotPermitted,
    NoWorker,
    RequestRejected,
)
from llamacpp_mqtt_deploy.client.followed import Done

if TYPE_CHECKING:
    from llamacpp_mqtt_deploy.client.async_answer import AsyncAnswer
    from llamacpp_mqtt_deploy.client.async_bus import AsyncBusClient

__all__ = [
    "Answer",
    "AnswerError",
    "AnswerLost",
    "AsyncAnswer",
    "AsyncBusClient",
    "BrokerRefused",
    "BrokerUnreachable",
    "BusClient",
    "BusError",
    "Done",
    "NoWorker",
    "NotPermitted",
    "RequestRejected",
    "tls_context",
]

_HOMES = {"AsyncAnswer": "async_answer", "AsyncBusClient": "async_bus"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - asyncio, only for whoever uses it

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
