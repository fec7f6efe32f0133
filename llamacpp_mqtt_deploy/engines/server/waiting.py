"""Waiting for an engine that cannot take a request yet: how long, how often, and what to say meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from llamacpp_mqtt_deploy.core.errors import EngineLost, EngineUnavailable
from llamacpp_mqtt_deploy.stopping import Stopped, StopSignal

T = TypeVar("T")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


class NotReady(Exception):
    """The engine cannot take the request yet; `reason` is what `on_wait` hears, the text is for the client."""

    def __init__(self, reason: str, text: str, *, asked: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.asked = asked
        """The connection broke after the request was sent."""


class ReadyWait:
    """When to stop trying: after `unavailable_after_s` without a server, never while it loads, and at the second request
    that ends without a word (the request itself may be what kills the server), at the first where it is sent `once`."""

    def __init__(self, unavailable_after_s: float, *, once: bool = False) -> None:
        self._most_unanswered = 1 if once else 2
        self._limit_s = unavailable_after_s
        self._since: float | None = None
        self._unanswered = 0

    def __call__(self, attempt: tenacity.RetryCallState) -> bool:
        failure = attempt.outcome.exception() if attempt.outcome else None
        if not isinstance(failure, NotReady):
            return False
        if failure.reason == "loading":
            self._since = None
            return False
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._unanswered += failure.asked
        return self._unanswered >= self._most_unanswered or now - self._since >= self._limit_s


def until_ready(attempt: Callable[[], T], wait: ReadyWait, stop: StopSignal, on_wait: Callable[[str], None]) -> T:
    """Try until it works, telling `on_wait` each new reason. Raises `Stopped`, or a leaf when the wait is over."""
    try:
        return attempt()  # as nearly always: what repeats costs more to set up than the attempt
    except NotReady as failure:
        return _again(attempt, failure, wait, stop, on_wait)


def _again(
    attempt: Callable[[], T], first: NotReady, wait: ReadyWait, stop: StopSignal, on_wait: Callable[[str], None]
) -> T:
    failures = [first]
    told: str | None = None

    def try_once() -> T:
        if failures:
            raise failures.pop()
        return attempt()

    def nap(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped(stop.reason)

    def tell(state: tenacity.RetryCallState) -> None:
        nonlocal told
        failure = state.outcome.exception() if state.outcome else None
        if isinstance(failure, NotReady) and failure.reason != told:
            told = failure.reason
            on_wait(failure.reason)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(NotReady),
        wait=tenacity.wait_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)
        + tenacity.wait_random(0, FIRST_PAUSE_S),
        stop=wait,
        sleep=nap,
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(try_once)
    except NotReady as failure:
        leaf = EngineLost if failure.asked else EngineUnavailable
        raise leaf(failure.text) from failure
