"""The journal's rows in PostgreSQL: requests that were accepted, as statements inside a transaction.

What a statement says is read by the function that each of these returns: so that many can be on their way at once.
"""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.bounds import first_level_of
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text

COLUMNS = (
    "route, session, request_id, topic, payload, digest, correlation, accepted_at, expires_at, state, starts, "
    "terminal, reply_topic, delivered, ended_at"
)
_SELECT = f"SELECT {COLUMNS} FROM entries LEFT JOIN payloads USING (id)"
_BY_KEY = "route = %s AND session = %s AND request_id = %s"


INSERTED = (
    "entry AS (INSERT INTO entries (id, route, session, request_id, topic, digest, correlation, accepted_at, "
    "expires_at, state, starts, terminal, reply_topic, delivered, ended_at, ended_order, first_level, bytes, fence) "
    "SELECT place, %s, %s, %s, %s, %s, %s, %s::float8, %s::float8, %s, %s, %s, %s, %s, %s::float8, "
    "CASE WHEN %s THEN place END, %s, %s, %s FROM (SELECT nextval('places') AS place) AS next "
    "ON CONFLICT (route, session, request_id) DO NOTHING RETURNING *), "
    "body AS (INSERT INTO payloads (id, payload) SELECT id, %s FROM entry) "
)
"""Parts of a statement that journal a request: no row in `entry` when it is there already."""


def insert(db: BoundedConnection, entry: Entry, fence: int | None = None) -> None:
    """Journal a request; nothing when it is there and unfinished. Of a session that has one nothing is forgotten."""
    drop_ended(db, entry.key)
    db.execute(text(f"WITH {INSERTED} SELECT 1"), inserted_values(entry, fence))


def inserted_values(entry: Entry, fence: int | None) -> tuple[Any, ...]:
    return (
        *named(entry.key),
        entry.topic,
        entry.digest,
        entry.correlation,
        entry.accepted_at,
        entry.expires_at,
        entry.state,
        entry.starts,
        entry.terminal,
        entry.reply_topic,
        entry.delivered,
        entry.ended_at,
        entry.state == "ended",
        first_level_of(entry.key.session),
        len(entry.terminal or b""),
        fence,
        entry.payload,
    )


def use_session(db: BoundedConnection, entry: Entry) -> None:
    """A request counts as use of its session."""
    db.execute(
        "UPDATE sessions SET last_used = %s WHERE route = %s AND session = %s AND last_used < %s",
        (entry.accepted_at, entry.key.route, entry.key.session, entry.accepted_at),
    )


def drop_ended(db: BoundedConnection, key: EntryKey) -> None:
    """Forget the entry of this key if it has ended."""
    db.execute(
        text(
            f"WITH gone AS (DELETE FROM entries WHERE {_BY_KEY} AND state = 'ended' RETURNING id), "
            "bodies AS (DELETE FROM payloads USING gone WHERE payloads.id = gone.id) "
            "DELETE FROM chunks USING gone WHERE chunks.id = gone.id"
        ),
        named(key),
    )


def find(db: BoundedConnection, key: EntryKey) -> Entry | None:
    row = db.execute(text(f"{_SELECT} WHERE {_BY_KEY}"), named(key)).fetchone()
    return None if row is None else entry_of(row)


def find_all(db: BoundedConnection, ids: Sequence[int]) -> dict[int, Entry]:
    """The entries of these numbers with their bodies."""
    rows = db.execute(text(f"SELECT entries.id, {COLUMNS} FROM entries LEFT JOIN payloads USING (id) "
                           "WHERE entries.id = ANY(%s)"), (list(ids),)).fetchall()  # fmt: skip
    return {row[0]: entry_of(row[1:]) for row in rows}


def chunks(db: BoundedConnection, key: EntryKey) -> bytes | None:
    row = db.execute(
        text(f"SELECT record FROM chunks WHERE id = (SELECT id FROM entries WHERE {_BY_KEY})"), named(key)
    ).fetchone()
    return None if row is None else bytes(row[0])


def unfinished(db: BoundedConnection) -> list[Entry]:
    return [
        entry_of(row) for row in db.execute(text(f"{_SELECT} WHERE state <> 'ended' ORDER BY entries.id")).fetchall()
    ]


def undelivered(db: BoundedConnection) -> list[Entry]:
    rows = db.execute(text(f"{_SELECT} WHERE state = 'ended' AND NOT delivered ORDER BY ended_order")).fetchall()
    return [entry_of(row) for row in rows]


def count_start(db: BoundedConnection, key: EntryKey) -> Callable[[], int]:
    """Count one more start; tells how many there were now, 0 for an unknown key."""
    found = db.execute(
        text(f"UPDATE entries SET starts = starts + (state <> 'ended')::int WHERE {_BY_KEY} RETURNING starts"),
        named(key),
    )

    def read() -> int:
        row = found.fetchone()
        return 0 if row is None else int(row[0])

    return read


def starts(db: BoundedConnection, key: EntryKey) -> int:
    """How many were counted; 0 for an unknown key."""
    row = db.execute(text(f"SELECT starts FROM entries WHERE {_BY_KEY}"), named(key)).fetchone()
    return 0 if row is None else int(row[0])


def set_streaming(db: BoundedConnection, key: EntryKey) -> None:
    db.execute(text(f"UPDATE entries SET state = 'streaming' WHERE {_BY_KEY} AND state = 'accepted'"), named(key))


def set_delivered(db: BoundedConnection, keys: Sequence[EntryKey]) -> None:
    db.execute(
        "UPDATE entries SET delivered = true FROM unnest(%s::text[], %s::text[], %s::text[]) AS given (r, s, i) "
        "WHERE route = r AND session = s AND request_id = i AND state = 'ended'",
        columns(keys),
    )


def drop(db: BoundedConnection, ids: Sequence[int]) -> None:
    if ids:
        for table in ("payloads", "chunks", "entries"):
            db.execute(text(f"DELETE FROM {table} WHERE id = ANY(%s)"), (list(ids),))


def named(key: EntryKey) -> tuple[str, str, str]:
    return key.route, key.session, key.request_id


def columns(keys: Sequence[EntryKey]) -> tuple[list[str], list[str], list[str]]:
    return [key.route for key in keys], [key.session for key in keys], [key.request_id for key in keys]


def entry_of(row: Sequence[Any]) -> Entry:
    route, session, request_id, topic, payload, digest, correlation, accepted_at, expires_at = row[:9]
    state, starts, terminal, reply_topic, delivered, ended_at = row[9:15]
    return Entry(
        key=EntryKey(route, session, request_id),
        topic=topic,
        payload=payload or b"",
        digest=digest,
        correlation=correlation,
        accepted_at=accepted_at,
        expires_at=expires_at,
        state=state,
        starts=starts,
        terminal=terminal,
        reply_topic=reply_topic,
        delivered=delivered,
        ended_at=ended_at,
    )
