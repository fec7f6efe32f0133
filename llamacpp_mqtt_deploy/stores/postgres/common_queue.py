"""The way into the common queue: what is known, what has a place, and who loses his to it."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.core.admission import AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.pool_ports import Enqueued, PoolRequest
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.postgres import pg_entries
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text
from llamacpp_mqtt_deploy.stores.postgres.pg_members import free_slots, hold_membership

EXACT_PLACES = 1000
"""In a longer queue a newcomer's place is told by how many wait."""

_BY_KEYS = "unnest(%s::text[], %s::text[], %s::text[]) AS given (route, session, request_id)"
_MINE = "USING (route, session, request_id)"


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

    def run(self, requests: Sequence[PoolRequest]) -> list[Enqueued]:
        keys = [request.entry.key for request in requests]
        # All questions are on their way before the first answer is read.
        membership = hold_membership(self._db, self._fence)
        asked = _known(self._db, keys), _take_early_cancels(self._db, keys)
        waiting, free = waiting_queue(self._db, limits=self._limits, aging_s=self._aging_s), free_slots(self._db)
        membership()
        known, cancelled = asked[0](), asked[1]()
        queue = waiting()
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
        places = _places(queue, free) if admitted else {}
        outcomes |= {place: Enqueued(position=places.get(key, 0)) for place, key in admitted.items()}
        return [outcomes[place] for place in range(len(requests))]

    def _admit(self, queue: AdmissionQueue, request: PoolRequest, *, replaces: bool) -> None:
        """Raises RequestError where it has no place."""
        key = request.entry.key
        chain = (key.route, key.session) if request.in_turn else None
        size = len(request.entry.payload)
        ticket = Ticket(key, request.lane, request.first_level, chain, arrived=0.0, size=size)
        evicted = queue.admit(ticket, retry_after_s=self._retry_after_s)
        self._insert(request, replaces=replaces, ending=None)
        for other in evicted:
            if isinstance(other.key, EntryKey):
                self._evict(other.key, by_own_level=other.first_level == request.first_level)

    def _evict(self, key: EntryKey, *, by_own_level: bool) -> None:
        # One that another worker takes at this moment waits no more, and its place is free as well.
        rows = self._db.execute(
            "UPDATE queue SET owner = %s, ending = 'evicted', by_own_level = %s WHERE id IN (SELECT id FROM queue "
            "WHERE route = %s AND session = %s AND request_id = %s AND owner IS NULL AND ending IS NULL "
            "FOR UPDATE SKIP LOCKED) RETURNING id",
            (self._fence, by_own_level, *pg_entries.named(key)),
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


def waiting_queue(db: BoundedConnection, *, limits: QueueLimits, aging_s: float) -> Callable[[], AdmissionQueue]:
    """What is returned gives those that wait, as they would on one box; the time is 0."""
    found = db.execute(
        "SELECT route, session, request_id, lane, first_level, in_turn, size, "
        "extract(epoch FROM arrived - statement_timestamp())::float8, since, coalesce(turn, 0), owner IS NULL "
        "FROM queue LEFT JOIN level_turns USING (first_level) WHERE owner IS NOT NULL OR ending IS NULL ORDER BY id"
    )

    def read() -> AdmissionQueue:
        queue = AdmissionQueue(limits=limits, aging_s=aging_s)
        rows = found.fetchall()
        queue.turns.recall({row[4]: row[9] for row in rows})
        for route, session, request_id, lane, first_level, in_turn, size, arrived, since, _, waits in rows:
            chain = (route, session) if in_turn else None
            if waits:
                key = EntryKey(route, session, request_id)
                ticket = Ticket(key, lane, first_level, chain, arrived=arrived, size=size)
                queue.admit(ticket, retry_after_s=0.0, force=True)
                ticket.came_at_turn = since
            elif chain is not None:
                queue.hold_session(chain)
        return queue

    return read


def _places(queue: AdmissionQueue, free: Callable[[], int]) -> dict[Hashable, int]:
    if len(queue) > EXACT_PLACES:
        return {ticket.key: place for place, ticket in enumerate(queue, start=1)}
    return queue.positions(0.0, free=free())


def places_of(
    db: BoundedConnection, keys: Sequence[EntryKey], *, limits: QueueLimits, aging_s: float
) -> dict[EntryKey, int]:
    """Of these those that wait, with their places."""
    rows = db.execute(
        text(
            f"SELECT route, session, request_id FROM queue JOIN {_BY_KEYS} {_MINE} WHERE owner IS NULL AND ending IS NULL"
        ),
        pg_entries.columns(keys),
    ).fetchall()
    if not rows:
        return {}
    waiting, free = waiting_queue(db, limits=limits, aging_s=aging_s), free_slots(db)
    places = _places(waiting(), free)
    return {key: places.get(key, 0) for row in rows for key in [EntryKey(*row)]}


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
