"""The times of what is remembered, after the clock was set or was wrong, as statements inside a transaction.

They are changed some rows at a time, so that what others write has its turn in between. How far a move has come stands in the
database, written with the rows that it has moved: whatever interrupts it, nothing is moved twice.
"""

# ruff: noqa: S608  every statement is joined from constants of this file; values are bound
from __future__ import annotations

import sqlite3

from llamacpp_mqtt_deploy.core.wallclock import CLOCK_SET_S, CLOCK_SLACK_S, PURGE_NOTED_EVERY_S, away_s
from llamacpp_mqtt_deploy.stores.bounds import MOVED_ROWS, Portion

# Both values are named so that the index is used: this runs with every purge.
_ENDED = "state = 'ended' AND delivered IN (0, 1) AND"


def set_forward(db: sqlite3.Connection, forward_s: float, now: float) -> None:
    """The clock was set forward: whatever was old then is as old now. What was written since has its right time.

    What waits is moved at once, there is not much of it; the rest by `mend_some`.
    """
    # What waits has waited no longer by that: its time limit is a span.
    db.execute(
        "UPDATE entries SET accepted_at = min(:now, accepted_at + :forward), "
        "expires_at = expires_at + min(:now - accepted_at, :forward) WHERE state <> 'ended' AND accepted_at < :now",
        {"now": now, "forward": forward_s},
    )
    _begin_move(db, forward_s, now)
    _note_purge(db, now)


def mend_some(db: sqlite3.Connection, now: float) -> bool:
    """Change some of the times that have to be; True when all are right.

    Time in which no worker ran makes nothing older: whether it has passed, or was that of a wrong clock, nobody can tell.
    """
    row = db.execute("SELECT purged_at FROM last_purge").fetchone()
    if row is None or abs(now - row[0]) >= PURGE_NOTED_EVERY_S:
        if row is not None and (forward_s := away_s(row[0], now)):
            _begin_move(db, forward_s, now)
        _note_purge(db, now)
    return _move_some(db) and _mend_some(db, now)


def _begin_move(db: sqlite3.Connection, forward_s: float, now: float) -> None:
    db.execute(
        "INSERT INTO clock_moves (forward_s, up_to, entries_left, sessions_left) VALUES "
        "(?, ?, (SELECT coalesce(max(id), 0) FROM entries), (SELECT coalesce(max(id), 0) FROM sessions))",
        (forward_s, now),
    )


def _note_purge(db: sqlite3.Connection, now: float) -> None:
    db.execute("INSERT OR REPLACE INTO last_purge (id, purged_at) VALUES (1, ?)", (now,))


def _move_some(db: sqlite3.Connection) -> bool:
    """Go on with the oldest move, from the newest row to the oldest."""
    move = db.execute(
        "SELECT id, forward_s, up_to, entries_left, sessions_left FROM clock_moves ORDER BY id LIMIT 1"
    ).fetchone()
    if move is None:
        return True
    move_id, forward_s, up_to, entries_left, sessions_left = move
    portion = Portion(MOVED_ROWS)
    for table, column, size, left in (
        ("entries", "ended_at", "bytes", entries_left),
        ("sessions", "last_used", "0", sessions_left),
    ):
        rows = db.execute(
            f"SELECT id, {size} FROM {table} WHERE id <= ? ORDER BY id DESC LIMIT ?", (left, MOVED_ROWS + 1)
        ).fetchall()
        taken = [row_id for row_id, bytes_ in rows if portion.takes(bytes_)]
        if taken:
            # What has not ended has no time here, and NULL is before nothing.
            db.execute(
                f"UPDATE {table} SET {column} = min(?, {column} + ?) WHERE id BETWEEN ? AND ? AND {column} < ?",
                (up_to, forward_s, taken[-1], taken[0], up_to),
            )
            db.execute(f"UPDATE clock_moves SET {table}_left = ? WHERE id = ?", (taken[-1] - 1, move_id))
        if portion.full:
            return False
    db.execute("DELETE FROM clock_moves WHERE id = ?", (move_id,))
    return db.execute("SELECT 1 FROM clock_moves LIMIT 1").fetchone() is None


def _mend_some(db: sqlite3.Connection, now: float) -> bool:
    """What bears a time that cannot be is as old as if it had been written now."""
    portion = Portion(MOVED_ROWS)
    for table, column, size, where in (("entries", "ended_at", "bytes", _ENDED), ("sessions", "last_used", "0", "")):
        for wrong, bound, known in (
            (">", now + CLOCK_SLACK_S, True),
            ("<", CLOCK_SET_S, now >= CLOCK_SET_S),
        ):
            if not known:
                continue
            rows = db.execute(
                f"SELECT id, {size} FROM {table} WHERE {where} {column} {wrong} ? LIMIT ?", (bound, MOVED_ROWS + 1)
            ).fetchall()
            taken = [(now, row_id) for row_id, bytes_ in rows if portion.takes(bytes_)]
            db.executemany(f"UPDATE {table} SET {column} = ? WHERE id = ?", taken)
            if portion.full:
                return False
    return True
