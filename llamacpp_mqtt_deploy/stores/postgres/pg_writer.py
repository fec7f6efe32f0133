"""One thread with one connection that writes what many ask for: all that waits goes into one transaction, mostly one round trip.

The connection may break at any point. Each transaction leaves its number in the table `writers`: after a COMMIT without an
answer the next connection looks there whether it happened, before anybody is told. (The state of a transaction id would not
do: a server that crashed before it wrote the id to its log gives the same one to another transaction.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import psycopg
import structlog
from psycopg import errors

from llamacpp_mqtt_deploy.core.histogram import COMMIT_BOUNDS_S, Histogram
from llamacpp_mqtt_deploy.ports import StoreAway, StoreError
from llamacpp_mqtt_deploy.stores.group_commit import (
    MAX_BATCH,
    MAX_BATCH_BYTES,
    MAX_QUEUED,
    MAX_QUEUED_BYTES,
    URGENT_SHARE,
)
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database, concerns_all
from llamacpp_mqtt_deploy.stores.postgres.pg_steps import PgStep, PgWrite

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Pauses between two attempts to reconnect."""

TRY_EVERY_S = 2.0
"""Seconds between two looks whether a database that refused everything takes writes again."""

_TRIES = 4
_AGAIN_WITHIN_S = 8.0
"""For how long a transaction that was undone is tried again; who waits for it does so for half a minute."""

_LOCK_TRIES_S = 3.0

log = structlog.get_logger(__name__)


class _Unknown(Exception):
    """The transaction may be committed, and its answers are lost."""


class PgWriter:
    """Commits writes in the order in which they were submitted, as many at once as are there; reconnects for ever.

    `claim_schema` runs on each new connection, before anything else is written with it.
    """

    def __init__(
        self,
        database: Database,
        *,
        claim_schema: Callable[[BoundedConnection], None],
        commit_times: Histogram | None = None,
    ) -> None:
        self._database = database
        self._commit_times = commit_times or Histogram(COMMIT_BOUNDS_S)
        self._claim_schema = claim_schema
        self._condition = threading.Condition()
        self._queue: deque[PgWrite] = deque()
        self._queued_bytes = 0
        self._closing = False
        self._number = 0
        self._rollbacks = 0
        self._old_pid: int | None = None
        self._notices: list[tuple[str, str]] = []
        self.away: StoreError | None = None
        """Why there is no connection."""
        self.trouble: StoreError | None = None
        """What hinders all writes; None once one has succeeded again."""
        self.connections = 0
        """How many there were so far."""
        self._db: BoundedConnection | None = None
        self._connect()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def submit(
        self,
        step: PgStep,
        *,
        size: int = 0,
        durable: bool = False,
        urgent: bool = False,
        serial: bool = False,
        alone: bool = False,
    ) -> PgWrite:
        """Queue a write; raises StoreError at once when it cannot be taken."""
        write = PgWrite(step, size=size, durable=durable, urgent=urgent, serial=serial, alone=alone)
        with self._condition:
            if self._closing:
                raise StoreError("The store is closed.")
            if self.away is not None:
                raise type(self.away)(*self.away.args)
            share = 1.0 if urgent else 1.0 - URGENT_SHARE
            if len(self._queue) >= MAX_QUEUED * share or (
                self._queue and self._queued_bytes + size > MAX_QUEUED_BYTES * share
            ):
                raise StoreError(
                    f"The database is too slow: {len(self._queue)} writes ({self._queued_bytes} bytes) wait for it. Look at "
                    "its load and at its disk."
                )
            self._queue.append(write)
            self._queued_bytes += size
            self._condition.notify()
        return write

    def check_present(self) -> None:
        """Raises StoreError while there is no connection."""
        away = self.away
        if away is not None:
            raise type(away)(*away.args)

    def after_commit(self, channel: str, notice: str) -> None:
        """For a step: send this notice once the transaction is committed; it is lost where the connection is."""
        if (channel, notice) not in self._notices:
            self._notices.append((channel, notice))

    def close(self, timeout_s: float) -> bool:
        """Commit what waits, then end the thread and its connection; False when the database did not let it end in time."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._condition:
                    if not self._queue and not self._closing:
                        self._condition.wait(TRY_EVERY_S if self.trouble else None)
                    batch, closing = self._take(), self._closing
                if batch:
                    self._commit(batch)
                elif closing:
                    return
                elif self.trouble is not None:
                    self._try()
                if self.away is not None:
                    self._come_back()
        finally:
            self._disconnect()

    def _take(self) -> list[PgWrite]:
        batch: list[PgWrite] = []
        size = 0
        while self._queue and len(batch) < MAX_BATCH:
            following = self._queue[0]
            # Nothing else is done while the queue is locked for all workers.
            if batch and (
                size + following.size > MAX_BATCH_BYTES
                or following.serial != batch[0].serial
                or following.alone
                or batch[0].alone
            ):
                break
            write = self._queue.popleft()
            self._queued_bytes -= write.size
            size += write.size
            batch.append(write)
        return batch

    def _commit(self, batch: Sequence[PgWrite]) -> None:
        over: list[PgWrite] = list(batch)
        try:
            problem = self._until_known(batch)
        except Exception as error:  # noqa: BLE001  the thread goes on, and who waits is told
            problem = self._database.explained(error)
        if problem is not None:
            self._notices.clear()
            over += self._failed(batch, problem)
        notices, self._notices = self._notices, []
        for write in over:
            write.settle()
        self._notify(notices)

    def _until_known(self, batch: Sequence[PgWrite]) -> StoreError | None:
        """Write them all; returns why none of them was written. Each has its own problem where that is its alone."""
        ends_at = time.monotonic() + _AGAIN_WITHIN_S
        careful = False
        tries = 0
        while True:
            tries += 1
            self._notices.clear()
            try:
                self._transaction(batch, careful=careful)
            except _Unknown as unknown:
                happened = self._look_whether_it_happened(batch)
                if happened:
                    self._well_again()
                    return None
                error: BaseException | None = unknown.__cause__
                undone = happened is not None
            except Exception as problem:  # noqa: BLE001  looked at below
                error, undone = problem, False
            else:
                self._well_again()
                return None
            assert isinstance(error, Exception)
            log.info("store.transaction_again", reason=" ".join(str(error).split()), tries=tries)
            last = tries >= _TRIES or time.monotonic() > ends_at
            if undone:
                if last:
                    return self._database.explained(error)
            elif self._is_lost() or isinstance(error, errors.ReadOnlySqlTransaction):
                if last or self._closed_while_away() or not self._reconnect(error):
                    return self.away or self._database.explained(error)
            elif isinstance(error, errors.DeadlockDetected | errors.SerializationFailure):
                if last:
                    return self._database.explained(error)
            elif careful or (concerns_all(error) and not _waited_for_a_lock(error)):
                self.trouble = self._database.explained(error)
                return self.trouble
            else:
                careful = True

    def _transaction(self, batch: Sequence[PgWrite], *, careful: bool) -> None:
        """Raises _Unknown when it is not known whether it was committed."""
        for write in batch:
            write.forget_result()
        db = self._connection()
        committing = False
        began = time.monotonic()
        try:
            if careful:
                self._begin(db, batch)
                self._one_by_one(db, batch)
                self._sign(db)
                committing = True
                self._end(db, batch)
            else:
                with db.pipeline():
                    self._begin(db, batch)
                    for write in batch:
                        write.run(db)
                    self._sign(db)
                    committing = True
                    self._end(db, batch)
                    for write in batch:
                        write.read_result()
        except Exception as error:
            if not self._is_lost():
                self._roll_back(db)
            # A statement that fails keeps COMMIT from being executed, but not all that goes wrong is a statement: a server that ends
            # the connection right after its COMMIT leaves it looking alive, with an answer of another kind.
            if committing and not self._is_undone():
                raise _Unknown from error
            raise
        self._commit_times.observe(time.monotonic() - began)

    def _begin(self, db: BoundedConnection, batch: Sequence[PgWrite]) -> None:
        db.execute("BEGIN")
        if batch[0].serial or not any(write.durable for write in batch):
            db.execute("SET LOCAL synchronous_commit = off")
        if batch[0].serial:
            # Before any row is locked: so whoever waits here holds nothing that the one before him needs.
            db.execute("SELECT pg_advisory_xact_lock(%s)", (self._database.lock_key("queue"),))

    def _end(self, db: BoundedConnection, batch: Sequence[PgWrite]) -> None:
        db.execute("COMMIT")
        if batch[0].serial and any(write.durable for write in batch):
            # Another commit, which waits for the disk with all before it: the lock is free meanwhile.
            db.execute("UPDATE writers SET since = clock_timestamp() WHERE name = %s", (self._database.name,))

    def _sign(self, db: BoundedConnection) -> None:
        self._number += 1
        db.execute("UPDATE writers SET number = %s WHERE name = %s", (self._number, self._database.name))

    def _one_by_one(self, db: BoundedConnection, batch: Sequence[PgWrite]) -> None:
        """What is wrong with one write alone costs the others nothing."""
        waited_for_locks = 0
        for write in batch:
            db.execute("SAVEPOINT one_write")
            notices = len(self._notices)
            try:
                write.run(db)
                write.read_result()
                if write.problem is not None:
                    raise write.problem
            except Exception as error:
                waited_for_locks += _waited_for_a_lock(error)
                # Each of them may wait as long as this one did, and their callers with them.
                if self._is_lost() or waited_for_locks > 1 or (concerns_all(error) and not _waited_for_a_lock(error)):
                    raise
                del self._notices[notices:]
                db.execute("ROLLBACK TO one_write")
                write.problem = self._database.explained(error)
            db.execute("RELEASE one_write")

    def _roll_back(self, db: BoundedConnection) -> None:
        # Another text each time: psycopg forgets then which statements it believes to have prepared. Those that came after the one
        # that failed were not.
        self._rollbacks += 1
        try:
            db.execute(f"ROLLBACK /* {self._rollbacks} */".encode())
        except psycopg.Error:
            self._disconnect()

    def _is_undone(self) -> bool:
        """Whether the transaction that was signed last is known not to be committed."""
        try:
            return not self._is_lost() and not self._is_signed(self._connection())
        except (StoreError, psycopg.Error):
            self._disconnect()
            return False

    def _is_signed(self, db: BoundedConnection) -> bool:
        """Whether the transaction that was signed last is committed; waits until no other connection works on it."""
        row = db.execute("SELECT number FROM writers WHERE name = %s FOR UPDATE", (self._database.name,)).fetchone()
        return row is not None and row[0] == self._number

    def _failed(self, batch: Sequence[PgWrite], problem: StoreError) -> list[PgWrite]:
        """Give each write of the batch its problem; returns the waiting ones that fail with it."""
        waiting: list[PgWrite] = []
        if self.away is not None:
            with self._condition:
                waiting, self._queue, self._queued_bytes = list(self._queue), deque(), 0
        for write in (*batch, *waiting):
            write.problem = write.problem or problem
        return waiting

    def _notify(self, notices: Sequence[tuple[str, str]]) -> None:
        """In a transaction of its own that waits for no disk: the database lets one transaction with notices commit at a time."""
        if not notices or self._db is None:
            return
        try:
            with self._db.pipeline():
                self._db.execute("BEGIN")
                self._db.execute("SET LOCAL synchronous_commit = off")
                for channel, notice in notices:
                    self._db.execute("SELECT pg_notify(%s, %s)", (channel, notice))
                self._db.execute("COMMIT")
        except psycopg.Error as error:
            log.info("store.notice_lost", reason=" ".join(str(error).split()))
            if not self._is_lost():
                self._roll_back(self._db)

    def _try(self) -> None:
        try:
            db = self._connection()
            self._sign(db)
        except (StoreError, psycopg.Error) as error:
            if self._is_lost():
                self._reconnect(error)
        else:
            self._well_again()

    def _well_again(self) -> None:
        if self.trouble is not None:
            log.info("store.writes_again")
        self.trouble = None

    # --- the connection ------------------------------------------------------------------------------------------------

    def _connection(self) -> BoundedConnection:
        if self._db is None:
            self._connect()
        assert self._db is not None
        return self._db

    def _is_lost(self) -> bool:
        return self._db is None or self._db.closed

    def _connect(self) -> None:
        """Raises StoreError."""
        db = self._database.connect()
        try:
            self._end_my_last_connection(db)
            self._claim_schema(db)
            db.execute(
                "INSERT INTO writers (name, number) VALUES (%s, 0) ON CONFLICT (name) DO NOTHING",
                (self._database.name,),
            )
        except BaseException as error:
            db.close()
            if isinstance(error, psycopg.Error):
                raise self._database.explained(error) from error
            raise
        self._db, self._old_pid = db, db.info.backend_pid
        self.connections += 1
        with self._condition:
            self.away = None

    def _end_my_last_connection(self, db: BoundedConnection) -> None:
        """The server may not know yet that it is lost, and holds its locks."""
        ends_at = time.monotonic() + _LOCK_TRIES_S
        while self._old_pid is not None and time.monotonic() < ends_at:
            left = db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %s AND application_name = %s "
                "AND pid <> pg_backend_pid()",
                (self._old_pid, self._database.name),
            ).fetchall()
            if not left:
                break
            time.sleep(0.02)

    def _reconnect(self, error: Exception) -> bool:
        """Try once, now; False when the database is away."""
        self._disconnect()
        try:
            self._connect()
        except StoreError as problem:
            self._is_away(problem)
            return False
        log.info("store.reconnected", reason=" ".join(str(error).split()))
        return True

    def _is_away(self, problem: StoreError) -> None:
        if self.away is None:
            log.error("store.away", problem=str(problem))
        with self._condition:
            self.away = self.trouble = problem

    def _come_back(self) -> None:
        """Until there is a connection again, or the store is closed."""
        pause_s = FIRST_PAUSE_S
        while self.away is not None:
            with self._condition:
                if self._closing or self._condition.wait_for(lambda: self._closing, pause_s):
                    return
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
            try:
                self._connect()
            except StoreError as problem:
                self._is_away(problem)
            else:
                log.info("store.back")
                self._well_again()

    def _look_whether_it_happened(self, batch: Sequence[PgWrite]) -> bool | None:
        """Whether the last transaction, of these, was committed; waits until that and all results are known. None when the store is
        closed before."""
        self._is_away(StoreAway(f"{self._database.shown} was lost in the middle of a write."))
        while True:
            self._disconnect()
            self._come_back()
            if self.away is not None:
                return None
            try:
                found = self._is_signed(self._connection())
                if found:
                    for write in batch:
                        write.ask_again(self._connection())
            except (StoreError, psycopg.Error) as error:
                self._is_away(self._database.explained(error))
                continue
            log.info("store.outcome_known", committed=found)
            return found

    def _closed_while_away(self) -> bool:
        return self._closing and self.away is not None

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _waited_for_a_lock(error: Exception) -> bool:
    return isinstance(error, errors.LockNotAvailable | errors.QueryCanceled)
