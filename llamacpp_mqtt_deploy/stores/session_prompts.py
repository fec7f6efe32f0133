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


def newest(db: sqlite3.Connection) -> int:
    """The highest number of a session."""
    return int(db.execute("SELECT coalesce(max(id), 0) FROM sessions").fetchone()[0])


def numbered(db: sqlite3.Connection, route: str, *, up_to: int, most: int) -> tuple[tuple[int, str], ...]:
    """Sessions of the route, the newest first: a number that is free again is above those that are asked for next."""
    rows = db.execute(
        "SELECT id, session FROM sessions WHERE route = ? AND id <= ? ORDER BY id DESC LIMIT ?", (route, up_to, most)
    )
    return tuple((row[0], row[1]) for row in rows)
