"""Waiting in tests: until something is so, with a deadline, without sleeping blindly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def eventually(predicate: Callable[[], object], timeout_s: float = 10.0, *, every_s: float = 0.01) -> None:
    """Return as soon as the predicate holds; fail the test when it does not within the time."""
    ends_at = time.monotonic() + timeout_s
    pause = threading.Event()
    while not predicate():
        assert time.monotonic() < ends_at, f"not so within {timeout_s:g} s: {predicate}"
        pause.wait(every_s)
