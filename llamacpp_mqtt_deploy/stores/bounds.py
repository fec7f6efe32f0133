"""What bounds the store, so that a worker that runs for years keeps a state of constant size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_HISTORY_BYTES = 4 * 1024 * 1024
"""Most JSON bytes of one session's history: about a million tokens, beyond any context that would still be read."""

KEEP_SHARE = 0.75
"""What remains of a history that grew over its bound; the rest is room, so that trimming is rare."""

PURGE_ROWS = 500
"""Most rows of a kind that one `purge` drops: one transaction, and requests wait for it (under 20 ms)."""

PURGE_BYTES = 4 * 1024 * 1024
"""Most bytes of a kind that one `purge` drops, for the same reason."""

MOVED_ROWS = 2000
"""Most rows whose times one `purge` changes after the clock was set, for the same reason."""

MAX_JOURNAL_BYTES = 64 * 1024 * 1024
"""Most bytes of ended requests, where the configuration says nothing else."""

LEVEL_SHARE = 0.5
"""What one first level may hold of that: a second client finds room however busy the first one is."""

ROW_BYTES = 512
"""What an ended request takes beside its terminal event: topics, keys and indexes."""

UNDELIVERED_S = 86400.0
"""Seconds for which a terminal event waits for a broker that never came back."""

LEDGER_DAYS = 62
"""Days of the ledger that are kept, counted by those on which there were requests."""

LEDGER_LEVELS = 500
"""First levels of a day with a row of their own: about 3 MB for all days. The others share one."""


class Portion:
    """How much of a kind one transaction has done, up to what it may."""

    def __init__(self, most: int = PURGE_ROWS) -> None:
        self.rows = 0
        self._most = most
        self._bytes = 0
        self.full = False

    def takes(self, size: int) -> bool:
        """Count one more row; False when it has to wait for the next transaction."""
        self.full = self.full or self.rows >= self._most or (self.rows > 0 and self._bytes + size > PURGE_BYTES)
        if not self.full:
            self.rows += 1
            self._bytes += size
        return not self.full


def days_to_forget(days: Sequence[int], today: int, *, most: int = LEDGER_DAYS) -> list[int]:
    """Of the ledger's days, the oldest first, those beyond so many: the oldest ones, whatever their age.

    A day after tomorrow was written under a clock that was ahead, if it is not the clock of now that is behind; where most days are
    not ahead, it was. Such a day goes first.
    """
    kept, gone = list(days), []
    while len(kept) > most:
        ahead = sum(day > today + 1 for day in kept)
        gone.append(kept.pop(-1 if 0 < 2 * ahead < len(kept) else 0))
    return gone


def first_level_of(session: str) -> str:
    """The level that a broker's access list binds to an identity."""
    return session.partition("/")[0]


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


def excess(held: Mapping[tuple[str, bool], int], max_bytes: int) -> list[tuple[str, bool, int]]:
    """What has to go of ended requests, given as bytes by (first level, delivered): (first level, delivered, bytes).

    First what a first level holds beyond its share, then what all hold beyond the bound, of whoever holds most. What the broker
    has taken goes before what no broker has taken.
    """
    left = dict(held)
    total: dict[str, int] = {}
    for (first_level, _), size in held.items():
        total[first_level] = total.get(first_level, 0) + size
    over = sum(total.values()) - max_bytes
    found: list[tuple[str, bool, int]] = []

    def take(first_level: str, *, delivered: bool, most: int) -> int:
        taken = max(0, min(most, left.get((first_level, delivered), 0)))
        if taken:
            left[first_level, delivered] -= taken
            total[first_level] -= taken
            found.append((first_level, delivered, taken))
        return taken

    for first_level in list(total):
        for delivered in (True, False):
            over -= take(first_level, delivered=delivered, most=int(total[first_level] - max_bytes * LEVEL_SHARE))
    for delivered in (True, False):
        for first_level in sorted(total, key=lambda each: total[each], reverse=True):
            over -= take(first_level, delivered=delivered, most=over)
    return found
