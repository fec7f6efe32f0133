"""The store: one SQLite database, in a file with a write-ahead log or in memory.

One thread writes, and commits together what came together; reads have a connection of their own and wait for no disk.
What a crash may not take (`accept`, `mark_streaming`, `finish`, and what a person asked to forget) is committed with
`synchronous = FULL`, one fsync for all that waits; the rest survives the death of the process, which needs none.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog

from llamacpp_mqtt_deploy.core.deltas import Message
from llamacpp_mqtt_deploy.core.histogram import COMMIT_BOUNDS_S, Histogram
from llamacpp_mqtt_deploy.core.spending import LedgerRow, Spent
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, HistoryChange, Pending, Purged, StoreError, ToldEnd
from llamacpp_mqtt_deploy.stores import entries as rows
from llamacpp_mqtt_deploy.stores import held_bytes, histories, journal_times, ledger, purging, session_prompts
from llamacpp_mqtt_deploy.stores.bounds import MAX_HISTORY_BYTES, MAX_JOURNAL_BYTES, Portion
from llamacpp_mqtt_deploy.stores.group_commit import GroupCommit
from llamacpp_mqtt_deploy.stores.histories import SessionKey
from llamacpp_mqtt_deploy.stores.known_keys import KnownKeys
from llamacpp_mqtt_deploy.stores.memory import MemoryFile
from llamacpp_mqtt_deploy.stores.session_uses import SessionUses
from llamacpp_mqtt_deploy.stores.statefile import Missing, StateFile, translated

WRITE_TIMEOUT_S = 30.0
"""How long the methods that wait for their write do so: an SD card that collects garbage takes seconds."""

CLOSE_TIMEOUT_S = 10.0
"""How long `close` waits for a disk that does not answer."""

PURGE_TIMEOUT_S = 5.0
"""How long `purge` waits for each of its steps: whoever calls it has other work to do, and it comes again."""

_KEYS_AT_ONCE = 2000
"""So many keys are read before other readers have their turn."""

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
        self._open: _Open | None = None
        self.commit_times = Histogram(COMMIT_BOUNDS_S)
        self._minding: threading.Thread | None = None
        self._damage: StoreError | None = None
        """What a read found; writes may go on for a while."""

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def moved_aside(self) -> Path | None:
        return self._file.moved_aside

    def open(self) -> None:
        with self._lock:
            if self._open is None:
                opened = _Open(self._file, self._explained, self.commit_times)
                try:
                    self._take_in_told_ends(opened)
                except BaseException:
                    opened.close()
                    raise
                self._open = opened
                self._damage = None  # what opening met, it mended

    def close(self) -> None:
        """Commit what waits, fold the log into the file and let go of the lock; idempotent, never raises."""
        with self._lock:
            if self._minding is not None:
                self._minding.join(CLOSE_TIMEOUT_S)  # what it has not written anew by then is lost
            if self._open is not None:
                with contextlib.suppress(StoreError):
                    self._open.writer.submit(self._open.uses.note, urgent=True)
                self._open.close()
                self._open = None

    def trouble(self) -> str:
        opened = self._open
        if opened is None:
            return ""
        file = self._file
        hindrance = self._damage or file.unmended or opened.writer.trouble or file.full()
        # A log that grows may be what fills the disk.
        found = (hindrance, file.unfolded or file.mended())
        return " ".join(str(each) for each in found if each is not None)

    # --- journal -----------------------------------------------------------------------------------------------------

    def accept(self, entries: Sequence[Entry]) -> None:
        self.accept_soon(entries).wait(WRITE_TIMEOUT_S)

    def accept_soon(self, entries: Sequence[Entry], *, unhurried: bool = False) -> Pending:
        opened, taken = self._opened(), tuple(entries)
        refused = self._file.unmended or self._file.full()
        if refused is not None:
            raise type(refused)(*refused.args)

        def step(db: sqlite3.Connection) -> None:
            for entry in taken:
                rows.insert(db, entry, next(opened.places))

        for entry in taken:
            opened.known.add(entry.key)
        size = sum(len(entry.payload) for entry in taken)
        return opened.writer.submit(step, size=size, durable=True, unhurried=unhurried)

    def find(self, key: EntryKey) -> Entry | None:
        if not self._opened().known.may_have(key):
            return None
        with self._read() as db:
            return rows.find(db, key)

    def mark_started(self, key: EntryKey) -> int:
        write = self._opened().writer.submit(lambda db: rows.count_start(db, key), urgent=True)
        write.wait(WRITE_TIMEOUT_S)
        assert isinstance(write.result, int)
        return write.result

    def mark_streaming(self, key: EntryKey) -> None:
        self.mark_streaming_soon(key).wait(WRITE_TIMEOUT_S)

    def mark_streaming_soon(self, key: EntryKey) -> Pending:
        return self._opened().writer.submit(lambda db: rows.set_streaming(db, key), durable=True, urgent=True)

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
        opened = self._opened()
        # Encoded first: what JSON cannot hold is the caller's mistake, not the disk's.
        appended = [] if history is None else histories.encoded(history)

        def step(db: sqlite3.Connection) -> None:
            found = rows.end(db, key, terminal, now=now, place=next(opened.places), chunks=chunks)
            if found != "ended" and history is not None:
                histories.change(db, history, appended, now=now, max_bytes=self._max_history_bytes)
            if found == "unfinished" and spent is not None:
                ledger.add(db, spent, now)

        size = len(terminal) + len(chunks or b"") + sum(len(text) for _, text in appended)
        return opened.writer.submit(step, size=size, durable=True, urgent=True)

    def set_aside(self, ends: Sequence[ToldEnd]) -> bool:
        told = self._file.told_ends
        return told is None or told.add(ends)

    def clear_aside(self) -> None:
        if self._file.told_ends is not None:
            self._file.told_ends.clear()

    def _take_in_told_ends(self, opened: _Open) -> None:
        """End what an earlier life has told to be ended, with the same bytes."""
        told = self._file.told_ends
        ends = [] if told is None else told.read()
        if told is None or not ends:
            return

        def step(db: sqlite3.Connection) -> int:
            return sum(self._end_as_told(db, end, next(opened.places)) for end in ends)

        write = opened.writer.submit(step, durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)
        log.info("store.told_ends_taken_in", told=len(ends), missing=write.result)
        told.clear()

    def _end_as_told(self, db: sqlite3.Connection, end: ToldEnd, place: int) -> bool:
        entry = rows.find(db, end.key)
        if entry is None or entry.state == "ended":
            return False  # the journal had it, and has perhaps forgotten it since: then its history is written too
        rows.end(db, end.key, end.terminal, now=end.now, place=place, chunks=end.chunks)
        if end.history is not None:
            appended = histories.encoded(end.history)
            histories.change(db, end.history, appended, now=end.now, max_bytes=self._max_history_bytes)
        if end.spent is not None:
            ledger.add(db, end.spent, end.now)
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
            return ledger.rows(
                db, since_day=since_day, until_day=until_day, first_level=first_level, skip=skip, most=most
            )

    def chunks(self, key: EntryKey) -> bytes | None:
        with self._read() as db:
            return rows.chunks(db, key)

    def mark_delivered(self, keys: Sequence[EntryKey]) -> None:
        taken = tuple(keys)
        self._opened().writer.submit(lambda db: rows.set_delivered(db, taken), urgent=True).wait(WRITE_TIMEOUT_S)

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
        write = self._opened().writer.submit(lambda db: histories.forget(db, session), durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)

    def delete(self, session: SessionKey) -> None:
        write = self._opened().writer.submit(lambda db: histories.drop(db, session), durable=True, urgent=True)
        write.wait(WRITE_TIMEOUT_S)

    def system_prompt(self, session: SessionKey) -> str | None:
        with self._read() as db:
            return session_prompts.read(db, session)

    def set_system_prompt(self, session: SessionKey, prompt: str | None, *, now: float, reset: bool) -> None:
        def step(db: sqlite3.Connection) -> None:
            if reset:
                histories.forget(db, session)
            session_prompts.write(db, session, prompt, now=now)

        size = len(prompt or "")
        self._opened().writer.submit(step, size=size, durable=True, urgent=True).wait(WRITE_TIMEOUT_S)

    def newest_session(self) -> int:
        with self._read() as db:
            return session_prompts.newest(db)

    def sessions(self, route: str, *, up_to: int, most: int) -> tuple[tuple[int, str], ...]:
        with self._read() as db:
            return session_prompts.numbered(db, route, up_to=up_to, most=most)

    def purge(
        self,
        *,
        now: float,
        remember_s: float,
        ttl_s: float,
        max_sessions: int,
        max_bytes: int = MAX_JOURNAL_BYTES,
    ) -> Purged:
        self._mind_the_file()
        self._note_uses()
        writer = self._opened().writer
        entries, sessions, times_are_right = Portion(), Portion(), False

        def drop_entries(db: sqlite3.Connection) -> None:
            nonlocal entries, times_are_right
            entries = Portion()
            times_are_right = journal_times.mend_some(db, now)
            if times_are_right:
                purging.old_entries(db, entries, now=now, remember_s=remember_s)
                purging.excess_entries(db, entries, max_bytes=max_bytes)

        def drop_sessions(db: sqlite3.Connection) -> None:
            nonlocal sessions
            sessions = Portion()
            purging.old_sessions(db, sessions, now=now, ttl_s=ttl_s, max_sessions=max_sessions)

        # One after the other, so that what others write has its turn in between.
        for step in (drop_entries, drop_sessions, purging.free_pages):
            writer.submit(step, urgent=True).wait(PURGE_TIMEOUT_S)
            if not times_are_right:
                return Purged(entries=0, sessions=0, more=True)
        opened = self._opened()
        if opened.known.is_full():
            opened.known.renew(_all_keys(self._some_keys))
        return Purged(entries=entries.rows, sessions=sessions.rows, more=entries.full or sessions.full)

    def _mind_the_file(self) -> None:
        """Somebody may have removed or replaced it, of which nothing that is open would notice, or may read in it without end."""
        opened, missing = self._opened(), self._file.missing()
        if not missing and not self._file.log_is_long():
            return
        if self._damage is not None or (self._minding is not None and self._minding.is_alive()):
            return

        def mind() -> None:
            # What fails is told by `trouble`, and tried again at the next purge.
            with contextlib.suppress(StoreError, sqlite3.Error):
                if missing:
                    opened.mend(missing)
                else:
                    opened.fold_log()

        # A thread of its own: a large file takes long, and whoever calls `purge` is watched.
        self._minding = threading.Thread(target=mind, name="state-file", daemon=True)
        self._minding.start()
        self._minding.join(PURGE_TIMEOUT_S)

    def _note_uses(self) -> None:
        """Some at a time, so that what others write has its turn in between."""
        opened, all_noted = self._opened(), False
        while not all_noted:
            write = opened.writer.submit(opened.uses.note, urgent=True)
            write.wait(PURGE_TIMEOUT_S)
            assert isinstance(write.result, int)
            all_noted = opened.uses.noted(write.result)

    def _some_keys(self, after: EntryKey | None) -> list[EntryKey]:
        with self._read() as db:
            return rows.keys(db, after=after, most=_KEYS_AT_ONCE)

    def clock_was_set(self, forward_s: float, *, now: float) -> Pending:
        self._note_uses()
        return self._opened().writer.submit(lambda db: journal_times.set_forward(db, forward_s, now), urgent=True)

    # --- connections ---------------------------------------------------------------------------------------------------

    def _opened(self) -> _Open:
        opened = self._open
        if opened is None:
            message = f"The store {self.path} is closed."
            raise StoreError(message)
        return opened

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._opened().reading() as db, self._translating():
            yield db

    @contextlib.contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> StoreError:
        if not isinstance(error, sqlite3.Error):
            return StoreError(f"{self.path} cannot hold this: {type(error).__name__}: {error}.")
        problem = translated(error, self.path)
        problem.__cause__ = error
        if self._file.suspect(error):
            self._damage = problem
        return problem


class _Open:
    """What an open store has: a connection that writes, in a thread of its own, and one that reads."""

    def __init__(
        self, file: StateFile | MemoryFile, explain: Callable[[Exception], StoreError], commit_times: Histogram
    ) -> None:
        self._file = file
        self._explain = explain
        self._connection = file.open(self._look)
        self._reader_lock = threading.Lock()
        self._reader: sqlite3.Connection | None = None
        try:
            self._reader = file.reader()
            self.writer = GroupCommit(
                self._connection, explain=explain, make_room=file.make_room, commit_times=commit_times
            )
        except BaseException:
            self._close_connections()
            raise

    def _look(self, connection: sqlite3.Connection) -> None:
        self.places = itertools.count(rows.last_place(connection) + 1)
        self.uses = SessionUses(connection)
        held_bytes.count(connection)
        self.known = KnownKeys(_all_keys(lambda after: rows.keys(connection, after=after, most=_KEYS_AT_ONCE)))

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._reader_lock:
            if self._reader is not None:
                yield self._reader
                return
        with self.writer.exclusive() as db:
            yield db

    def mend(self, missing: Missing) -> None:
        """Put what is missing at its path again, and go on there. Raises StoreError."""

        def go_on(old: sqlite3.Connection) -> sqlite3.Connection:
            if missing == "log":
                self._read_with(None)
            self._connection = self._file.mend(missing, old, held_bytes.count)
            if missing != "lock":
                self._read_with(None)  # whatever it knows has another place now
                with contextlib.suppress(StoreError):  # reads then take turns with writes
                    self._read_with(self._file.reader())
            return self._connection

        old = self._connection
        self.writer.replace(go_on)
        if old is not self._connection:
            with contextlib.suppress(sqlite3.Error):
                old.close()

    def fold_log(self) -> None:
        """Fold the log into the database and cut it, unless another program reads there."""
        with self.writer.exclusive() as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # which may take long, while our reads go on
            with self._reader_lock:
                self._file.cut_log(db)

    def _read_with(self, reader: sqlite3.Connection | None) -> None:
        with self._reader_lock:
            before, self._reader = self._reader, reader
            if before is not None:
                before.close()

    def close(self) -> None:
        if self.writer.close(CLOSE_TIMEOUT_S):
            with self._reader_lock:
                self._close_connections()
        else:
            log.error("store.close_failed", path=str(self._file.path), reason="the disk does not answer")

    def _close_connections(self) -> None:
        try:
            if self._reader is not None:
                self._reader.close()
            self._connection.close()
        except sqlite3.Error as error:
            # Nothing is lost: what was committed is in the log and is folded in at the next start.
            log.warning("store.close_failed", path=str(self._file.path), reason=str(error))
        finally:
            self._file.release()


def _all_keys(read: Callable[[EntryKey | None], list[EntryKey]]) -> Iterator[EntryKey]:
    """All keys, some at a time: `read` gives those that follow one."""
    last: EntryKey | None = None
    while page := read(last):
        yield from page
        last = page[-1]
