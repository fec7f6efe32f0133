"""The journal's rows: requests that were accepted, as statements inside a transaction."""

# ruff: noqa: S608  every statement is joined from constants of this file; values are bound
from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any, Literal

from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.bounds import first_level_of

Found = Literal["unknown", "unfinished", "ended"]

_SELECT = (
    "SELECT route, session, request_id, topic, payload, digest, correlation, accepted_at, expires_at, state, starts, "
    "terminal, reply_topic, delivered, ended_at FROM entries LEFT JOIN payloads USING (id)"
)
_BY_KEY = "route = ? AND session = ? AND request_id = ?"


def last_place(db: sqlite3.Connection) -> int:
    """The highest number that was given in the order of accepting and ending."""
    return int(db.execute("SELECT max(coalesce(max(id), 0), coalesce(max(ended_order), 0)) FROM entries").fetchone()[0])


def insert(db: sqlite3.Connection, entry: Entry, place: int) -> None:
    """Journal a request under this place; nothing when it is there and unfinished."""
    # Nearly every request is new: it is looked for only when it turns out not to be.
    if not _insert_new(db, entry, place):
        entry_id, state = db.execute(f"SELECT id, state FROM entries WHERE {_BY_KEY}", _named(entry.key)).fetchone()
        if state != "ended":
            return
        drop(db, [(entry_id,)])
        _insert_new(db, entry, place)
    db.execute("INSERT INTO payloads (id, payload) VALUES (?, ?)", (place, entry.payload))


def _insert_new(db: sqlite3.Connection, entry: Entry, place: int) -> bool:
    """The row of a request; False when the key has one."""
    inserted = db.execute(
        "INSERT INTO entries (id, route, session, request_id, topic, digest, correlation, accepted_at, expires_at, "
        "state, starts, terminal, reply_topic, delivered, ended_at, ended_order, first_level, bytes) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (route, session, request_id) DO NOTHING",
        (
            place,
            *_named(entry.key),
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
            place if entry.state == "ended" else None,
            first_level_of(entry.key.session),
            len(entry.terminal or b""),
        ),
    )
    return inserted.rowcount > 0


def find(db: sqlite3.Connection, key: EntryKey) -> Entry | None:
    row = db.execute(f"{_SELECT} WHERE {_BY_KEY}", _named(key)).fetchone()
    return None if row is None else _entry(row)


def keys(db: sqlite3.Connection, *, after: EntryKey | None, most: int) -> list[EntryKey]:
    """Up to so many keys, in their order, from behind this one: out of the index alone, however much the journal holds."""
    named = ("", "", "") if after is None else _named(after)
    rows = db.execute(
        "SELECT route, session, request_id FROM entries WHERE (route, session, request_id) > (?, ?, ?) "
        "ORDER BY route, session, request_id LIMIT ?",
        (*named, most),
    ).fetchall()
    return [EntryKey(*row) for row in rows]


def chunks(db: sqlite3.Connection, key: EntryKey) -> bytes | None:
    row = db.execute(
        f"SELECT record FROM chunks WHERE id = (SELECT id FROM entries WHERE {_BY_KEY})", _named(key)
    ).fetchone()
    return None if row is None else bytes(row[0])


def unfinished(db: sqlite3.Connection) -> list[Entry]:
    return [_entry(row) for row in db.execute(f"{_SELECT} WHERE state <> 'ended' ORDER BY entries.id").fetchall()]


def undelivered(db: sqlite3.Connection) -> list[Entry]:
    rows = db.execute(f"{_SELECT} WHERE state = 'ended' AND delivered = 0 ORDER BY ended_order").fetchall()
    return [_entry(row) for row in rows]


def count_start(db: sqlite3.Connection, key: EntryKey) -> int:
    """Count one more start; returns how many there were now, 0 for an unknown key."""
    db.execute(f"UPDATE entries SET starts = starts + 1 WHERE {_BY_KEY} AND state <> 'ended'", _named(key))
    row = db.execute(f"SELECT starts FROM entries WHERE {_BY_KEY}", _named(key)).fetchone()
    return 0 if row is None else int(row[0])


def set_streaming(db: sqlite3.Connection, key: EntryKey) -> None:
    db.execute(f"UPDATE entries SET state = 'streaming' WHERE {_BY_KEY} AND state = 'accepted'", _named(key))


def end(
    db: sqlite3.Connection, key: EntryKey, terminal: bytes, *, now: float, place: int, chunks: bytes | None
) -> Found:
    """Store the terminal event and drop the payload of a request that was found unfinished."""
    named = _named(key)
    changed = db.execute(
        "UPDATE entries SET state = 'ended', terminal = ?, bytes = ?, delivered = 0, ended_at = ?, ended_order = ? "
        f"WHERE {_BY_KEY} AND state <> 'ended'",
        (terminal, len(terminal) + len(chunks or b""), now, place, *named),
    )
    if changed.rowcount == 0:
        known = db.execute(f"SELECT 1 FROM entries WHERE {_BY_KEY}", named).fetchone()
        return "unknown" if known is None else "ended"
    if chunks is not None:
        db.execute(f"INSERT INTO chunks (id, record) SELECT id, ? FROM entries WHERE {_BY_KEY}", (chunks, *named))
    db.execute(f"DELETE FROM payloads WHERE id = (SELECT id FROM entries WHERE {_BY_KEY})", named)
    return "unfinished"


def set_delivered(db: sqlite3.Connection, keys: Sequence[EntryKey]) -> None:
    db.executemany(
        f"UPDATE entries SET delivered = 1 WHERE {_BY_KEY} AND state = 'ended'", [_named(key) for key in keys]
    )


def drop(db: sqlite3.Connection, ids: Sequence[tuple[int]]) -> None:
    db.executemany("DELETE FROM payloads WHERE id = ?", ids)
    db.executemany("DELETE FROM chunks WHERE id = ?", ids)
    db.executemany("DELETE FROM entries WHERE id = ?", ids)


def _named(key: EntryKey) -> tuple[str, str, str]:
    return key.route, key.session, key.request_id


def _entry(row: tuple[Any, ...]) -> Entry:
    route, session, request_id, topic, payload, digest, correlation, accepted_at, expires_at = row[:9]
    state, starts, terminal, reply_topic, delivered, ended_at = row[9:]
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
        delivered=bool(delivered),
        ended_at=ended_at,
    )
