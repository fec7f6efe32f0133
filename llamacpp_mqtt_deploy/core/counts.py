"""Numbers that an engine tells, checked like everything else that comes from outside: counts of tokens and speeds."""

from __future__ import annotations

from dataclasses import replace

from llamacpp_mqtt_deploy.core.deltas import Finished

MAX_COUNT = 2**31 - 1
"""No prompt and no answer has more tokens, and sums of such counts over years still fit JSON's 64 bits."""
MAX_RATE = 1e9
"""Tokens in a second, beyond any machine."""


def count(value: object) -> int | None:
    """The value where it can be a count; None for text, NaN, negative and absurd ones: as if the engine had said nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_COUNT:
        return None
    return int(value)


def rate(value: object) -> float | None:
    """The value where it can be a speed."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_RATE:
        return None
    return float(value)


def checked_end(finished: Finished) -> Finished:
    """The end of a generation with numbers that can be passed on and added up; whoever made it."""
    usage, speed = finished.usage, finished.tokens_per_second
    prompt, completion, cached = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    told = replace(
        usage,
        prompt_tokens=count(prompt) or 0,
        completion_tokens=count(completion) or 0,
        cached_tokens=count(cached) or 0,
        reasoning_tokens=count(usage.reasoning_tokens),
    )
    return replace(finished, usage=told, tokens_per_second=None if speed is None else rate(speed))
