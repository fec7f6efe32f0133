"""An engine's numbers are passed on as they are where they can be true, and left out where they cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.counts import MAX_COUNT, MAX_RATE, checked_end, count, rate
from llamacpp_mqtt_deploy.core.deltas import Finished, TokenUsage


def test_numbers_that_can_be_true_are_passed_on_as_they_are() -> None:
    usage = TokenUsage(prompt_tokens=3, completion_tokens=5, cached_tokens=2, reasoning_tokens=1)
    told = Finished("stop", usage, tokens_per_second=12.5, stop_sequence="END")
    assert checked_end(told) == told
    most = Finished("length", TokenUsage(prompt_tokens=MAX_COUNT), tokens_per_second=MAX_RATE)
    assert checked_end(most) == most


def test_the_least_and_the_largest_numbers_that_can_be_true() -> None:
    assert (count(0), count(2**31 - 1), count(2**31), count(7.0)) == (0, 2**31 - 1, None, 7)
    assert (rate(0), rate(0.001), rate(1e9), rate(1e9 + 1), rate(7)) == (None, 0.001, 1e9, None, 7.0)
    assert [count(value) for value in (True, "7", None)] == [None] * 3
    assert [rate(value) for value in (True, "7", None)] == [None] * 3


@pytest.mark.parametrize("number", [-1, True, "7", None, math.nan, math.inf, MAX_COUNT + 1])
def test_a_count_that_cannot_be_true_counts_as_nothing(number: Any) -> None:
    told = Finished(
        "stop",
        TokenUsage(prompt_tokens=number, completion_tokens=number, cached_tokens=number, reasoning_tokens=number),
    )
    usage = checked_end(told).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (0, 0, 0)
    assert usage.reasoning_tokens is None


@pytest.mark.parametrize("number", [0.0, -1.0, True, "7", math.nan, math.inf, MAX_RATE * 2])
def test_a_speed_that_cannot_be_true_is_left_out(number: Any) -> None:
    assert checked_end(Finished("stop", TokenUsage(), tokens_per_second=number)).tokens_per_second is None


def test_no_reasoning_tokens_are_told_where_the_engine_counts_none() -> None:
    assert checked_end(Finished("stop", TokenUsage())).usage.reasoning_tokens is None
