"""Counts requests, errors, tokens and times since the start, for the health message and the metrics."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.deltas import TokenUsage
from llamacpp_mqtt_deploy.core.histogram import REQUEST_BOUNDS_S, Histogram, HistogramReading
from llamacpp_mqtt_deploy.core.turns import LANES


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """All counts since the start at one moment."""

    accepted: int
    ended: Mapping[tuple[str, str], int]
    """By lane and outcome: the finish reason, or `error`."""
    failed: Mapping[str, int]
    """Accepted requests that ended with an error, by its code."""
    refused: Mapping[str, int]
    """Requests that were not accepted, by the code that they got."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token: Mapping[str, HistogramReading]
    """By lane, in seconds since the request arrived."""
    total: Mapping[str, HistogramReading]


class Counters:
    """Counters since the start of the worker; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._ended: Counter[tuple[str, str]] = Counter()
        self._failed: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._first_token = {lane: Histogram(REQUEST_BOUNDS_S) for lane in LANES}
        self._total = {lane: Histogram(REQUEST_BOUNDS_S) for lane in LANES}
        self._told_tokens = 0
        self._lately: deque[float] = deque(maxlen=1000)  # seconds to the first token, since the last snapshot
        self._first_token_ms: float | None = None
        self._starved, self._starved_at = 0, 0.0

    def accepted(self, requests: int) -> None:
        """So many requests are in the journal."""
        with self._lock:
            self._counts["accepted"] += requests

    def ended(
        self, outcome: str, *, error: bool, usage: TokenUsage, lane: str, total_s: float, first_token_s: float | None
    ) -> None:
        """One accepted request ended: `outcome` is its finish reason or its error code; the times are since it arrived."""
        with self._lock:
            self._ended[lane, "error" if error else outcome] += 1
            self._counts["failed" if error else "done"] += 1
            self._counts["cancelled"] += outcome == "cancelled"
            self._counts["prompt"] += usage.prompt_tokens
            self._counts["cached"] += usage.cached_tokens
            self._counts["completion"] += usage.completion_tokens
            if error:
                self._failed[outcome] += 1
            self._total[lane].observe(total_s)
            if first_token_s is not None:
                self._first_token[lane].observe(first_token_s)
                self._lately.append(first_token_s)

    def refused(self, code: str) -> None:
        """One request was refused with this code before it was accepted."""
        with self._lock:
            self._refused[code] += 1

    def starved(self) -> None:
        """The worker's own memory was not enough for one request."""
        with self._lock:
            self._starved, self._starved_at = self._starved + 1, time.monotonic()

    def starved_within(self, seconds: float) -> int:
        """How many requests that has happened to since the start; 0 when the last one was longer ago."""
        with self._lock:
            return self._starved if time.monotonic() - self._starved_at <= seconds else 0

    def tally(self) -> Tally:
        """Everything that was counted; changes nothing."""
        with self._lock:
            return Tally(
                accepted=self._counts["accepted"],
                ended=dict(self._ended),
                failed=dict(self._failed),
                refused=dict(self._refused),
                prompt_tokens=self._counts["prompt"],
                cached_tokens=self._counts["cached"],
                completion_tokens=self._counts["completion"],
                first_token={lane: histogram.read() for lane, histogram in self._first_token.items()},
                total={lane: histogram.read() for lane, histogram in self._total.items()},
            )

    def snapshot(self, *, period_s: float) -> dict[str, object]:
        """The counting part of the health message; `tokens_per_second` is over the last `period_s` seconds."""
        with self._lock:
            counts = self._counts
            if self._lately:
                self._first_token_ms = round(1000 * sum(self._lately) / len(self._lately), 1)
                self._lately.clear()
            tokens, self._told_tokens = counts["completion"] - self._told_tokens, counts["completion"]
            return {
                "tokens_per_second": round(tokens / max(period_s, 0.001), 2),
                "first_token_ms": self._first_token_ms,
                "requests": {name: counts[name] for name in ("accepted", "done", "cancelled", "failed")},
                "errors": dict(self._failed + self._refused),
                "tokens": {name: counts[name] for name in ("prompt", "cached", "completion")},
            }
