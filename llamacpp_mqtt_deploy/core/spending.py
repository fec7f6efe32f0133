"""What requests cost, and what a first topic level may spend in a day."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from llamacpp_mqtt_deploy.core.errors import RateLimited

DAY_S = 86400.0

REST = "*"
"""Stands in the ledger for the levels that found no row of their own; no level can be called so."""

# First levels are chosen by clients (bounded by the broker's users): how many of them have a count of their own in a day.
_COUNTED_LEVELS = 4096
# A clock that is set back and forth must not make a quota anew each time.
_COUNTED_DAYS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What one request has cost. `engine_s` is the time for which it held a slot of the engine, in seconds."""

    first_level: str
    tokens_in: int = 0
    tokens_out: int = 0
    engine_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """What a first level has spent in a day: requests that ended, their tokens, and seconds in the engine's slots."""

    day: int
    """Days since 1970-01-01, in UTC."""
    first_level: str
    requests: int
    tokens_in: int
    tokens_out: int
    engine_s: float

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


def day_of(now: float) -> int:
    """The day of a time in seconds since the epoch."""
    return int(now // DAY_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelLimits:
    """What first levels may use. `own_...` are those of single levels, 0 for no limit; all others have the common one."""

    tokens_per_day: int = 0
    own_tokens_per_day: Mapping[str, int] = field(default_factory=dict)
    own_requests_per_minute: Mapping[str, int] = field(default_factory=dict)

    @property
    def limit_tokens(self) -> bool:
        """Whether anybody's tokens are limited."""
        return self.tokens_per_day > 0 or any(most > 0 for most in self.own_tokens_per_day.values())

    def tokens_of(self, first_level: str) -> int:
        return self.own_tokens_per_day.get(first_level, self.tokens_per_day)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request may come to cost: a guess at its prompt's tokens, and the most that it may be answered."""

    tokens_in: int = 0
    tokens_out: int = 0


class Quotas:
    """Tokens of the day by first level: what was spent, and what is set aside for requests under way. Pure; the caller holds
    the lock and brings the time (seconds since the epoch).

    A request is taken as long as anything is left beside what is set aside. So a level comes past its quota by one request at
    most, and by what the guesses at prompts were wrong; and a client whose requests are short can use up all that it has.
    """

    def __init__(self, limits: LevelLimits | None = None) -> None:
        self.limits = limits or LevelLimits()
        self.context_tokens: int | None = None
        """No request can cost more than the engine's context; None while that is not known."""
        self._days: OrderedDict[int, dict[str, list[int]]] = OrderedDict()
        self._set_aside: dict[Hashable, tuple[str, int]] = {}
        self._aside_of_level: Counter[str] = Counter()

    def reconcile(self, rows: Iterable[LedgerRow]) -> None:
        """Take over what the ledger has beyond what was counted here: from an earlier life, or from other workers of a pool."""
        for row in rows:
            told = (row.requests, row.tokens_in, row.tokens_out)
            counted = self._counts(row.first_level, row.day)
            self._add(row.first_level, row.day, *(max(0, all_ - own) for all_, own in zip(told, counted, strict=True)))

    def check(self, first_level: str, now: float, *, retry_after_s: float) -> None:
        """Raises `RateLimited` when nothing is left today. `retry_after_s` is when requests under way are likely to have ended."""
        most = self.limits.tokens_of(first_level)
        if most <= 0:
            return
        if self.spent(first_level, now) >= most:
            left_s = max(1, round(DAY_S - now % DAY_S))
            raise RateLimited(
                f"the {most} tokens that you may use in a day are spent; there are more in {_span(left_s)}, when the day ends in UTC",
                retry_after_s=left_s,
            )
        if self.spent(first_level, now) + self._aside_of_level[first_level] >= most:
            raise RateLimited(
                f"your requests under way may take all that is left of the {most} tokens that you may use in a day; try again "
                f"when one has ended, in {retry_after_s:g} s",
                retry_after_s=retry_after_s,
            )

    def spent(self, first_level: str, now: float) -> int:
        """Tokens of this level on the day of `now`."""
        _, tokens_in, tokens_out = self._counts(first_level, day_of(now))
        return tokens_in + tokens_out

    def set_aside(self, key: Hashable, first_level: str, estimate: Estimate, now: float) -> None:
        """Keep tokens for this request until `release`. Its history is guessed at by what the level's requests took so far."""
        requests, tokens_in, _ = self._counts(first_level, day_of(now))
        prompt = max(estimate.tokens_in, tokens_in // max(1, requests))
        tokens = prompt + estimate.tokens_out
        if self.context_tokens is not None:
            tokens = min(tokens, self.context_tokens)
        self.release(key)
        if tokens:
            self._set_aside[key] = (first_level, tokens)
            self._aside_of_level[first_level] += tokens

    def release(self, key: Hashable) -> None:
        """The request is over."""
        kept = self._set_aside.pop(key, None)
        if kept is not None:
            first_level, tokens = kept
            self._aside_of_level[first_level] -= tokens
            if not self._aside_of_level[first_level]:  # Clients choose the levels: no more of them than requests.
                del self._aside_of_level[first_level]

    def spend(self, spent: Spent, now: float) -> None:
        """A request has ended with these costs."""
        self._add(spent.first_level, day_of(now), 1, spent.tokens_in, spent.tokens_out)

    def _counts(self, first_level: str, day: int) -> list[int]:
        levels = self._days.get(day, {})
        full = len(levels) >= _COUNTED_LEVELS
        return levels.get(first_level) or (levels.get(REST) if full else None) or [0, 0, 0]

    def _add(self, first_level: str, day: int, requests: int, tokens_in: int, tokens_out: int) -> None:
        levels = self._days.setdefault(day, {})
        self._days.move_to_end(day)
        if len(self._days) > _COUNTED_DAYS:
            self._days.popitem(last=False)
        if first_level not in levels and len(levels) >= _COUNTED_LEVELS:
            first_level = REST
        counts = levels.setdefault(first_level, [0, 0, 0])
        for place, more in enumerate((requests, tokens_in, tokens_out)):
            counts[place] += more


def _span(seconds: int) -> str:
    minutes = -(-seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
