"""The store on PostgreSQL, for one worker: journal and histories in a schema of a database that may be on another machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
import psycopg_pool
import structlog

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.core.histogram import COMMIT_BOUNDS_S, Histogram
from llamacpp_mqtt_deploy.core.spending import LedgerRow, Spent, day_of
from llamacpp_mqtt_deploy.ports import (
    Entry,
    EntryKey,
    HistoryChange,
    Pending,
    Purged,
    StoreAway,
    StoreError,
    StoreInUse,
    ToldEnd,
)
from llamacpp_mqtt_deploy.stores.bounds import MAX_HISTORY_BYTES, MAX_JOURNAL_BYTES, Portion
from llamacpp_mqtt_deploy.stores.histories import SessionKey, encoded
from llamacpp_mqtt_deploy.stores.postgres import pg_ends as ends
from llamacpp_mqtt_deploy.stores.postgres import pg_entries as rows
from llamacpp_mqtt_deploy.stores.postgres import pg_histories as histories
from llamacpp_mqtt_deploy.stores.postgres import pg_purging as purging
from llamacpp_mqtt_deploy.stores.postgres import pg_schema
from llamacpp_mqtt_deploy.stores.postgres import pg_sessions as sessions
from llamacpp_mqtt_deploy.stores.postgres import pg_times as times
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database
from llamacpp_mqtt_deploy.stores.postgres.pg_ends import RequestEnd
from llamacpp_mqtt_deploy.stores.postgres.pg_steps import Later
from llamacpp_mqtt_deploy.stores.postgres.pg_writer import PgWriter
from llamacpp_mqtt_deploy.stores.told_ends import ToldEnds

WRITE_TIMEOUT_S = 30.0
"""How long the methods that wait for their write do so."""

PURGE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0
"""How long a read waits for one of the connections."""

READERS = 3
"""Most connections that read at once."""

_CLAIM_TRIES_S = 2.0
_TIMES_TO_MEND = Purged(entries=0, sessions=0, more=True)

log = structlog.get_logger(__name__)


class PostgresStore:
    """Keeps journal and sessions in one schema that one worker uses at a time.

    `aside` is the file for ends that the database does not take (see `Store.set_aside`). Raises StoreInUse when another worker
    has the schema, StoreError when the database cannot be reached or used.
    """

    def __init__(
        self, database: Database, *, aside: Path | None = None, max_history_bytes: int = MAX_HISTORY_BYTES
    ) -> None:
        self._database = database
        self._aside = None
        if aside is not None:
            self._make_folder(aside)
            self._aside = ToldEnds(aside)
        self._max_history_bytes = max_history_bytes
        self.commit_times = Histogram(COMMIT_BOUNDS_S)
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._closed = 0
        """How often."""
        self._writer: PgWriter | None = None
        self._readers: psycopg_pool.ConnectionPool[BoundedConnection] | None = None

    def open(self) -> None:
        """Raises StoreAway where that may succeed later. `close` does not wait for an `open` that waits for the database."""
        with self._opening:
            with self._lock:
                if self._writer is not None:
                    return
                closed = self._closed
            try:
                writer = PgWriter(self._database, claim_schema=self._claim_schema, commit_times=self.commit_times)
            except StoreError as problem:
                raise self._database.judged(problem) from problem.__cause__
            with self._lock:
                self._use(writer, opening=closed == self._closed)

    def _use(self, writer: PgWriter, *, opening: bool) -> None:
        try:
            if not opening:
                raise StoreError(f"The store in {self._database.shown} was closed before it was open.")
            self._readers = self._open_readers()
            self._writer = writer
            self._opened(writer)
        except BaseException:
            self._close()
            writer.close(CLOSE_TIMEOUT_S)
            raise

    def _make_folder(self, aside: Path) -> None:
        with contextlib.suppress(OSError):  # without it nothing can be set aside, and `set_aside` says so
            aside.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _opened(self, writer: PgWriter) -> None:
        self._take_in_told_ends(writer)

    def close(self) -> None:
        """Commit what waits and let go of the schema; idempotent, never raises."""
        with self._lock:
            self._closed += 1
            self._close()

    def _close(self) -> None:
        writer, readers = self._writer, self._readers
        self._writer = self._readers = None
        if writer is not None and not writer.close(CLOSE_TIMEOUT_S):
            log.error("store.close_failed", reason="the database does not answer")
        if readers is not None:
            readers.close(1.0)

    def trouble(self) -> str:
        writer = self._writer
        found = None if writer is None else writer.away or writer.trouble
        return "" if found is None else str(found)

    # --- journal -----------------------------------------------------------------------------------------------------

    def accept(self, entries: Sequence[Entry]) -> None:
        self.accept_soon(entries).wait(WRITE_TIMEOUT_S)

    def accept_soon(self, entries: Sequence[Entry], *, unhurried: bool = False) -> Pending:
        taken = tuple(entries)

        def step(db: BoundedConnection) -> None:
            for entry in taken:
                rows.insert(db, entry)
                rows.use_session(db, entry)

        return self._write().submit(step, size=sum(len(entry.payload) for entry in taken), durable=True)

    def find(self, key: EntryKey) -> Entry | None:
        with self._read() as db:
            return rows.find(db, key)

    def mark_started(self, key: EntryKey) -> int:
        def step(db: BoundedConnection) -> Later:
            return Later(rows.count_start(db, key), again=lambda db: rows.starts(db, key))

        write = self._write().submit(step, urgent=True)
        write.wait(WRITE_TIMEOUT_S)
        assert isinstance(write.result, int)
        return write.result

    def mark_streaming(self, key: EntryKey) -> None:
        self.mark_streaming_soon(key).wait(WRITE_TIMEOUT_S)

    def mark_streaming_soon(self, key: EntryKey) -> Pending:
        return self._write().submit(lambda db: rows.set_streaming(db, key), durable=True, urgent=True)

    def finish(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None = None,
        chunks: bytes | None = None,
        spent: Spent | None = None,
        on_stored: Callable[[], None] | None = None,
    ) -> None:
        write = self.finish_soon(key, terminal, now=now, history=history, chunks=chunks, spent=spent)
        if on_stored is not None:
            write.on_done(lambda problem: on_stored() if problem is None else None)
        write.wait(WRITE_TIMEOUT_S)

    def finish_soon(
        self,
        key: EntryKey,
        terminal: bytes,
        *,
        now: float,
        history: HistoryChange | None = None,
        chunks: bytes | None = None,
        spent: Spent | None = None,
    ) -> Pending:
        request = self._request_end(
            ToldEnd(key=key, terminal=terminal, now=now, history=history, chunks=chunks, spent=spent)
        )
        size = len(terminal) + len(chunks or b"") + sum(len(message) for _, message in request.appended)
        return self._write().submit(lambda db: self._end(db, request), size=size, durable=True, urgent=True)

    def _request_end(self, told: ToldEnd) -> RequestEnd:
        return RequestEnd(
            key=told.key,
            terminal=told.terminal,
            chunks=told.chunks,
            history=told.history,
            # Encoded first: what JSON cannot hold is the caller's mistake, not the database's.
            appended=[] if told.history is None else encoded(told.history),
            spent=told.spent,
            now=told.now,
            max_history_bytes=self._max_history_bytes,
        )

    def _end(self, db: BoundedConnection, request: RequestEnd) -> Later:
        # Nobody asks how it was found.
        return Later(ends.end(db, request, fence=None), again=lambda _: None)

    def set_aside(self, ends: Sequence[ToldEnd]) -> bool:
        return self._aside is not None and self._aside.add(ends)

    def clear_aside(self) -> None:
        if self._aside is not None:
            self._aside.clear()

    def _take_in_told_ends(self, writer: PgWriter) -> None:
        """End what an earlier life has told to be ended, with the same bytes."""
        ends = [] if self._aside is None else self._aside.read()
        if not ends:
            return

        def step(db: BoundedConnection) -> int:
            return sum(self._end_as_told(db, end) for end in ends)

        write = writer.submit(step, durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)
        log.info("store.told_ends_taken_in", told=len(ends), missing=write.result)
        self.clear_aside()

    def _end_as_told(self, db: BoundedConnection, end: ToldEnd) -> bool:
        entry = rows.find(db, end.key)
        if entry is None or entry.state == "ended":
            return False  # the journal had it, and has perhaps forgotten it since: then its history is written too
        self._end(db, self._request_end(end)).read()
        return True

    def ledger(
        self,
        *,
        since_day: int,
        until_day: int | None = None,
        first_level: str | None = None,
        skip: int = 0,
        most: int = 1000,
    ) -> list[LedgerRow]:
        with self._read() as db:
            return sessions.ledger(
                db, since_day=since_day, until_day=until_day, first_level=first_level, skip=skip, most=most
            )

    def chunks(self, key: EntryKey) -> bytes | None:
        with self._read() as db:
            return rows.chunks(db, key)

    def mark_delivered(self, keys: Sequence[EntryKey]) -> None:
        taken = tuple(keys)
        self._write().submit(lambda db: rows.set_delivered(db, taken), urgent=True).wait(WRITE_TIMEOUT_S)

    def unfinished(self) -> list[Entry]:
        with self._read() as db:
            return rows.unfinished(db)

    def undelivered(self) -> list[Entry]:
        with self._read() as db:
            return rows.undelivered(db)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def history(self, session: SessionKey) -> tuple[Message, ...]:
        with self._read() as db:
            return histories.messages(db, session)

    def reset(self, session: SessionKey) -> None:
        write = self._write().submit(lambda db: histories.forget(db, session), durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)

    def delete(self, session: SessionKey) -> None:
        write = self._write().submit(lambda db: histories.drop(db, session), durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)

    def system_prompt(self, session: SessionKey) -> str | None:
        with self._read() as db:
            return sessions.prompt(db, session)

    def set_system_prompt(self, session: SessionKey, prompt: str | None, *, now: float, reset: bool) -> None:
        def step(db: BoundedConnection) -> None:
            if reset:
                histories.forget(db, session)
            sessions.write_prompt(db, session, prompt, now=self._time(db, now))

        write = self._write().submit(step, size=len(prompt or ""), durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)

    def newest_session(self) -> int:
        with self._read() as db:
            return sessions.newest(db)

    def sessions(self, route: str, *, up_to: int, most: int) -> tuple[tuple[int, str], ...]:
        with self._read() as db:
            return sessions.numbered(db, route, up_to=up_to, most=most)

    def purge(
        self,
        *,
        now: float,
        remember_s: float,
        ttl_s: float,
        max_sessions: int,
        max_bytes: int = MAX_JOURNAL_BYTES,
    ) -> Purged:
        def drop_entries(db: BoundedConnection) -> Purged | None:
            if not self._may_purge(db):
                return None
            dropped, at = Portion(), self._time(db, now)
            if not times.mend_some(db, at):
                return _TIMES_TO_MEND
            purging.old_entries(db, dropped, now=at, remember_s=remember_s)
            purging.excess_entries(db, dropped, max_bytes=max_bytes)
            purging.forget_writers(db)
            sessions.tidy_ledger(db, day_of(at))
            return Purged(entries=dropped.rows, sessions=0, more=dropped.full)

        def drop_sessions(db: BoundedConnection) -> Purged | None:
            if not self._may_purge(db):
                return None
            dropped, at = Portion(), self._time(db, now)
            # Another worker may have begun to move them meanwhile.
            if not times.mend_some(db, at):
                return _TIMES_TO_MEND
            purging.old_sessions(db, dropped, now=at, ttl_s=ttl_s, max_sessions=max_sessions)
            return Purged(entries=0, sessions=dropped.rows, more=dropped.full)

        done = []
        # One after the other, so that what others write has its turn in between.
        for step in (drop_entries, drop_sessions):
            write = self._write().submit(step, urgent=True)
            write.wait(PURGE_TIMEOUT_S)
            if isinstance(write.result, Purged):
                done.append(write.result)
            if write.result == _TIMES_TO_MEND:
                break
        return Purged(
            entries=sum(each.entries for each in done),
            sessions=sum(each.sessions for each in done),
            more=any(each.more for each in done),
        )

    def _may_purge(self, db: BoundedConnection) -> bool:
        """One worker at a time."""
        row = db.execute("SELECT pg_try_advisory_xact_lock(%s)", (self._database.lock_key("purge"),)).fetchone()
        return row is not None and bool(row[0])

    def _time(self, db: BoundedConnection, now: float) -> float:
        return now

    def clock_was_set(self, forward_s: float, *, now: float) -> Pending:
        return self._write().submit(lambda db: times.set_forward(db, forward_s, now), urgent=True)

    # --- connections ---------------------------------------------------------------------------------------------------

    def _claim_schema(self, db: BoundedConnection) -> None:
        """Nobody else may use the schema as long as this connection lives. An old one of ours may live a moment longer."""
        self._lock_schema(db, "SELECT pg_try_advisory_lock(%s)")

    def _lock_schema(self, db: BoundedConnection, statement: str) -> None:
        ends_at = time.monotonic() + _CLAIM_TRIES_S
        while True:
            row = db.execute(statement.encode(), (self._database.lock_key("use"),)).fetchone()
            if row is not None and row[0]:
                break
            if time.monotonic() > ends_at:
                raise StoreInUse(
                    f"Another worker uses the schema {self._database.schema} of {self._database.shown}: stop it, give this one its "
                    "own mqtt.root, or set [pool] name for all of them."
                )
            time.sleep(0.05)
        pg_schema.prepare(self._database, db)

    def _open_readers(self) -> psycopg_pool.ConnectionPool[BoundedConnection]:
        readers = psycopg_pool.ConnectionPool(
            self._database.conninfo,
            connection_class=BoundedConnection,
            kwargs={"autocommit": True},
            min_size=1,
            max_size=READERS,
            timeout=READ_TIMEOUT_S,
            # The pool doubles its pauses between attempts: those of a longer absence would go on long after its end. What has
            # given up begins anew with the next read.
            reconnect_timeout=READ_TIMEOUT_S,
            check=psycopg_pool.ConnectionPool.check_connection,
            max_waiting=256,
            name="readers",
            open=False,
        )
        readers.open()
        return readers

    def _write(self) -> PgWriter:
        writer = self._writer
        if writer is None:
            raise StoreError(f"The store in {self._database.shown} is closed.")
        return writer

    @contextmanager
    def _read(self) -> Iterator[BoundedConnection]:
        writer, readers = self._write(), self._readers
        if readers is None:
            raise StoreError(f"The store in {self._database.shown} is closed.")
        writer.check_present()
        try:
            with readers.connection() as db:
                yield db
        except psycopg_pool.PoolTimeout as error:
            problem = writer.away or f"{self._database.shown} has given no connection for {READ_TIMEOUT_S:g} s"
            raise StoreAway(f"{str(problem).rstrip('.')}.") from error
        except psycopg_pool.PoolClosed as error:
            raise StoreError(f"The store in {self._database.shown} is closed.") from error
        except psycopg.Error as error:
            raise self._database.explained(error) from error
