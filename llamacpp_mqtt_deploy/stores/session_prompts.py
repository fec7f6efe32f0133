"""The rows of sessions' own system prompts, as statements inside a transaction."""

from __future__ import annotations

import sqlite3

from llamacpp_mqtt_deploy.stores.bounds import first_level_of

SessionKey = tuple[str, str]


def read(db: sqlite3.Connection, session: SessionKey) -> str | None:
    row = db.execute("SELECT prompt FROM system_prompts WHERE route = ? AND session = ?", session).fetchone()
    return None if row is None else str(row[0])


def write(db: sqlite3.Connection, session: SessionKey, prompt: str | None, *, now: float) -> None:
    """Keep it with its session, which is used by that; None takes it away."""
    route, name = session
    if prompt is None:
        db.execute("DELETE FROM system_prompts WHERE route = ? AND session = ?", session)
        return
    # A session that holds a prompt has its row, so that it is forgotten with all others when its time has passed.
    db.execute(
        "INSERT INTO sessions (route, session, first_level, created, last_used, bytes) VALUES (?, ?, ?, ?, ?, 0) "
        "ON CONFLICT (route, session) DO UPDATE SET last_used = max(last_used, excluded.last_used)",
        (route, name, first_level_of(name), now, now),
    )
    db.execute("INSERT OR REPLACE INTO system_prompts (route, session, prompt) VALUES (?, ?, ?)", (*session, prompt))


def names(db: sqlite3.Connection, route: str, *, after: str, created_by: float, most: int) -> tuple[str, ...]:
    """Sessions of the route in the order of their names."""
    rows = db.execute(
        "SELECT session FROM sessions WHERE route = ? AND session > ? AND created <= ? ORDER BY session LIMIT ?",
        (route, after, created_by, most),
    )
    return tuple(row[0] for row in rows)
