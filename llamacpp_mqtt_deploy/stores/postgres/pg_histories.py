"""The sessions' rows in PostgreSQL: histories and when they were used, as statements inside a transaction."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.ports import HistoryChange
from llamacpp_mqtt_deploy.stores.bounds import first_level_of, messages_to_forget
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection

SessionKey = tuple[str, str]


def messages(db: BoundedConnection, session: SessionKey) -> tuple[Message, ...]:
    rows = db.execute(
        "SELECT message FROM messages "
        "WHERE session_id = (SELECT id FROM sessions WHERE route = %s AND session = %s) ORDER BY id",
        session,
    ).fetchall()
    return tuple(orjson.loads(row[0]) for row in rows)


def change(
    db: BoundedConnection,
    history: HistoryChange,
    appended: Sequence[tuple[str, bytes]],
    *,
    now: float,
    max_bytes: int,
) -> None:
    """Append the messages, forget older ones where that was asked for or they outgrow `max_bytes`."""
    route, session = history.session
    added = sum(len(message) for _, message in appended)
    row = db.execute(
        "INSERT INTO sessions AS known (route, session, first_level, created, last_used, bytes) "
        "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (route, session) DO UPDATE SET "
        "last_used = greatest(known.last_used, excluded.last_used), "
        "bytes = CASE WHEN %s THEN 0 ELSE known.bytes END + excluded.bytes RETURNING id, bytes",
        (route, session, first_level_of(session), now, now, added, history.forget_before),
    ).fetchone()
    assert row is not None
    session_id, size = row
    if history.forget_before:
        db.execute("DELETE FROM messages WHERE session_id = %s", (session_id,))
    if appended:
        db.execute(
            "INSERT INTO messages (session_id, role, message) SELECT %s, role, message "
            "FROM unnest(%s::text[], %s::bytea[]) WITH ORDINALITY AS given (role, message, place) ORDER BY place",
            (session_id, [role for role, _ in appended], [message for _, message in appended]),
        )
    if size > max_bytes:
        _trim(db, session_id, max_bytes)


def forget(db: BoundedConnection, session: SessionKey) -> None:
    """Forget the messages; the session stays."""
    db.execute(
        "WITH known AS (UPDATE sessions SET bytes = 0 WHERE route = %s AND session = %s RETURNING id) "
        "DELETE FROM messages USING known WHERE session_id = known.id",
        session,
    )


def drop(db: BoundedConnection, session: SessionKey) -> None:
    """Forget the session altogether."""
    db.execute(
        "WITH known AS (DELETE FROM sessions WHERE route = %s AND session = %s RETURNING id) "
        "DELETE FROM messages USING known WHERE session_id = known.id",
        session,
    )


def _trim(db: BoundedConnection, session_id: int, max_bytes: int) -> None:
    """Drop the oldest exchanges of a history over its bound."""
    rows = db.execute(
        "SELECT id, role, length(message) FROM messages WHERE session_id = %s ORDER BY id", (session_id,)
    ).fetchall()
    cut = messages_to_forget([(role, size) for _, role, size in rows], max_bytes)
    if cut:
        db.execute("DELETE FROM messages WHERE session_id = %s AND id <= %s", (session_id, rows[cut - 1][0]))
        db.execute(
            "UPDATE sessions SET bytes = bytes - %s WHERE id = %s", (sum(row[2] for row in rows[:cut]), session_id)
        )
