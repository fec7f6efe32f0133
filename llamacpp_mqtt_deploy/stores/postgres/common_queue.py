"""The way into the common queue: what is known, what has a place, and who loses his to it."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.core.admission import EXACT_AT_ONCE, EXACT_PLACES, AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.errors import Busy, RequestError
from llamacpp_mqtt_deploy.core.queue_places import check_session, make_room
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.pool_ports import Enqueued, PoolRequest
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.postgres import pg_entries
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text
from llamacpp_mqtt_deploy.stores.postgres.pg_members import free_slots, hold_membership
from llamacpp_mqtt_deploy.stores.postgres.queue_counts import THIS_WAITS, CountedQueue, prefer_indexes

_WAITS = "owner IS NULL AND ending IS NULL"
_NOBODY_IS_ADMITTED = QueueLimits(queue_size=1, session_queue=1)

_BY_KEYS = "unnest(%s::text[], %s::text[], %s::text[]) AS given (route, session, request_id)"
_MINE = "USING (route, session, request_id)"


def arrived_s(table: str) -> str:
    """When a request of this table came, in seconds from now: never later, as it looks after the database's clock was set back."""
    return f"extract(epoch FROM least({table}.arrived, statement_timestamp()) - statement_timestamp())::float8"


@dataclass(frozen=True, slots=True)
class _Known:
    entry: Entry
    owner: int | None


class Enqueuing:
    """One call of `enqueue`, inside a transaction that holds the lock of the queue."""

    def __init__(
        self, db: BoundedConnection, fence: int, *, limits: QueueLimits, retry_after_s: float, aging_s: float
    ) -> None:
        self._db = db
        self._fence = fence
        self._retry_after_s = retry_after_s
        self._limits = limits
        self._aging_s = aging_s
        self.leaving: list[tuple[Any, ...]] = []
        """What this worker has to end now: rows of (id, why, by_own_level)."""
        self._outcomes: dict[int, Enqueued] = {}
        self._admitted: dict[int, EntryKey] = {}
        self._places: Callable[[], dict[EntryKey, int]] = dict

    def run(self, requests: Sequence[PoolRequest]) -> None:
        """`told` says then what became of them."""
        keys = [request.entry.key for request in requests]
        # All questions are on their way before the first answer is read.
        prefer_indexes(self._db)
        membership = hold_membership(self._db, self._fence)
        asked = _known(self._db, keys), _take_early_cancels(self._db, keys)
        queue = CountedQueue(
            self._db,
            [request.first_level for request in requests],
            [(key.route, key.session) for key, request in zip(keys, requests, strict=True) if request.in_turn],
        )
        membership()
        known, cancelled = asked[0](), asked[1]()
        queue.read()
        outcomes: dict[int, Enqueued] = {}
        admitted: dict[int, EntryKey] = {}
        for place, request in enumerate(requests):
            key = request.entry.key
            found = known.get(key)
            if found is not None and not _replaces(request, found.entry):
                outcomes[place] = Enqueued(known=found.entry, owner=found.owner)
                continue
            try:
                if key in cancelled:
                    self._insert(request, replaces=found is not None, ending="cancelled")
                    outcomes[place] = Enqueued()
                else:
                    self._admit(queue, request, replaces=found is not None)
                    admitted[place] = key
            except RequestError as refusal:
                outcomes[place] = Enqueued(refused=refusal)
                continue
            known[key] = _Known(request.entry, None)
        self._outcomes, self._admitted = outcomes, admitted
        if admitted and len(queue) <= EXACT_AT_ONCE:
            exact, free = waiting_queue(self._db, aging_s=self._aging_s, most=EXACT_AT_ONCE), free_slots(self._db)
            self._places = lambda: _places(exact(), free())

    def told(self, *, with_places: bool = True) -> list[Enqueued]:
        """One for each request, in their order."""
        places = self._places() if with_places else {}
        told = self._outcomes | {
            number: Enqueued(position=places.get(key, 0)) for number, key in self._admitted.items()
        }
        return [told[number] for number in range(len(told))]

    def _admit(self, queue: CountedQueue, request: PoolRequest, *, replaces: bool) -> None:
        """Raises RequestError where it has no place."""
        key = request.entry.key
        chain = (key.route, key.session) if request.in_turn else None
        size = len(request.entry.payload)
        ticket = Ticket(key, request.lane, request.first_level, chain, arrived=0.0, size=size)
        try:
            leaving = self._make_room(queue, ticket)
        except Busy:
            if not queue.outdated:
                raise
            queue.ask()
            queue.read()
            leaving = self._make_room(queue, ticket)
        self._insert(request, replaces=replaces, ending=None)
        for other in leaving:
            self._evict(other, by_own_level=other.first_level == request.first_level)
            queue.leave(other)
        queue.enter(ticket)

    def _make_room(self, queue: CountedQueue, ticket: Ticket) -> list[Ticket]:
        if isinstance(ticket.session, tuple):
            waiting, busy = queue.in_session(ticket.session)
            check_session(waiting, self._limits, busy=busy, retry_after_s=self._retry_after_s)
        return make_room(ticket, queue, self._limits, retry_after_s=self._retry_after_s)

    def _evict(self, ticket: Ticket, *, by_own_level: bool) -> None:
        # One that another worker takes at this moment waits no more, and its place is free as well.
        rows = self._db.execute(
            text(
                "UPDATE queue SET owner = %s, ending = 'evicted', by_own_level = %s WHERE id IN (SELECT id FROM queue "
                f"WHERE id = %s AND {THIS_WAITS} FOR UPDATE SKIP LOCKED) RETURNING id"
            ),
            (self._fence, by_own_level, ticket.key),
        ).fetchall()
        self.leaving += [(row[0], "evicted", by_own_level) for row in rows]

    def _insert(self, request: PoolRequest, *, replaces: bool, ending: str | None) -> None:
        entry = request.entry
        if replaces:
            pg_entries.drop_ended(self._db, entry.key)
        found = self._db.execute(
            text(
                f"WITH {pg_entries.INSERTED} "
                "INSERT INTO queue (id, route, session, request_id, first_level, lane, in_turn, model, size, deadline, since, "
                "owner, ending) SELECT id, route, session, request_id, %s, %s, %s, %s, %s, "
                "clock_timestamp() + make_interval(secs => expires_at - accepted_at), "
                "coalesce((SELECT turn FROM session_turns t WHERE t.route = e.route AND t.session = e.session AND %s), "
                "(SELECT last_value FROM turns)), %s, %s FROM entry e RETURNING id"
            ),
            (
                *pg_entries.inserted_values(entry, None),
                *(request.first_level, request.lane, request.in_turn, request.model, len(entry.payload)),
                *(request.in_turn, None if ending is None else self._fence, ending),
            ),
        )
        if ending is not None:
            self.leaving += [(row[0], ending, False) for row in found.fetchall()]


def waiting_queue(db: BoundedConnection, *, aging_s: float, most: int) -> Callable[[], AdmissionQueue | None]:
    """What is returned gives those that wait, as they would on one box, or None where they are more than `most`; the time is 0."""
    found = db.execute(
        text(
            "SELECT route, session, request_id, lane, first_level, in_turn, size, "
            f"{arrived_s('q')}, since, coalesce(turn, 0), in_turn AND EXISTS ("
            "SELECT 1 FROM queue e WHERE e.in_turn AND e.route = q.route AND e.session = q.session AND e.owner IS NOT NULL) "
            f"FROM queue q LEFT JOIN level_turns USING (first_level) WHERE {_WAITS} ORDER BY id LIMIT %s"
        ),
        (most + 1,),
    )

    def read() -> AdmissionQueue | None:
        rows = found.fetchall()
        if len(rows) > most:
            return None
        queue = AdmissionQueue(limits=_NOBODY_IS_ADMITTED, aging_s=aging_s)
        queue.turns.recall({row[4]: row[9] for row in rows})
        for route, session, request_id, lane, first_level, in_turn, size, arrived, since, _, busy in rows:
            chain = (route, session) if in_turn else None
            ticket = Ticket(EntryKey(route, session, request_id), lane, first_level, chain, arrived=arrived, size=size)
            queue.admit(ticket, retry_after_s=0.0, force=True)
            ticket.came_at_turn = since
            if busy:
                queue.hold_session(chain)
        return queue

    return read


def _places(queue: AdmissionQueue | None, free: int) -> dict[EntryKey, int]:
    places = {} if queue is None else queue.positions(0.0, free=free)
    return {key: place for key, place in places.items() if isinstance(key, EntryKey)}


def places_of(db: BoundedConnection, keys: Sequence[EntryKey], *, aging_s: float) -> dict[EntryKey, int]:
    """Of these those that wait, with their places."""
    total = db.execute("SELECT places FROM queue_total").fetchone()
    if total is None or total[0] <= EXACT_PLACES:
        queue = waiting_queue(db, aging_s=aging_s, most=EXACT_PLACES)()
        if queue is not None:
            places = _places(queue, free_slots(db)())
            there = {ticket.key for ticket in queue}
            return {key: places.get(key, 0) for key in keys if key in there}
    rows = db.execute(
        text(
            "SELECT route, session, request_id, place FROM (SELECT route, session, request_id, row_number() OVER (ORDER BY id) "
            f"AS place FROM queue WHERE {_WAITS}) AS waiting JOIN {_BY_KEYS} {_MINE}"
        ),
        pg_entries.columns(keys),
    ).fetchall()
    return {EntryKey(*row[:3]): row[3] for row in rows}


def _replaces(request: PoolRequest, entry: Entry) -> bool:
    """Whether the ended entry is the one that this request may take the place of."""
    return entry.state == "ended" and request.replaces is not None and request.replaces == entry.ended_at


def _known(db: BoundedConnection, keys: Sequence[EntryKey]) -> Callable[[], dict[EntryKey, _Known]]:
    found = db.execute(
        text(
            f"SELECT {pg_entries.COLUMNS}, (SELECT owner FROM queue q WHERE q.id = entries.id) FROM entries "
            f"JOIN {_BY_KEYS} {_MINE} LEFT JOIN payloads USING (id)"
        ),
        pg_entries.columns(keys),
    )
    return lambda: {
        entry.key: _Known(entry, row[15]) for row in found.fetchall() for entry in [pg_entries.entry_of(row)]
    }


def _take_early_cancels(db: BoundedConnection, keys: Sequence[EntryKey]) -> Callable[[], set[EntryKey]]:
    found = db.execute(
        text(
            f"WITH given AS (SELECT * FROM {_BY_KEYS}) DELETE FROM early_cancels c USING given g WHERE c.route = g.route "
            "AND c.session = g.session AND c.request_id = g.request_id "
            "RETURNING c.route, c.session, c.request_id, c.until > clock_timestamp()"
        ),
        pg_entries.columns(keys),
    )
    return lambda: {EntryKey(*row[:3]) for row in found.fetchall() if row[3]}
