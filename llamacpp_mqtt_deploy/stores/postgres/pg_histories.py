"""The sessions' rows in PostgreSQL: histories and when they were used, as statements inside a transaction."""

from __future__ import annotations

import orjson

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection

SessionKey = tuple[str, str]


def messages(db: BoundedConnection, session: SessionKey) -> tuple[Message, ...]:
    rows = db.execute(
        "SELECT message FROM messages "
        "WHERE session_id = (SELECT id FROM sessions WHERE route = %s AND session = %s) ORDER BY id",
        session,
    ).fetchall()
    return tuple(orjson.loads(row[0]) for row in rows)


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
        "WITH prompt AS (DELETE FROM system_prompts WHERE route = %s AND session = %s), "
        "known AS (DELETE FROM sessions WHERE route = %s AND session = %s RETURNING id) "
        "DELETE FROM messages USING known WHERE session_id = known.id",
        (*session, *session),
    )
