"""How much work something is, without the work of other threads and of the garbage collector, which a test's limit is not about."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls_of(work: Callable[[], object]) -> int:
    """How many functions `work` calls: the same number on any machine."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the processor that this thread spends on `work`."""
    collects = gc.isenabled()
    gc.disable()
    started = time.thread_time()
    try:
        work()
        return time.thread_time() - started
    finally:
        if collects:
            gc.enable()
