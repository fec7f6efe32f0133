"""What the health message counts."""

from __future__ import annotations

import time

import pytest

from llamacpp_mqtt_deploy.core.deltas import TokenUsage
from llamacpp_mqtt_deploy.worker.counters import Counters


def _stopped(counters: Counters, usage: TokenUsage) -> None:
    counters.ended("stop", error=False, usage=usage, lane="normal", total_s=1.0, first_token_s=0.1)


def test_each_request_is_counted_once_by_how_it_ended() -> None:
    counters = Counters()
    counters.accepted(1)
    counters.accepted(3)
    usage = TokenUsage(prompt_tokens=10, completion_tokens=7, cached_tokens=4)
    counters.ended("stop", error=False, usage=usage, lane="normal", total_s=2.0, first_token_s=0.2)
    counters.ended("cancelled", error=False, usage=usage, lane="batch", total_s=700.0, first_token_s=None)
    counters.ended("timeout", error=True, usage=usage, lane="normal", total_s=0.005, first_token_s=None)
    counters.refused("busy")
    counters.refused("busy")
    told = counters.snapshot(period_s=1.0)
    assert told["requests"] == {"accepted": 4, "done": 2, "cancelled": 1, "failed": 1}
    assert told["errors"] == {"timeout": 1, "busy": 2}
    assert told["tokens"] == {"prompt": 30, "cached": 12, "completion": 21}
    tally = counters.tally()
    assert tally.ended == {("normal", "stop"): 1, ("batch", "cancelled"): 1, ("normal", "error"): 1}
    assert (tally.failed, tally.refused) == ({"timeout": 1}, {"busy": 2})
    assert {lane: reading.count for lane, reading in tally.total.items()} == {"interactive": 0, "normal": 2, "batch": 1}
    assert tally.total["batch"].cumulative[-2:] == (0, 1)  # longer than the last bound
    assert (tally.first_token["normal"].count, tally.first_token["normal"].sum) == (1, 0.2)
    assert counters.tally() == tally  # to look changes nothing


def test_an_error_that_was_a_refusal_and_an_end_is_told_once_with_its_sum() -> None:
    counters = Counters()
    counters.refused("timeout")
    counters.ended("timeout", error=True, usage=TokenUsage(), lane="normal", total_s=1.0, first_token_s=None)
    assert counters.snapshot(period_s=1.0)["errors"] == {"timeout": 2}


def test_tokens_per_second_are_those_since_the_last_look() -> None:
    counters = Counters()
    _stopped(counters, TokenUsage(prompt_tokens=0, completion_tokens=10))
    assert counters.snapshot(period_s=3.0)["tokens_per_second"] == 3.33
    assert counters.snapshot(period_s=3.0)["tokens_per_second"] == 0.0
    _stopped(counters, TokenUsage(prompt_tokens=0, completion_tokens=4))
    assert counters.snapshot(period_s=0.0)["tokens_per_second"] == 4000.0  # no time at all is taken for a millisecond


def test_the_first_token_is_that_of_the_answers_of_late_and_stays_known_while_there_are_none() -> None:
    counters = Counters()
    assert counters.snapshot(period_s=1.0)["first_token_ms"] is None
    for first_token_s in (0.1, 0.3, None):
        counters.ended("stop", error=False, usage=TokenUsage(), lane="normal", total_s=1.0, first_token_s=first_token_s)
    assert counters.snapshot(period_s=1.0)["first_token_ms"] == 200.0
    assert counters.snapshot(period_s=1.0)["first_token_ms"] == 200.0
    counters.ended("stop", error=False, usage=TokenUsage(), lane="batch", total_s=1.0, first_token_s=0.05)
    assert counters.snapshot(period_s=1.0)["first_token_ms"] == 50.0


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
