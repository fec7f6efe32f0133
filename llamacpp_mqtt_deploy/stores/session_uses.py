"""When sessions were used: read from the journal now and then, not written with each request.

Only a purge asks for it, an end that changes a history writes it anyway, and the session's own row and its place in an index
would be two of six pages that a request waits for.
"""

from __future__ import annotations

import sqlite3

_REQUESTS_AT_ONCE = 2000
"""So many are read in one transaction: a few milliseconds."""


class SessionUses:
    """Carries the times at which requests were accepted over to their sessions. For the thread that writes."""

    def __init__(self, db: sqlite3.Connection) -> None:
        # A life that was killed has not noted what it left unfinished.
        oldest, newest = db.execute(
            "SELECT (SELECT min(id) FROM entries INDEXED BY entries_unfinished WHERE state <> 'ended'), "
            "(SELECT coalesce(max(id), 0) FROM entries)"
        ).fetchone()
        self._noted: int = newest if oldest is None else oldest - 1

    def note(self, db: sqlite3.Connection) -> int:
        """Some of what is not noted yet, before requests are dropped or times are changed; returns how far it came."""
        accepted = db.execute(
            "SELECT id, route, session, accepted_at FROM entries WHERE id > ? ORDER BY id LIMIT ?",
            (self._noted, _REQUESTS_AT_ONCE),
        ).fetchall()
        latest: dict[tuple[str, str], float] = {}
        for _, route, session, at in accepted:
            latest[route, session] = max(at, latest.get((route, session), at))
        db.executemany(
            "UPDATE sessions SET last_used = ?1 WHERE route = ?2 AND session = ?3 AND last_used < ?1",
            [(at, *session) for session, at in latest.items()],
        )
        return int(accepted[-1][0]) if accepted else self._noted

    def noted(self, place: int) -> bool:
        """It is written up to there; whether it was all."""
        all_of_it = place - self._noted < _REQUESTS_AT_ONCE
        self._noted = max(self._noted, place)
        return all_of_it
