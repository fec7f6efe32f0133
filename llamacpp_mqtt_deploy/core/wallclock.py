"""Spans between two times of a clock that may have been set in between: a board without a battery starts in 1970."""

from __future__ import annotations

CLOCK_SET_S = 1_577_836_800.0
"""2020-01-01. A time before this one says that the clock was not set yet, and what bears it must not look decades old the
moment the clock is."""

CLOCK_SLACK_S = 3600.0
"""A time further ahead of now than this was written under a wrong clock."""

AWAY_S = 86400.0
"""Where the last purge is longer ago than that, no worker ran in between, or one of the two ran under a wrong clock."""

PURGE_NOTED_EVERY_S = 3600.0
"""Not every one: an idle worker would write to its disk every few seconds."""


def away_s(purged_at: float, now: float) -> float:
    """Seconds since the last purge in which nothing has become older."""
    return now - purged_at if now - purged_at > AWAY_S else 0.0


def mended(moment: float, now: float) -> float:
    """The moment as the clock of now would have written it: now itself, where one of the two clocks was wrong."""
    if moment > now + CLOCK_SLACK_S or moment < CLOCK_SET_S <= now:
        return now
    return moment


def elapsed_s(since: float, now: float) -> float:
    """Seconds from then to now, as far as the two clocks can tell; never negative."""
    return max(0.0, now - mended(since, now))
