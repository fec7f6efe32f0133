"""The times of what is remembered in PostgreSQL, after the clock was set or was wrong (see stores/journal_times.py)."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from llamacpp_mqtt_deploy.core.wallclock import CLOCK_SET_S, CLOCK_SLACK_S, PURGE_NOTED_EVERY_S, away_s
from llamacpp_mqtt_deploy.stores.bounds import MOVED_ROWS
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text

_TIMES = (
    # Both values are named so that the index is used: this runs with every purge.
    ("entries", "ended_at", "state = 'ended' AND delivered = ANY('{true,false}') AND"),
    ("sessions", "last_used", ""),
)


def set_forward(db: BoundedConnection, forward_s: float, now: float) -> None:
    """The clock was set forward: whatever was old then is as old now. What was written since has its right time.

    What waits is moved at once, there is not much of it; the rest by `mend_some`.
    """
    # What waits has waited no longer by that: its time limit is a span.
    db.execute(
        "UPDATE entries SET accepted_at = least(%(now)s, accepted_at + %(forward)s), "
        "expires_at = expires_at + least(%(now)s - accepted_at, %(forward)s) WHERE state <> 'ended' AND accepted_at < %(now)s",
        {"now": now, "forward": forward_s},
    )
    _begin_move(db, forward_s, now)
    _note_purge(db, now)


def mend_some(db: BoundedConnection, now: float) -> bool:
    """Change some of the times that have to be; True when all are right.

    Time in which no worker ran makes nothing older: whether it has passed, or was that of a wrong clock, nobody can tell.
    """
    row = db.execute("SELECT purged_at FROM last_purge").fetchone()
    if row is None or abs(now - row[0]) >= PURGE_NOTED_EVERY_S:
        if row is not None and (forward_s := away_s(row[0], now)):
            _begin_move(db, forward_s, now)
        _note_purge(db, now)
    return _move_some(db) and _mend_some(db, now)


def _begin_move(db: BoundedConnection, forward_s: float, now: float) -> None:
    db.execute(
        "INSERT INTO clock_moves (forward_s, up_to, entries_left, sessions_left) VALUES "
        "(%s, %s, (SELECT coalesce(max(id), 0) FROM entries), (SELECT coalesce(max(id), 0) FROM sessions))",
        (forward_s, now),
    )


def _note_purge(db: BoundedConnection, now: float) -> None:
    db.execute(
        "INSERT INTO last_purge (id, purged_at) VALUES (1, %s) ON CONFLICT (id) DO UPDATE SET purged_at = excluded.purged_at",
        (now,),
    )


def _move_some(db: BoundedConnection) -> bool:
    """Go on with the oldest move, from the newest row to the oldest."""
    move = db.execute(
        "SELECT id, forward_s, up_to, entries_left, sessions_left FROM clock_moves ORDER BY id LIMIT 1"
    ).fetchone()
    if move is None:
        return True
    move_id, forward_s, up_to, entries_left, sessions_left = move
    room = MOVED_ROWS
    for (table, column, _), left in zip(_TIMES, (entries_left, sessions_left), strict=True):
        found = db.execute(
            text(f"SELECT id FROM {table} WHERE id <= %s ORDER BY id DESC LIMIT %s"), (left, room + 1)
        ).fetchall()
        taken, more = found[:room], len(found) > room
        if taken:
            # What has not ended has no time here, and NULL is before nothing.
            db.execute(
                text(
                    f"UPDATE {table} SET {column} = least(%s, {column} + %s) WHERE id BETWEEN %s AND %s AND {column} < %s"
                ),
                (up_to, forward_s, taken[-1][0], taken[0][0], up_to),
            )
            db.execute(text(f"UPDATE clock_moves SET {table}_left = %s WHERE id = %s"), (taken[-1][0] - 1, move_id))
        if more:
            return False
        room -= len(taken)
    db.execute("DELETE FROM clock_moves WHERE id = %s", (move_id,))
    return db.execute("SELECT 1 FROM clock_moves LIMIT 1").fetchone() is None


def _mend_some(db: BoundedConnection, now: float) -> bool:
    """What bears a time that cannot be is as old as if it had been written now."""
    wrong = [(">", now + CLOCK_SLACK_S)] + ([("<", CLOCK_SET_S)] if now >= CLOCK_SET_S else [])
    for table, column, where in _TIMES:
        for sign, bound in wrong:
            some = f"SELECT id FROM {table} WHERE {where} {column} {sign} %s LIMIT %s"
            changed = db.execute(
                text(f"UPDATE {table} SET {column} = %s WHERE id IN ({some}) RETURNING id"), (now, bound, MOVED_ROWS)
            ).fetchall()
            if len(changed) >= MOVED_ROWS:
                return False
    return True
