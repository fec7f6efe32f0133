"""Spans between two times of a clock that may have been set in between: a board without a battery starts in 1970."""

from __future__ import annotations

CLOCK_SET_S = 1_577_836_800.0
"""2020-01-01. A time before this one says that the clock was not set yet, and what bears it must not look decades old the
moment the clock is."""

CLOCK_SLACK_S = 3600.0
"""A time further ahead of now than this was written under a wrong clock."""


def mended(moment: float, now: float) -> float:
    """The moment as the clock of now would have written it: now itself, where one of the two clocks was wrong."""
    if moment > now + CLOCK_SLACK_S or moment < CLOCK_SET_S <= now:
        return now
    return moment


def elapsed_s(since: float, now: float) -> float:
    """Seconds from then to now, as far as the two clocks can tell; never negative."""
    return max(0.0, now - mended(since, now))
