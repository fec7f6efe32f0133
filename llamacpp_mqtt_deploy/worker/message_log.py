"""Log lines that any client can bring about with a message: a few of each kind, then how many were left out."""

from __future__ import annotations

import threading
import time
from typing import Any

import structlog

from llamacpp_mqtt_deploy.core.line_limit import LineLimit

log = structlog.get_logger(__name__)

TELL_EVERY_S = 5.0


class MessageLog:
    """Writes lines about messages of a first topic level; may be used from any thread. `tell` has to be called now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limit = LineLimit()

    def info(self, event: str, first_level: str, **fields: Any) -> None:
        if self._allows(event, first_level):
            log.info(event, **fields)

    def warning(self, event: str, first_level: str, **fields: Any) -> None:
        if self._allows(event, first_level):
            log.warning(event, **fields)

    def _allows(self, event: str, first_level: str) -> bool:
        with self._lock:
            return self._limit.allow(event, first_level, time.monotonic())

    def tell(self, now: float | None = None) -> None:
        """Say what was left out in floods that are over."""
        with self._lock:
            suppressed = self._limit.over(time.monotonic() if now is None else now)
        for each in suppressed:
            log.warning(
                "log.suppressed",
                kind=each.kind,
                first_level=each.first_level,
                lines=each.lines,
                message=f"{each.lines} more suppressed",
            )
