"""Counts what happened, for the health message, and later for a metrics page."""

from __future__ import annotations

import threading
from collections import Counter, deque


class Tally:
    """Counters since the start of the worker, and the speed of the latest answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._speeds: deque[float] = deque(maxlen=32)
        self._first_token_ms: deque[float] = deque(maxlen=32)

    def add(self, name: str, by: int = 1) -> None:
        with self._lock:
            self._counts[name] += by

    def ended(
        self, outcome: str, *, error: bool, tokens: int, tokens_per_second: float | None, first_token_ms: float | None
    ) -> None:
        """One request ended: `outcome` is its finish reason or its error code."""
        with self._lock:
            self._counts["requests"] += 1
            self._counts["completion_tokens"] += tokens
            if error:
                self._errors[outcome] += 1
            else:
                self._counts[outcome] += 1
            if tokens_per_second:
                self._speeds.append(tokens_per_second)
            if first_token_ms is not None:
                self._first_token_ms.append(first_token_ms)

    def refused(self, code: str) -> None:
        with self._lock:
            self._counts["requests"] += 1
            self._errors[code] += 1

    def snapshot(self) -> dict[str, object]:
        """The fields of the health message: totals, errors by code, means of the latest answers."""
        with self._lock:
            return {
                "requests": self._counts["requests"],
                "completion_tokens": self._counts["completion_tokens"],
                "cancelled": self._counts["cancelled"],
                "errors": dict(self._errors),
                "errors_total": sum(self._errors.values()),
                "tokens_per_second": _mean(self._speeds),
                "first_token_ms": _mean(self._first_token_ms),
                "ignored": self._counts["ignored"],
            }


def _mean(values: deque[float]) -> float:
    return round(sum(values) / len(values), 1) if values else 0.0
