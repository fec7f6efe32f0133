"""The client side of the bus for Python programs: `BusClient`, its answers and its errors."""

from llamacpp_mqtt_deploy.client.address import tls_context
from llamacpp_mqtt_deploy.client.answer import Answer, Done
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

__all__ = [
    "Answer",
    "AnswerError",
    "AnswerLost",
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
