"""The store on PostgreSQL for the workers of a pool: one journal, one queue, and each write with the fence of who writes it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.pool_ports import (
    Cancelled,
    Claimed,
    Enqueued,
    LeaseLost,
    Member,
    MemberSeen,
    Notice,
    NoticeKind,
    PoolLoad,
    PoolRequest,
    Renewed,
)
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, Pending, Purged, StoreError, ToldEnd
from llamacpp_mqtt_deploy.stores.bounds import MAX_HISTORY_BYTES, MAX_JOURNAL_BYTES
from llamacpp_mqtt_deploy.stores.postgres import cancelling, fenced_entries
from llamacpp_mqtt_deploy.stores.postgres import pg_claiming as claiming
from llamacpp_mqtt_deploy.stores.postgres import pg_ends as ends
from llamacpp_mqtt_deploy.stores.postgres import pg_entries as rows
from llamacpp_mqtt_deploy.stores.postgres import pg_members as membership
from llamacpp_mqtt_deploy.stores.postgres import pg_notices as listening
from llamacpp_mqtt_deploy.stores.postgres import pg_sessions as sessions
from llamacpp_mqtt_deploy.stores.postgres import queue_counts as counts
from llamacpp_mqtt_deploy.stores.postgres.common_queue import Enqueuing, places_of
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database
from llamacpp_mqtt_deploy.stores.postgres.pg_ends import RequestEnd
from llamacpp_mqtt_deploy.stores.postgres.pg_notices import Listener
from llamacpp_mqtt_deploy.stores.postgres.pg_steps import Later, PgWrite
from llamacpp_mqtt_deploy.stores.postgres.pg_writer import PgWriter
from llamacpp_mqtt_deploy.stores.postgres.postgres_store import (
    CLOSE_TIMEOUT_S,
    PURGE_TIMEOUT_S,
    WRITE_TIMEOUT_S,
    PostgresStore,
)

_Result = TypeVar("_Result")
_DEFAULT_AGING_S = 30.0

log = structlog.get_logger(__name__)


class SharedPostgresJournal(PostgresStore):
    """Satisfies `pool_ports.SharedJournal`. Every worker of the pool has one, on the same schema of the same database."""

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float,
        aside: Path | None = None,
        max_history_bytes: int = MAX_HISTORY_BYTES,
    ) -> None:
        super().__init__(database, aside=aside, max_history_bytes=max_history_bytes)
        self._lease_s = lease_s
        self._fence: int | None = None
        self._worker_id = ""
        self._aging_s = _DEFAULT_AGING_S
        self._listener: Listener | None = None
        self._listener_lock = threading.Lock()
        self._leads_on = 0
        """The connection of the writer on which this worker became the one that leads."""

    def _opened(self, writer: PgWriter) -> None:
        """What was set aside is taken in when this worker joins."""

    def _close(self) -> None:
        with self._listener_lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.close(CLOSE_TIMEOUT_S)
        super()._close()

    def _claim_schema(self, db: BoundedConnection) -> None:
        self._lock_schema(db, "SELECT pg_try_advisory_lock_shared(%s)")

    # --- the journal, fenced -------------------------------------------------------------------------------------------

    def accept_soon(self, entries: Sequence[Entry], *, unhurried: bool = False) -> Pending:
        taken, fence = tuple(entries), self._own_fence()

        def step(db: BoundedConnection) -> None:
            membership.hold_membership(db, fence)()
            for entry in taken:
                fenced_entries.accept(db, entry, fence)

        size = sum(len(entry.payload) for entry in taken)
        return self._write().submit(step, size=size, durable=True, serial=True)

    def mark_started(self, key: EntryKey) -> int:
        fence = self._own_fence()

        def step(db: BoundedConnection) -> Later:
            counted = fenced_entries.count_start(db, key, fence)
            return Later(counted, again=lambda db: fenced_entries.starts(db, key, fence))

        return self._ask(step, int)

    def mark_streaming_soon(self, key: EntryKey) -> Pending:
        fence = self._own_fence()

        def step(db: BoundedConnection) -> Later:
            told = fenced_entries.set_streaming(db, key, fence)
            return Later(told, again=lambda db: fenced_entries.check_streaming(db, key, fence))

        return self._write().submit(step, durable=True, urgent=True)

    def _request_end(self, told: ToldEnd) -> RequestEnd:
        return replace(super()._request_end(told), now=None, part=self._worker_id)

    def _end(self, db: BoundedConnection, request: RequestEnd) -> Later:
        return self._end_as(self._own_fence(), db, request)

    def _end_as(self, fence: int, db: BoundedConnection, request: RequestEnd) -> Later:
        found = ends.end(db, request, fence=fence, on_next=self._wake)

        def read() -> None:
            if found() not in ("unfinished", "ended_here"):
                raise membership.lost()

        def again(db: BoundedConnection) -> None:
            self._wake()  # whether a later prompt of the session waits was in the answer
            if not ends.ended_by(db, request.key, fence):
                raise membership.lost()

        return Later(read, again)

    def unfinished(self) -> list[Entry]:
        fence = self._fence
        with self._read() as db:
            return [] if fence is None else fenced_entries.unfinished(db, fence)

    def undelivered(self) -> list[Entry]:
        fence = self._fence
        with self._read() as db:
            return [] if fence is None else fenced_entries.undelivered(db, fence)

    def _time(self, db: BoundedConnection, now: float) -> float:
        row = db.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone()
        return now if row is None else float(row[0])

    def begun_sessions(self, route: str, *, age_s: float) -> tuple[str, ...]:
        with self._read() as db:
            return sessions.begun_in_pool(db, route, age_s=age_s)

    def clock_was_set(self, forward_s: float, *, now: float) -> Pending:
        """Writes nothing: what is kept here bears the time of the database."""
        return self._submit(lambda _: None)

    def purge(
        self,
        *,
        now: float,
        remember_s: float,
        ttl_s: float,
        max_sessions: int,
        max_bytes: int = MAX_JOURNAL_BYTES,
    ) -> Purged:
        purged = super().purge(
            now=now, remember_s=remember_s, ttl_s=ttl_s, max_sessions=max_sessions, max_bytes=max_bytes
        )
        self._submit(counts.tidy, serial=True).wait(PURGE_TIMEOUT_S)
        return purged

    # --- membership ----------------------------------------------------------------------------------------------------

    def join(self, member: Member) -> int:
        told = [] if self._aside is None else self._aside.read()

        def step(db: BoundedConnection) -> int:
            fence = membership.join(db, member, self._lease_s)
            counts.recount(db)
            for end in told:
                if self._take_back(db, end.key, member.worker_id, fence):
                    self._end_as(fence, db, self._request_end(end)).read()
            return fence

        fence = self._ask(step, int, durable=True, serial=True)
        self._fence, self._worker_id = fence, member.worker_id
        self.clear_aside()
        with self._listener_lock:
            if self._listener is not None:
                self._listener.also([self._database.channel(member.worker_id)])
        return fence

    def _take_back(self, db: BoundedConnection, key: EntryKey, worker_id: str, fence: int) -> bool:
        """Whether the request was this worker's in an earlier life and nobody has taken it over."""
        mine = db.execute(
            "UPDATE queue SET owner = %s FROM members m WHERE m.fence = queue.owner AND m.worker_id = %s "
            "AND route = %s AND session = %s AND request_id = %s RETURNING queue.id",
            (fence, worker_id, *rows.named(key)),
        ).fetchone()  # not `rowcount`: within a pipeline that is -1
        return mine is not None

    def update(self, member: Member) -> None:
        fence = self._own_fence()

        def step(db: BoundedConnection) -> None:
            membership.update(db, fence, member)
            self._wake()

        # Nobody would say it again: a crash that forgets it leaves a worker that drains with new requests.
        self._do(step, durable=True)

    def renew(self) -> Renewed:
        fence = self._own_fence()
        counted = True

        def step(db: BoundedConnection) -> list[tuple[EntryKey, str]]:
            nonlocal counted
            asked = membership.renew(db, fence, self._lease_s)
            counted = counts.keep_counting(db)
            return asked

        asked = self._ask(step, list, timeout_s=min(WRITE_TIMEOUT_S, self._lease_s))
        if not counted:
            self._submit(counts.recount, serial=True).wait(WRITE_TIMEOUT_S)
        return Renewed(
            cancelled=tuple(key for key, what in asked if what == "cancelled"),
            forgotten=tuple(key for key, what in asked if what == "forgotten"),
        )

    def leave(self) -> None:
        fence, self._fence = self._fence, None
        if fence is None:
            return

        def step(db: BoundedConnection) -> None:
            membership.leave(db, fence)
            self._wake()

        try:
            self._do(step, durable=True)
        except StoreError as problem:
            log.warning("pool.left_without_word", problem=str(problem), what_follows="the lease runs out")

    def overdue(self) -> list[MemberSeen]:
        fence = self._own_fence()
        with self._read() as db:
            return membership.overdue(db, fence, self._lease_s)

    def take_over(self, fence: int) -> list[Claimed]:
        mine = self._own_fence()

        def step(db: BoundedConnection) -> list[Claimed]:
            membership.hold_membership(db, mine)()
            if not membership.end_overdue(db, mine, fence, self._lease_s):
                return []
            found = membership.inherit(db, mine, fence)
            if found.waiting:
                self._wake()
            return [*fenced_entries.claimed(db, found.to_end)(), *fenced_entries.to_deliver(db, found.to_deliver)]

        return self._claims(step, durable=True)

    def load(self) -> PoolLoad:
        with self._read() as db:
            return membership.load(db)

    def lead(self) -> bool:
        writer = self._writer
        if writer is None or writer.away is not None:
            return False
        if self._leads_on == writer.connections:
            return True

        def step(db: BoundedConnection) -> int:
            row = db.execute("SELECT pg_try_advisory_lock(%s)", (self._database.lock_key("lead"),)).fetchone()
            return writer.connections if row is not None and row[0] else 0

        try:
            self._leads_on = self._ask(step, int)
        except StoreError:
            self._leads_on = 0
        return self._leads_on == writer.connections

    # --- the queue -------------------------------------------------------------------------------------------------------

    def enqueue(
        self, requests: Sequence[PoolRequest], *, limits: QueueLimits, retry_after_s: float, aging_s: float
    ) -> tuple[list[Enqueued], list[Claimed]]:
        taken, fence = tuple(requests), self._own_fence()
        self._aging_s = aging_s

        def step(db: BoundedConnection) -> Later:
            call = Enqueuing(db, fence, limits=limits, retry_after_s=retry_after_s, aging_s=aging_s)
            call.run(taken)
            self._wake()
            leaving = fenced_entries.claimed(db, call.leaving)
            return Later(
                lambda: (call.told(), leaving()),
                again=lambda db: (
                    call.told(with_places=False),
                    fenced_entries.still_claimed(db, call.leaving, fence),
                ),
            )

        size = sum(len(request.entry.payload) for request in taken)
        return self._ask(step, tuple, size=size, durable=True, serial=True, urgent=False)

    def claim(self, free: int, *, models: Sequence[str], aging_s: float, prefer_for_s: float) -> list[Claimed]:
        fence, served = self._own_fence(), tuple(models)

        wishes = claiming.Wishes(
            fence=fence, worker_id=self._worker_id, models=served, aging_s=aging_s, prefer_for_s=prefer_for_s
        )

        unsummed = 0

        def step(db: BoundedConnection) -> list[Claimed] | Later:
            nonlocal unsummed
            # All questions are on their way before the first answer is read.
            counts.prefer_indexes(db)
            held = membership.hold_membership(db, fence)
            lives, draining = held()
            if draining or not lives:
                return []
            ends, turn = claiming.take_ends(db, fence), claiming.TurnTaking(db, free, wishes)
            taken = [*ends(), *turn.take()]
            unsummed = turn.unsummed
            return Later(
                fenced_entries.claimed(db, taken), again=lambda db: fenced_entries.still_claimed(db, taken, fence)
            )

        claimed = self._claims(step)
        if unsummed > counts.FOLD_ABOVE:
            with contextlib.suppress(StoreError):  # the next claim sees to it
                self._submit(counts.fold_alone, serial=True)
        return claimed

    def release(self, keys: Sequence[EntryKey]) -> None:
        taken, fence = tuple(keys), self._own_fence()

        def step(db: BoundedConnection) -> None:
            if cancelling.release(db, fence, taken):
                self._wake()

        self._do(step)

    def cancel(
        self, session: tuple[str, str], request_id: str | None, *, forget: bool = False, remember_s: float = 60.0
    ) -> Cancelled:
        fence = self._own_fence()

        def step(db: BoundedConnection) -> Cancelled:
            membership.hold_membership(db, fence)()
            found = cancelling.cancel(
                db, fence, session, request_id, forget=forget, remember_s=remember_s, tell=self._tell
            )
            return Cancelled(
                claimed=tuple(fenced_entries.claimed(db, found.claimed)()),
                running_here=tuple(found.here),
                running_elsewhere=found.elsewhere,
                ended=found.ended,
            )

        # In turn with `enqueue`, so that a cancel and the request that it is for do not miss each other.
        return self._ask(step, Cancelled, durable=True, serial=True)

    def hold_session(self, session: tuple[str, str], *, hold_s: float) -> None:
        fence = self._own_fence()
        self._do(lambda db: cancelling.hold(db, fence, session, hold_s))

    def free_session(self, session: tuple[str, str]) -> None:
        def step(db: BoundedConnection) -> None:
            cancelling.free(db, session)
            self._wake()

        self._do(step)

    def running_in(self, session: tuple[str, str]) -> int:
        with self._read() as db:
            return cancelling.running_in(db, session)

    def ask_snapshot(self, key: EntryKey) -> bool:
        def step(db: BoundedConnection) -> bool:
            runner = cancelling.runner_of(db, key)
            if runner is not None:
                self._tell(runner, "snapshot", key)
            return runner is not None

        return self._ask(step, bool)

    def watched(self, keys: Sequence[EntryKey]) -> Mapping[EntryKey, int]:
        with self._read() as db:
            return places_of(db, keys, aging_s=self._aging_s)

    # --- notices -------------------------------------------------------------------------------------------------------

    def listen(self, on_notice: Callable[[Notice], None]) -> None:
        listener = Listener(self._database, on_notice)
        channels = [self._database.channel()]
        if self._worker_id:
            channels.append(self._database.channel(self._worker_id))
        with self._listener_lock:
            old, self._listener = self._listener, listener
            listener.start(channels)
        if old is not None:
            old.close(CLOSE_TIMEOUT_S)

    def _wake(self) -> None:
        """In a step: something may be claimed."""
        notice = listening.written("work")
        assert notice is not None
        self._write().after_commit(self._database.channel(), notice)

    def _tell(self, worker_id: str, kind: NoticeKind, key: EntryKey) -> None:
        notice = listening.written(kind, key)
        if notice is not None:
            self._write().after_commit(self._database.channel(worker_id), notice)

    # --- writing -------------------------------------------------------------------------------------------------------

    def _own_fence(self) -> int:
        fence = self._fence
        if fence is None:
            raise LeaseLost("This worker is no member of the pool: it has not joined, or has left.")
        return fence

    def _submit(
        self,
        step: Callable[[BoundedConnection], object | Later],
        *,
        size: int = 0,
        durable: bool = False,
        serial: bool = False,
        urgent: bool = True,
    ) -> PgWrite:
        return self._write().submit(step, size=size, durable=durable, urgent=urgent, serial=serial)

    def _do(self, step: Callable[[BoundedConnection], object | Later], *, durable: bool = False) -> None:
        """Write and wait."""
        self._submit(step, durable=durable).wait(WRITE_TIMEOUT_S)

    def _ask(
        self,
        step: Callable[[BoundedConnection], object | Later],
        kind: type[_Result],
        *,
        timeout_s: float = WRITE_TIMEOUT_S,
        size: int = 0,
        durable: bool = False,
        serial: bool = False,
        urgent: bool = True,
    ) -> _Result:
        """Write and wait; returns what the step says."""
        write = self._submit(step, size=size, durable=durable, serial=serial, urgent=urgent)
        write.wait(timeout_s)
        assert isinstance(write.result, kind)
        return write.result

    def _claims(
        self, step: Callable[[BoundedConnection], list[Claimed] | Later], *, durable: bool = False
    ) -> list[Claimed]:
        write = self._write().submit(step, durable=durable, urgent=True, alone=True)

        def give_back(problem: StoreError | None) -> None:
            """Nobody waits for these any more: another claim is to find them."""
            if problem is None and write.given_up and isinstance(write.result, list) and self._fence is not None:
                fence, keys = self._fence, [claimed.entry.key for claimed in write.result]
                self._submit(lambda db: cancelling.release(db, fence, keys))

        try:
            write.wait(WRITE_TIMEOUT_S)
        except StoreError:
            write.on_done(give_back)
            raise
        assert isinstance(write.result, list)
        return write.result
