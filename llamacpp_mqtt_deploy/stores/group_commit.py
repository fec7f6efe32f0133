"""One thread that commits what many ask for: all that waits goes into one transaction, with one fsync."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from llamacpp_mqtt_deploy.core.histogram import COMMIT_BOUNDS_S, Histogram
from llamacpp_mqtt_deploy.latch import Latch
from llamacpp_mqtt_deploy.ports import StoreError

Step = Callable[[sqlite3.Connection], object]
"""What a write does inside a transaction. It may be rolled back and run once more."""

MAX_QUEUED = 4096
"""Most writes that wait for the disk; beyond it a new one is refused at once."""

MAX_QUEUED_BYTES = 64 * 1024 * 1024
"""Most bytes that wait for the disk, whatever the number of writes."""

URGENT_SHARE = 0.25
"""What of both is kept for urgent writes: a flood of new requests must not keep the ends of older ones out."""

MAX_BATCH = 256
"""Most writes of one transaction, so that the first need not wait for ever more."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Most bytes of one transaction: on an SD card half a second."""

PROBE_EVERY_S = 0.25
"""Seconds between two looks whether a program that locked the database has let go of it."""

_TRY_EVERY_S = 2.0
"""The same for a disk that failed: a look that writes."""

_LOG_PAGES = 1000
"""SQLite's own choice: the write-ahead log is folded into the database at 4 MiB."""

_SHORT_LOG_PAGES = 16

_DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PROTOCOL,
)
"""Errors that concern the whole batch; any other is that of one statement."""

_FOR_GOOD = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""One part of the file is damaged; that another can be written heals nothing."""

_LOCKS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

log = structlog.get_logger(__name__)


class Write:
    """A change of the database that was begun (see `ports.Pending`)."""

    def __init__(
        self, step: Step, *, size: int, durable: bool, urgent: bool, hurry: Callable[[], None] = lambda: None
    ) -> None:
        self.step = step
        self.hurry = hurry
        self.size = size
        self.durable = durable
        self.urgent = urgent
        self.result: object = None
        self.problem: StoreError | None = None
        self._lock = threading.Lock()
        self._over = Latch()
        self._callbacks: list[Callable[[StoreError | None], None]] = []

    def wait(self, timeout_s: float) -> None:
        if not self._over.is_set():
            self.hurry()
        if not self._over.wait(timeout_s):
            message = f"The disk has not taken a write for {timeout_s:g} s: look for disk errors (dmesg)."
            raise StoreError(message)
        if self.problem is not None:
            # A new one for each caller: an exception collects the stack of everybody who raises it.
            raise type(self.problem)(*self.problem.args) from self.problem.__cause__

    def done(self) -> bool:
        return self._over.is_set()

    def on_done(self, callback: Callable[[StoreError | None], None]) -> None:
        with self._lock:
            if not self._over.is_set():
                self._callbacks.append(callback)
                return
        callback(self.problem)

    def settle(self) -> None:
        """Committed, or failed with `problem`: wake who waits."""
        with self._lock:
            self._over.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self.problem)
            except Exception:
                # One caller's defect must not cost the others their journal.
                log.exception("journal.callback_failed")


class GroupCommit:
    """Commits writes in the order in which they were submitted, as many at once as are there.

    `explain` makes the error for the caller; `make_room` frees, once, what a full disk still has for urgent writes. The connection is nobody else's, except inside `exclusive`.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        explain: Callable[[Exception], StoreError],
        make_room: Callable[[], bool],
        commit_times: Histogram | None = None,
    ) -> None:
        self._connection = connection
        self._explain = explain
        self._make_room = make_room
        self.commit_times = commit_times or Histogram(COMMIT_BOUNDS_S)
        """Seconds that each transaction took which succeeded, fsync included."""
        self._connection_lock = threading.Lock()
        self._durable: bool | None = None
        self._short_of_room = False
        # Taken alone where nobody waits: a condition's own way to it is two calls longer.
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._queue: deque[Write] = deque()
        self._queued_bytes = 0
        self._locked_out: StoreError | None = None
        self.trouble: StoreError | None = None
        """What hinders all writes; None once one has succeeded again."""
        self._damaged = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def submit(
        self, step: Step, *, size: int = 0, durable: bool = False, urgent: bool = False, unhurried: bool = False
    ) -> Write:
        """Queue a write; raises StoreError at once when it cannot be taken. One that is `unhurried` goes with the next one."""
        write = Write(step, size=size, durable=durable, urgent=urgent, hurry=self._write_now)
        with self._lock:
            if self._closing:
                raise StoreError("The store is closed.")
            if self._locked_out is not None:
                raise StoreError(*self._locked_out.args)
            share = 1.0 if urgent else 1.0 - URGENT_SHARE
            if len(self._queue) >= MAX_QUEUED * share or (
                self._queue and self._queued_bytes + size > MAX_QUEUED_BYTES * share
            ):
                message = (
                    f"The disk is too slow: {len(self._queue)} writes ({self._queued_bytes} bytes) wait for it. Look for "
                    "disk errors (dmesg) and for other programs that write much."
                )
                raise StoreError(message)
            self._queue.append(write)
            self._queued_bytes += size
            if not unhurried:
                self._condition.notify()
        return write

    def _write_now(self) -> None:
        with self._lock:
            if self._queue:
                self._condition.notify()

    @contextmanager
    def exclusive(self) -> Iterator[sqlite3.Connection]:
        """The connection between two transactions."""
        with self._connection_lock:
            yield self._connection

    def replace(self, make: Callable[[sqlite3.Connection], sqlite3.Connection]) -> None:
        """Go on with the connection that `make` returns for the present one, between two transactions."""
        with self._connection_lock:
            self._connection = make(self._connection)
            self._durable = None

    def close(self, timeout_s: float) -> bool:
        """Commit what waits, then end the thread; False when the disk did not let it end in time."""
        with self._lock:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._queue and not self._closing:
                    self._condition.wait(self._look_again_s())
                batch = self._take()
            if batch:
                self._commit(batch)
            elif self._closing:
                return
            elif self._locked_out is not None:
                self._probe()
            elif self.trouble is not None:
                self._try()

    def _look_again_s(self) -> float | None:
        """Seconds until the next look whether writes succeed again, where there is nothing to write."""
        if self._locked_out is not None:
            return PROBE_EVERY_S
        return _TRY_EVERY_S if self.trouble is not None else None

    def _take(self) -> list[Write]:
        batch: list[Write] = []
        size = 0
        while self._queue and len(batch) < MAX_BATCH:
            if batch and size + self._queue[0].size > MAX_BATCH_BYTES:
                break
            write = self._queue.popleft()
            self._queued_bytes -= write.size
            size += write.size
            batch.append(write)
        return batch

    def _commit(self, batch: Sequence[Write]) -> None:
        over = list(batch)
        try:
            self._transaction(batch)
        except Exception as error:  # noqa: BLE001  the thread goes on, and who waits is told
            over += self._failed(batch, error)
        for write in over:
            write.settle()

    def _transaction(self, batch: Sequence[Write]) -> None:
        durable = any(write.durable for write in batch)
        with self._connection_lock:
            db = self._connection
            if durable != self._durable:
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            if self._short_of_room and not all(write.urgent for write in batch):
                db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}").fetchall()
                self._short_of_room = False
            changes = db.total_changes
            began = time.monotonic()
            db.execute("BEGIN IMMEDIATE")
            try:
                self._steps(db, batch)
                db.execute("COMMIT")
            except BaseException:
                # A full disk has rolled back by itself.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            self.commit_times.observe(time.monotonic() - began)
            if db.total_changes > changes:
                self._well_again()

    def _steps(self, db: sqlite3.Connection, batch: Sequence[Write]) -> None:
        """All writes of a transaction, each with a savepoint only when one of them turns out to need it: two statements more."""
        try:
            for write in batch:
                write.result = write.step(db)
        except Exception as error:
            if len(batch) == 1 or not db.in_transaction or _code(error) in _DISK:
                raise
            db.execute("ROLLBACK")
            db.execute("BEGIN IMMEDIATE")
            for write in batch:
                self._step(db, write)

    def _step(self, db: sqlite3.Connection, write: Write) -> None:
        """One write of several in a transaction; what is wrong with it alone costs the others nothing."""
        db.execute("SAVEPOINT one_write")
        try:
            write.result = write.step(db)
        except Exception as error:
            if not db.in_transaction or _code(error) in _DISK:
                raise
            db.execute("ROLLBACK TO one_write")
            write.problem = self._explain(error)
        db.execute("RELEASE one_write")

    def _failed(self, batch: Sequence[Write], error: Exception) -> list[Write]:
        """Give each write of the batch its problem; returns the waiting ones that fail with it."""
        if _code(error) == sqlite3.SQLITE_FULL:
            self._one_by_one(batch)
            return []
        problem = self._explain(error)
        if _code(error) in _DISK:
            self._hindered(error, problem)
        waiting: list[Write] = []
        if _code(error) in _LOCKS:
            log.error("store.locked", problem=str(problem))
            # Each of them would wait as long as this one did, and their callers with them.
            with self._lock:
                self._locked_out = problem
                waiting, self._queue, self._queued_bytes = list(self._queue), deque(), 0
        for write in (*batch, *waiting):
            write.problem = write.problem or problem
        return waiting

    def _one_by_one(self, batch: Sequence[Write]) -> None:
        """On a full disk: a large write may have been too much where the small ones find a place."""
        for write in batch:
            if write.problem is not None:
                continue
            error = self._alone(write)
            if error is not None and write.urgent:
                self._free_room()
                error = self._alone(write)
            if error is not None:
                write.problem = self._explain(error)
                self._hindered(error, write.problem)

    def _alone(self, write: Write) -> Exception | None:
        try:
            self._transaction([write])
        except Exception as error:  # noqa: BLE001  told to who waits
            return error
        return None

    def _free_room(self) -> None:
        if self._make_room():
            log.error(
                "store.reserve_given_up", reason="the disk is full", refused="new requests, until there is room again"
            )
        with self._connection_lock, contextlib.suppress(sqlite3.Error):
            # A short log: it would take all that was freed, and leave none for the database that it has to move into.
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {_SHORT_LOG_PAGES}").fetchall()
            self._short_of_room = True
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _probe(self) -> None:
        with self._connection_lock:
            db = self._connection
            timeout_ms = db.execute("PRAGMA busy_timeout").fetchone()[0]
            try:
                db.execute("PRAGMA busy_timeout = 0")
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
            except sqlite3.Error:
                return
            finally:
                db.execute(f"PRAGMA busy_timeout = {timeout_ms}")
        with self._lock:
            self._locked_out = None
        log.info("store.unlocked_again")
        self._well_again()

    def _try(self) -> None:
        """Write what is there already: a read-only disk begins and ends a transaction without changes as if it could."""
        with self._connection_lock, contextlib.suppress(sqlite3.Error):
            db = self._connection
            version = db.execute("PRAGMA user_version").fetchone()[0]
            db.execute(f"PRAGMA user_version = {version}").fetchall()
            self._well_again()

    def _hindered(self, error: Exception, problem: StoreError) -> None:
        if self.trouble is None or not self._damaged:
            self.trouble, self._damaged = problem, _code(error) in _FOR_GOOD

    def _well_again(self) -> None:
        if not self._damaged:
            self.trouble = None


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
