"""How many requests and controls a first topic level may send in a minute."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from llamacpp_mqtt_deploy.core.errors import RateLimited

# First levels are chosen by clients (bounded by the broker's users): how many of them are told apart.
_REMEMBERED_LEVELS = 4096


class RateLimiter:
    """A token bucket per first topic level: a minute's worth at once, then evenly; sessions are free to make, levels not.

    `own` has the numbers of levels that may send more or less than the others; 0 is no limit.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.own: Mapping[str, int] = {}
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, first_level: str, now: float, *, ahead: bool = False) -> None:
        """Raises `RateLimited` with the seconds until the next one is allowed; counts nothing.

        `ahead` lets a level use up to another minute's worth in advance: who has sent all the requests that he may must still
        be able to cancel each of them.
        """
        most = self._most(first_level)
        if most <= 0:
            return
        tokens = self._tokens(first_level, now) + (most if ahead else 0)
        if tokens < 1.0:
            wait_s = round((1.0 - tokens) * 60.0 / most, 1)
            raise RateLimited(
                f"more than {most} messages in a minute; the next one is taken in {wait_s:g} s",
                retry_after_s=max(0.1, wait_s),
            )

    def take(self, first_level: str, now: float, *, ahead: bool = False) -> None:
        """Count one message; raises as `check`."""
        self.check(first_level, now, ahead=ahead)
        if self._most(first_level) <= 0:
            return
        self._buckets[first_level] = (self._tokens(first_level, now) - 1.0, now)
        self._buckets.move_to_end(first_level)
        if len(self._buckets) > _REMEMBERED_LEVELS:
            self._buckets.popitem(last=False)

    def _most(self, first_level: str) -> int:
        return self.own.get(first_level, self.per_minute)

    def _tokens(self, first_level: str, now: float) -> float:
        full = float(self._most(first_level))
        tokens, at = self._buckets.get(first_level, (full, now))
        return min(full, tokens + (now - at) * full / 60.0)
