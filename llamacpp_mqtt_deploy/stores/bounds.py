"""What bounds both stores, so that a worker that runs for years keeps a state of constant size."""

from __future__ import annotations

from collections.abc import Sequence

MAX_HISTORY_BYTES = 4 * 1024 * 1024
"""Most JSON bytes of one session's history: about a million tokens, beyond any context that would still be read."""

KEEP_SHARE = 0.75
"""What remains of a history that grew over its bound; the rest is room, so that trimming is rare."""

PURGE_ROWS = 500
"""Most rows of a kind that one `purge` drops: it holds the store's lock, and requests wait for that (under 20 ms)."""

UNDELIVERED_S = 86400.0
"""Seconds for which a terminal event waits for a broker that never came back."""

CLOCK_SET_S = 1_577_836_800.0
"""2020-01-01. A board without a battery clock starts in 1970: a time before this one says that the clock was not set
yet, and what bears it must not look decades old the moment the clock is."""

CLOCK_SLACK_S = 3600.0
"""A time further ahead of now than this was written under a wrong clock, and is brought back to now."""


def first_level(session: str) -> str:
    """The level that a broker's access list binds to an identity."""
    return session.partition("/")[0]


def mended(moment: float, now: float) -> float:
    """The moment as the clock of now would have written it."""
    if moment > now + CLOCK_SLACK_S or moment < CLOCK_SET_S <= now:
        return now
    return moment


def messages_to_forget(sizes: Sequence[tuple[str, int]], max_bytes: int) -> int:
    """How many of the oldest messages, given as (role, bytes), a history over its bound loses.

    Cuts only before a user message, and never the last exchange: what remains is whole exchanges.
    """
    left = sum(size for _, size in sizes)
    if left <= max_bytes:
        return 0
    cut = 0
    for position, (role, size) in enumerate(sizes):
        if role == "user" and position:
            cut = position
            if left <= max_bytes * KEEP_SHARE:
                break
        left -= size
    return cut
