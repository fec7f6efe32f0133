"""The store: one SQLite database, in a file with a write-ahead log or in memory; one connection writes, one reads.

What a crash may not take (`accept`, `mark_streaming`, `finish`, and what a person asked to forget) is committed with
`synchronous = FULL`, one fsync each; the rest survives the death of the process, which needs none. Switching the pragma
costs 1.5 us. Reads have a connection of their own: none of them waits until the disk has taken somebody's write.
"""

# ruff: noqa: S608  every statement is joined from constants of this file; values are bound
from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import structlog

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, HistoryChange, StoreError
from llamacpp_mqtt_deploy.stores.bounds import (
    CLOCK_SET_S,
    CLOCK_SLACK_S,
    MAX_HISTORY_BYTES,
    PURGE_ROWS,
    UNDELIVERED_S,
    first_level,
    messages_to_forget,
)
from llamacpp_mqtt_deploy.stores.memory import MemoryFile
from llamacpp_mqtt_deploy.stores.statefile import StateFile, translated

SessionKey = tuple[str, str]

SPARE_PAGES = 256
"""Free pages (4 KiB each) that stay in the file for what comes next."""

VACUUM_PAGES = 256
"""Most free pages beyond those that one `purge` gives back to the disk."""

_SELECT = (
    "SELECT route, session, request_id, topic, payload, digest, correlation, accepted_at, expires_at, state, starts, "
    "terminal, reply_topic, delivered, ended_at FROM entries LEFT JOIN payloads USING (id)"
)
_BY_KEY = "route = ? AND session = ? AND request_id = ?"

log = structlog.get_logger(__name__)


class SqliteStore:
    """Keeps journal and sessions in one file that one worker uses at a time, or without a path in memory, until `close`.

    A damaged file is moved aside at `open` and a new one begun (`moved_aside` then says where the old one is); raises
    StoreInUse when another worker has the file, StoreError when the file is another program's, newer, or not writable.
    """

    def __init__(self, path: Path | None, *, max_history_bytes: int = MAX_HISTORY_BYTES) -> None:
        self._max_history_bytes = max_history_bytes
        self._file: StateFile | MemoryFile = MemoryFile() if path is None else StateFile(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._reader_lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        self._durable = False
        self._order = 0

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def moved_aside(self) -> Path | None:
        return self._file.moved_aside

    def open(self) -> None:
        with self._lock:
            if self._connection is not None:
                return
            self._connection = self._file.open(self._look)
            try:
                self._reader = self._file.reader()
            except StoreError:
                self._connection.close()
                self._connection = None
                self._file.release()
                raise

    def close(self) -> None:
        """Fold the log into the file and let go of the lock; idempotent, never raises."""
        with self._lock, self._reader_lock:
            connection, self._connection = self._connection, None
            reader, self._reader = self._reader, None
            if connection is None:
                return
            try:
                if reader is not None:
                    reader.close()
                connection.close()
            except sqlite3.Error as error:
                # Nothing is lost: what was committed is in the log and is folded in at the next start.
                log.warning("store.close_failed", path=str(self.path), reason=str(error))
            finally:
                self._file.release()

    # --- journal -----------------------------------------------------------------------------------------------------

    def accept(self, entries: Sequence[Entry]) -> None:
        with self._write(durable=True) as db:
            for entry in entries:
                self._insert(db, entry)

    def find(self, key: EntryKey) -> Entry | None:
        with self._read() as db:
            row = db.execute(f"{_SELECT} WHERE {_BY_KEY}", _named(key)).fetchone()
        return None if row is None else _entry(row)

    def mark_started(self, key: EntryKey) -> int:
        with self._write() as db:
            db.execute(f"UPDATE entries SET starts = starts + 1 WHERE {_BY_KEY} AND state <> 'ended'", _named(key))
            row = db.execute(f"SELECT starts FROM entries WHERE {_BY_KEY}", _named(key)).fetchone()
        return 0 if row is None else int(row[0])

    def mark_streaming(self, key: EntryKey) -> None:
        with self._write(durable=True) as db:
            db.execute(f"UPDATE entries SET state = 'streaming' WHERE {_BY_KEY} AND state = 'accepted'", _named(key))

    def finish(self, key: EntryKey, terminal: bytes, *, now: float, history: HistoryChange | None = None) -> None:
        appended = [] if history is None else [(str(m.get("role", "")), orjson.dumps(m)) for m in history.append]
        with self._write(durable=True) as db:
            row = db.execute(f"SELECT id, state FROM entries WHERE {_BY_KEY}", _named(key)).fetchone()
            if row is not None:
                if row[1] == "ended":
                    return
                db.execute(
                    "UPDATE entries SET state = 'ended', terminal = ?, delivered = 0, ended_at = ?, ended_order = ? "
                    "WHERE id = ?",
                    (terminal, now, self._next(), row[0]),
                )
                db.execute("DELETE FROM payloads WHERE id = ?", (row[0],))
            if history is not None:
                self._change(db, history, appended, now)

    def mark_delivered(self, keys: Sequence[EntryKey]) -> None:
        with self._write() as db:
            db.executemany(
                f"UPDATE entries SET delivered = 1 WHERE {_BY_KEY} AND state = 'ended'", [_named(key) for key in keys]
            )

    def unfinished(self) -> list[Entry]:
        with self._read() as db:
            rows = db.execute(f"{_SELECT} WHERE state <> 'ended' ORDER BY entries.id").fetchall()
        return [_entry(row) for row in rows]

    def undelivered(self) -> list[Entry]:
        with self._read() as db:
            rows = db.execute(f"{_SELECT} WHERE state = 'ended' AND delivered = 0 ORDER BY ended_order").fetchall()
        return [_entry(row) for row in rows]

    # --- sessions ----------------------------------------------------------------------------------------------------

    def history(self, session: SessionKey) -> tuple[Message, ...]:
        with self._read() as db:
            rows = db.execute(
                "SELECT message FROM messages "
                "WHERE session_id = (SELECT id FROM sessions WHERE route = ? AND session = ?) ORDER BY id",
                session,
            ).fetchall()
        return tuple(orjson.loads(row[0]) for row in rows)

    def reset(self, session: SessionKey) -> None:
        with self._write(durable=True) as db:
            _forget_messages(db, session)
            db.execute("UPDATE sessions SET bytes = 0 WHERE route = ? AND session = ?", session)

    def delete(self, session: SessionKey) -> None:
        with self._write(durable=True) as db:
            _drop_session(db, session)

    def purge(self, *, now: float, remember_s: float, ttl_s: float, max_sessions: int) -> Mapping[str, int]:
        with self._write() as db:
            _mend_times(db, now)
            entries = _purge_entries(db, now, remember_s)
        with self._write() as db:
            sessions = _purge_sessions(db, now, ttl_s, max_sessions)
        with self._lock, self._translating():
            db = self._opened(self._connection)
            spare = db.execute("PRAGMA freelist_count").fetchone()[0] - SPARE_PAGES
            if spare > 0:
                # Gives back one page a step, and `execute` takes a single step of what has no columns.
                db.executescript(f"PRAGMA incremental_vacuum({min(spare, VACUUM_PAGES)})")
        return {"entries": entries, "sessions": sessions}

    def _look(self, connection: sqlite3.Connection) -> None:
        row = connection.execute(
            "SELECT max(coalesce(max(id), 0), coalesce(max(ended_order), 0)) FROM entries"
        ).fetchone()
        self._order = int(row[0])
        connection.execute("PRAGMA synchronous = NORMAL")
        self._durable = False

    # --- under the lock ----------------------------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        if self._reader is None:
            with self._lock, self._translating():
                yield self._opened(self._connection)
        else:
            with self._reader_lock, self._translating():
                yield self._opened(self._reader)

    @contextmanager
    def _write(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translating():
            db = self._opened(self._connection)
            if durable != self._durable:
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # A full disk has rolled back by itself.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _opened(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            message = f"The store {self.path} is closed."
            raise StoreError(message)
        return connection

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            self._file.suspect(error)
            raise translated(error, self.path) from error

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _insert(self, db: sqlite3.Connection, entry: Entry) -> None:
        row = db.execute(f"SELECT id, state FROM entries WHERE {_BY_KEY}", _named(entry.key)).fetchone()
        if row is not None:
            if row[1] != "ended":
                return
            _drop_entries(db, [(row[0],)])
        place = self._next()
        db.execute(
            "INSERT INTO entries (id, route, session, request_id, topic, digest, correlation, accepted_at, expires_at, "
            "state, starts, terminal, reply_topic, delivered, ended_at, ended_order) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
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
            ),
        )
        db.execute("INSERT INTO payloads (id, payload) VALUES (?, ?)", (place, entry.payload))
        db.execute(
            "UPDATE sessions SET last_used = max(last_used, ?) WHERE route = ? AND session = ?",
            (entry.accepted_at, entry.key.route, entry.key.session),
        )

    def _change(
        self, db: sqlite3.Connection, history: HistoryChange, appended: Sequence[tuple[str, bytes]], now: float
    ) -> None:
        route, session = history.session
        db.execute(
            "INSERT INTO sessions (route, session, first_level, created, last_used, bytes) VALUES (?, ?, ?, ?, ?, 0) "
            "ON CONFLICT (route, session) DO UPDATE SET last_used = max(last_used, excluded.last_used)",
            (route, session, first_level(session), now, now),
        )
        session_id, size = db.execute(
            "SELECT id, bytes FROM sessions WHERE route = ? AND session = ?", history.session
        ).fetchone()
        if history.forget_before:
            _forget_messages(db, history.session)
            size = 0
        db.executemany(
            "INSERT INTO messages (session_id, role, message) VALUES (?, ?, ?)",
            [(session_id, role, text) for role, text in appended],
        )
        size += sum(len(text) for _, text in appended)
        if size > self._max_history_bytes:
            size -= _trim(db, session_id, self._max_history_bytes)
        db.execute("UPDATE sessions SET bytes = ? WHERE id = ?", (size, session_id))


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


def _drop_session(db: sqlite3.Connection, session: SessionKey) -> None:
    _forget_messages(db, session)
    db.execute("DELETE FROM sessions WHERE route = ? AND session = ?", session)


def _drop_entries(db: sqlite3.Connection, ids: Sequence[tuple[int]]) -> None:
    db.executemany("DELETE FROM payloads WHERE id = ?", ids)
    db.executemany("DELETE FROM entries WHERE id = ?", ids)


def _mend_times(db: sqlite3.Connection, now: float) -> None:
    for table, column, where in (
        # Both values are named so that the index is used: this runs with every purge.
        ("entries", "ended_at", "state = 'ended' AND delivered IN (0, 1) AND"),
        ("sessions", "last_used", ""),
    ):
        statement = f"UPDATE {table} SET {column} = ? WHERE {where} {column}"
        db.execute(f"{statement} > ?", (now, now + CLOCK_SLACK_S))
        if now >= CLOCK_SET_S:
            db.execute(f"{statement} < ?", (now, CLOCK_SET_S))


def _purge_entries(db: sqlite3.Connection, now: float, remember_s: float) -> int:
    # Two halves, since an OR would read the whole index.
    old = db.execute(
        "SELECT id FROM ("
        "SELECT id, ended_order FROM entries WHERE state = 'ended' AND delivered = 1 AND ended_at < :old UNION ALL "
        "SELECT id, ended_order FROM entries WHERE state = 'ended' AND delivered = 0 AND ended_at < min(:old, :lost)) "
        "ORDER BY ended_order LIMIT :most",
        {"old": now - remember_s, "lost": now - UNDELIVERED_S, "most": PURGE_ROWS},
    ).fetchall()
    _drop_entries(db, old)
    return len(old)


def _purge_sessions(db: sqlite3.Connection, now: float, ttl_s: float, max_sessions: int) -> int:
    idle = (
        "NOT EXISTS (SELECT 1 FROM entries e WHERE e.route = s.route AND e.session = s.session AND e.state <> 'ended')"
    )
    old = db.execute(
        f"SELECT route, session FROM sessions s WHERE last_used < ? AND {idle} "
        "ORDER BY last_used, route, session LIMIT ?",
        (now - ttl_s, PURGE_ROWS),
    ).fetchall()
    for session in old:
        _drop_session(db, session)
    excess = db.execute("SELECT count(*) FROM sessions").fetchone()[0] - max_sessions
    if excess <= 0:
        return len(old)
    # A session's depth is its place in its level, newest first: taking the deepest, one after the other, always takes
    # the least recently used session of whoever holds most.
    victims = db.execute(
        "SELECT route, session FROM (SELECT route, session, last_used, row_number() OVER (PARTITION BY first_level "
        "ORDER BY last_used DESC, route DESC, session DESC) AS depth FROM sessions) s "
        f"WHERE {idle} ORDER BY depth DESC, last_used, route, session LIMIT ?",
        (min(excess, PURGE_ROWS - len(old)),),
    ).fetchall()
    for session in victims:
        _drop_session(db, session)
    return len(old) + len(victims)
