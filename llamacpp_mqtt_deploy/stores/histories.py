"""The sessions' rows: histories and when they were used, as statements inside a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import orjson

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.ports import HistoryChange
from llamacpp_mqtt_deploy.stores.bounds import first_level_of, messages_to_forget

SessionKey = tuple[str, str]


def encoded(history: HistoryChange) -> list[tuple[str, bytes]]:
    """Role and JSON of each message; raises TypeError for what JSON cannot hold."""
    return [(str(message.get("role", "")), orjson.dumps(message)) for message in history.append]


def messages(db: sqlite3.Connection, session: SessionKey) -> tuple[Message, ...]:
    rows = db.execute(
        "SELECT message FROM messages "
        "WHERE session_id = (SELECT id FROM sessions WHERE route = ? AND session = ?) ORDER BY id",
        session,
    ).fetchall()
    return tuple(orjson.loads(row[0]) for row in rows)


def change(
    db: sqlite3.Connection,
    history: HistoryChange,
    appended: Sequence[tuple[str, bytes]],
    *,
    now: float,
    max_bytes: int,
) -> None:
    """Append the messages, forget older ones where that was asked for or they outgrow `max_bytes`."""
    size = sum(len(text) for _, text in appended)
    found = db.execute("SELECT id, bytes FROM sessions WHERE route = ? AND session = ?", history.session).fetchone()
    if found is None:
        session_id = _begin(db, history.session, size, now)
    else:
        session_id, before = found
        if history.forget_before:
            db.execute("DELETE FROM messages WHERE session_id = ?", (session_id,))
        else:
            size += before
        db.execute("UPDATE sessions SET last_used = max(last_used, ?), bytes = ? WHERE id = ?", (now, size, session_id))
    db.executemany(
        "INSERT INTO messages (session_id, role, message) VALUES (?, ?, ?)",
        [(session_id, role, text) for role, text in appended],
    )
    if size > max_bytes:
        size -= _trim(db, session_id, max_bytes)
        db.execute("UPDATE sessions SET bytes = ? WHERE id = ?", (size, session_id))


def forget(db: sqlite3.Connection, session: SessionKey) -> None:
    """Forget the messages; the session stays."""
    _forget_messages(db, session)
    db.execute("UPDATE sessions SET bytes = 0 WHERE route = ? AND session = ?", session)


def drop(db: sqlite3.Connection, session: SessionKey) -> None:
    """Forget the session altogether."""
    _forget_messages(db, session)
    db.execute("DELETE FROM system_prompts WHERE route = ? AND session = ?", session)
    db.execute("DELETE FROM sessions WHERE route = ? AND session = ?", session)


def _begin(db: sqlite3.Connection, session: SessionKey, size: int, now: float) -> int:
    """A session that was not there; returns the number of its row."""
    made = db.execute(
        "INSERT INTO sessions (route, session, first_level, created, last_used, bytes) VALUES (?, ?, ?, ?, ?, ?)",
        (*session, first_level_of(session[1]), now, now, size),
    )
    assert made.lastrowid is not None
    return made.lastrowid


def _trim(db: sqlite3.Connection, session_id: int, max_bytes: int) -> int:
    """Drop the oldest exchanges of a history over its bound; returns their bytes."""
    rows = db.execute(
        "SELECT id, role, length(message) FROM messages WHERE session_id = ? ORDER BY id", (session_id,)
    ).fetchall()
    cut = messages_to_forget([(role, size) for _, role, size in rows], max_bytes)
    db.executemany("DELETE FROM messages WHERE id = ?", [(row[0],) for row in rows[:cut]])
    return sum(row[2] for row in rows[:cut])


def _forget_messages(db: sqlite3.Connection, session: SessionKey) -> None:
    db.execute(
        "DELETE FROM messages WHERE session_id = (SELECT id FROM sessions WHERE route = ? AND session = ?)", session
    )
