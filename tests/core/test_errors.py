"""The codes of errors and what they promise, as the protocol lists them."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core import errors
from llamacpp_mqtt_deploy.core.errors import RequestError

RETRYABLE = {
    "busy",
    "session_busy",
    "rate_limited",
    "idle_timeout",
    "engine_unavailable",
    "engine_lost",
    "interrupted",
    "shutting_down",
}
FINAL = {
    "bad_request",
    "payload_too_large",
    "model_not_found",
    "unsupported",
    "context_overflow",
    "timeout",
    "engine_error",
    "internal",
}


def test_the_codes_that_may_succeed_later_are_those_of_the_protocol() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RequestError)]
    told = {kind.code: kind.retryable for kind in kinds if kind is not RequestError}
    assert told == dict.fromkeys(RETRYABLE, True) | dict.fromkeys(FINAL, False)
