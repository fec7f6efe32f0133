"""How often histories may be asked for: one answer is 500 times as large as its question."""

from __future__ import annotations

import threading
import time

from llamacpp_mqtt_deploy.core.errors import Busy
from llamacpp_mqtt_deploy.core.rates import RateLimiter

# Of one first level, whose sessions are free to make: enough for whoever opens his chats, far too few to fill a network.
_PER_MINUTE = 60
_UNACKNOWLEDGED_PER_LEVEL = 4
_RETRY_S = 1.0

Session = tuple[str, str]


class HistoryReads:
    """Which histories are under way: at most one of a session is read, or published and not acknowledged by the broker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates = RateLimiter(_PER_MINUTE)
        self._under_way: dict[Session, str] = {}

    def begin(self, session: Session, first_level: str) -> None:
        """One more; `end` has to follow. Raises `Busy` or `RateLimited`."""
        with self._lock:
            if session in self._under_way:
                raise Busy("the history asked for before is still on its way to you", retry_after_s=_RETRY_S)
            if list(self._under_way.values()).count(first_level) >= _UNACKNOWLEDGED_PER_LEVEL:
                raise Busy(
                    f"{_UNACKNOWLEDGED_PER_LEVEL} histories of your sessions are still on their way",
                    retry_after_s=_RETRY_S,
                )
            self._rates.take(first_level, time.monotonic())
            self._under_way[session] = first_level

    def end(self, session: Session) -> None:
        """The broker has it, or nobody gets it. May be called from any thread."""
        with self._lock:
            self._under_way.pop(session, None)
