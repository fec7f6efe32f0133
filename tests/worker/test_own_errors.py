"""What a client is told when the worker itself ends its request."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.stopping import StopReason
from llamacpp_mqtt_deploy.worker.own_errors import lost_too_often, stop_error


@pytest.mark.parametrize(
    "reason, code, retryable",
    [
        ("timeout", "timeout", False),
        ("shutting_down", "shutting_down", True),
        ("outbox_full", "interrupted", True),
        ("unjournaled", "internal", False),
        ("engine_away", "engine_unavailable", True),
        (None, "internal", False),
    ],
)
def test_each_reason_to_stop_has_its_code(reason: StopReason | None, code: str, retryable: bool) -> None:
    error = stop_error(reason, limit_s=60.0, started=True)
    assert (error.code, error.retryable) == (code, retryable)


def test_a_time_limit_is_named_and_so_is_that_the_request_only_waited() -> None:
    assert stop_error("timeout", limit_s=12.345, started=True).message == "the limit of 12.3 s for this request passed"
    waited = stop_error("timeout", limit_s=60.0, started=False).message
    assert waited == "the limit of 60 s for this request passed while it waited for a slot"


def test_how_often_a_request_was_lost_is_told() -> None:
    error = lost_too_often(3)
    assert error.code == "engine_lost"
    assert "3 times" in error.message
