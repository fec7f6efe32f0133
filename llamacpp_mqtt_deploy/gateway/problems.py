"""What the gateway itself has to say when a request fails, and errors of the bus in the form of an `error` event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.client.exceptions import (
    AnswerError,
    AnswerLost,
    BrokerRefused,
    BrokerUnreachable,
    BusError,
    NotPermitted,
    NoWorker,
)
from llamacpp_mqtt_deploy.core.errors import RequestError

COME_BACK_S = 5.0
"""What `Retry-After` says while there is no worker or no broker: reconnects take a few seconds."""


class Unauthorized(RequestError):
    """There is no key, or it is not known."""

    code = "unauthorized"


class Forbidden(RequestError):
    """The key, or the page that asks, may not do this."""

    code = "forbidden"


class NotFound(RequestError):
    """There is nothing at this address."""

    code = "not_found"


class MethodNotAllowed(RequestError):
    """The address is right and the method is not."""

    code = "method_not_allowed"


class UpgradeRequired(RequestError):
    """The address is that of a WebSocket, and the request is none."""

    code = "upgrade_required"


class AnotherRequest(RequestError):
    """An id is used for a second request while the first one is under way."""

    code = "duplicate_request"


class NobodyServes(RequestError):
    """No worker is online."""

    code = "no_worker"
    retryable = True


class BrokerAway(RequestError):
    """The gateway has no connection to the broker at the moment."""

    code = "broker_unreachable"
    retryable = True


def told(error: BusError) -> dict[str, Any]:
    """An error of the bus client as an `error` event; sentences about topics and brokers stay in the log of the gateway."""
    match error:
        case AnswerError():
            return _event(error.code, error.message, retryable=error.retryable) | _safe(error.details)
        case NoWorker():
            return _event("no_worker", "No worker is online.", retryable=True, retry_after_s=COME_BACK_S)
        case BrokerUnreachable() | BrokerRefused():
            message = "The connection to the broker is lost; it is being restored."
            return _event("broker_unreachable", message, retryable=True, retry_after_s=COME_BACK_S)
        case NotPermitted():
            return _event("internal", "The broker does not let the gateway ask here; its log says more.")
        case AnswerLost():
            return _event("answer_lost", "The answer broke off, and the worker did not bring the rest.", retryable=True)
        case _:
            return _event("internal", "The request cannot be sent; the gateway's log says more.")


def _event(code: str, message: str, *, retryable: bool = False, **details: Any) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message, "retryable": retryable, **details}


def _safe(details: Mapping[str, Any]) -> dict[str, Any]:
    names = ("fields", "retry_after_s", "n_prompt_tokens", "n_ctx", "partial_content", "usage", "timings", "metadata")
    return {name: details[name] for name in names if name in details}
