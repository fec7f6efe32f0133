"""Counts requests, errors and tokens since the start, for the health message."""

from __future__ import annotations

import threading
import time
from collections import Counter

from llamacpp_mqtt_deploy.core.deltas import TokenUsage


class Counters:
    """Counters since the start of the worker; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._told_tokens = 0
        self._starved, self._starved_at = 0, 0.0

    def accepted(self, requests: int) -> None:
        """So many requests are in the journal."""
        with self._lock:
            self._counts["accepted"] += requests

    def ended(self, outcome: str, *, error: bool, usage: TokenUsage) -> None:
        """One accepted request ended: `outcome` is its finish reason or its error code."""
        with self._lock:
            self._counts["failed" if error else "done"] += 1
            self._counts["cancelled"] += outcome == "cancelled"
            self._counts["prompt"] += usage.prompt_tokens
            self._counts["cached"] += usage.cached_tokens
            self._counts["completion"] += usage.completion_tokens
            if error:
                self._errors[outcome] += 1

    def refused(self, code: str) -> None:
        """One request was refused with this code before it was accepted."""
        with self._lock:
            self._errors[code] += 1

    def starved(self) -> None:
        """The worker's own memory was not enough for one request."""
        with self._lock:
            self._starved, self._starved_at = self._starved + 1, time.monotonic()

    def starved_within(self, seconds: float) -> int:
        """How many requests that has happened to since the start; 0 when the last one was longer ago."""
        with self._lock:
            return self._starved if time.monotonic() - self._starved_at <= seconds else 0

    def snapshot(self, *, period_s: float) -> dict[str, object]:
        """The counting part of the health message; `tokens_per_second` is over the last `period_s` seconds."""
        with self._lock:
            counts = self._counts
            tokens, self._told_tokens = counts["completion"] - self._told_tokens, counts["completion"]
            return {
                "tokens_per_second": round(tokens / max(period_s, 0.001), 2),
                "requests": {name: counts[name] for name in ("accepted", "done", "cancelled", "failed")},
                "errors": dict(self._errors),
                "tokens": {name: counts[name] for name in ("prompt", "cached", "completion")},
            }
