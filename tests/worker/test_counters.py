"""What the health message counts."""

from __future__ import annotations

import time

import pytest

from llamacpp_mqtt_deploy.core.deltas import TokenUsage
from llamacpp_mqtt_deploy.worker.counters import Counters


def test_each_request_is_counted_once_by_how_it_ended() -> None:
    counters = Counters()
    counters.accepted(1)
    counters.accepted(3)
    usage = TokenUsage(prompt_tokens=10, completion_tokens=7, cached_tokens=4)
    counters.ended("stop", error=False, usage=usage)
    counters.ended("cancelled", error=False, usage=usage)
    counters.ended("timeout", error=True, usage=usage)
    counters.refused("busy")
    counters.refused("busy")
    told = counters.snapshot(period_s=1.0)
    assert told["requests"] == {"accepted": 4, "done": 2, "cancelled": 1, "failed": 1}
    assert told["errors"] == {"timeout": 1, "busy": 2}
    assert told["tokens"] == {"prompt": 30, "cached": 12, "completion": 21}


def test_tokens_per_second_are_those_since_the_last_look() -> None:
    counters = Counters()
    counters.ended("stop", error=False, usage=TokenUsage(prompt_tokens=0, completion_tokens=10))
    assert counters.snapshot(period_s=3.0)["tokens_per_second"] == 3.33
    assert counters.snapshot(period_s=3.0)["tokens_per_second"] == 0.0
    counters.ended("stop", error=False, usage=TokenUsage(prompt_tokens=0, completion_tokens=4))
    assert counters.snapshot(period_s=0.0)["tokens_per_second"] == 4000.0  # no time at all is taken for a millisecond


def test_a_want_of_memory_is_told_as_long_as_it_is_of_interest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    counters = Counters()
    assert counters.starved_within(60.0) == 0
    for _ in range(2):
        counters.starved()
    now[0] += 60.0
    assert counters.starved_within(60.0) == 2
    now[0] += 0.1
    assert counters.starved_within(60.0) == 0
    counters.starved()
    assert counters.starved_within(60.0) == 3
