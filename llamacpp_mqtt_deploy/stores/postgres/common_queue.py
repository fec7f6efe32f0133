"""The way into the common queue: what is known, what has a place, and who loses his to it."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.core.admission import AdmissionQueue, QueueLimits
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.pool_ports import Enqueued, PoolRequest
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.postgres import pg_entries
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text
from llamacpp_mqtt_deploy.stores.postgres.pg_members import free_slots

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
        known = _known(self._db, keys)
        cancelled = _take_early_cancels(self._db, keys)
        queue = waiting_queue(self._db, limits=self._limits, aging_s=self._aging_s)
        outcomes: dict[int, Enqueued] = {}
        admitted: dict[int, int] = {}
        for place, request in enumerate(requests):
            key = request.entry.key
            found = known.get(key)
            if found is not None and not _replaces(request, found.entry):
                outcomes[place] = Enqueued(known=found.entry, owner=found.owner)
                continue
            if key in cancelled:
                entry_id = self._insert(request, ending="cancelled")
                self.leaving.append((entry_id, "cancelled", False))
                outcomes[place] = Enqueued()
            else:
                try:
                    admitted[place] = entry_id = self._admit(queue, request)
                except RequestError as refusal:
                    outcomes[place] = Enqueued(refused=refusal)
                    continue
            known[key] = _Known(request.entry, None)
        places = self._places(queue, admitted.values())
        outcomes |= {place: Enqueued(position=places.get(entry_id, 0)) for place, entry_id in admitted.items()}
        return [outcomes[place] for place in range(len(requests))]

    def _admit(self, queue: AdmissionQueue, request: PoolRequest) -> int:
        """Raises RequestError where it has no place."""
        key = request.entry.key
        ticket = Ticket(
            key,
            request.lane,
            request.first_level,
            (key.route, key.session) if request.in_turn else None,
            arrived=0.0,
            size=len(request.entry.payload),
        )
        evicted = queue.admit(ticket, retry_after_s=self._retry_after_s)
        entry_id = self._insert(request, ending=None)
        # From here on it is known by its number, as those before it are.
        queue.remove(key)
        ticket.key = entry_id
        queue.admit(ticket, retry_after_s=self._retry_after_s, force=True)
        for other in evicted:
            self._evict(int(str(other.key)), by_own_level=other.first_level == request.first_level)
        return entry_id

    def _evict(self, entry_id: int, *, by_own_level: bool) -> None:
        # One that another worker takes at this moment waits no more, and its place is free as well.
        rows = self._db.execute(
            "UPDATE queue SET owner = %s, ending = 'evicted', by_own_level = %s WHERE id IN (SELECT id FROM queue "
            "WHERE id = %s AND owner IS NULL AND ending IS NULL FOR UPDATE SKIP LOCKED) RETURNING id",
            (self._fence, by_own_level, entry_id),
        ).fetchall()
        self.leaving += [(row[0], "evicted", by_own_level) for row in rows]

    def _insert(self, request: PoolRequest, *, ending: str | None) -> int:
        entry = request.entry
        pg_entries.insert(self._db, entry, None)
        row = self._db.execute(
            "INSERT INTO queue (id, route, session, request_id, first_level, lane, in_turn, model, size, deadline, since, "
            "owner, ending) SELECT id, route, session, request_id, %s, %s, %s, %s, %s, "
            "clock_timestamp() + make_interval(secs => expires_at - accepted_at), "
            "coalesce((SELECT turn FROM session_turns t WHERE t.route = e.route AND t.session = e.session AND %s), "
            "(SELECT last_value FROM turns)), %s, %s FROM entries e "
            "WHERE route = %s AND session = %s AND request_id = %s RETURNING id",
            (
                *(request.first_level, request.lane, request.in_turn, request.model, len(entry.payload)),
                *(request.in_turn, None if ending is None else self._fence, ending),
                *pg_entries.named(entry.key),
            ),
        ).fetchone()
        assert row is not None
        return int(row[0])

    def _places(self, queue: AdmissionQueue, ids: Iterable[int]) -> dict[int, int]:
        wanted = set(ids)
        if not wanted:
            return {}
        if len(queue) > EXACT_PLACES:
            numbers = {int(str(ticket.key)): place for place, ticket in enumerate(queue, start=1)}
            return {entry_id: numbers.get(entry_id, 0) for entry_id in wanted}
        places = queue.positions(0.0, free=free_slots(self._db))
        return {entry_id: places.get(entry_id, 0) for entry_id in wanted}


def waiting_queue(db: BoundedConnection, *, limits: QueueLimits, aging_s: float) -> AdmissionQueue:
    """Those that wait, as they would on one box; their keys are the numbers of their entries, and the time is 0."""
    queue = AdmissionQueue(limits=limits, aging_s=aging_s)
    rows = db.execute(
        "SELECT id, lane, first_level, route, session, in_turn, size, extract(epoch FROM arrived - clock_timestamp()), since, "
        "coalesce(turn, 0) FROM queue LEFT JOIN level_turns USING (first_level) "
        "WHERE owner IS NULL AND ending IS NULL ORDER BY id"
    ).fetchall()
    queue.turns.recall({row[2]: row[9] for row in rows})
    for entry_id, lane, first_level, route, session, in_turn, size, arrived, since, _ in rows:
        chain = (route, session) if in_turn else None
        ticket = Ticket(entry_id, lane, first_level, chain, arrived=float(arrived), size=size)
        queue.admit(ticket, retry_after_s=0.0, force=True)
        ticket.came_at_turn = since
    for route, session in db.execute(
        "SELECT DISTINCT route, session FROM queue WHERE owner IS NOT NULL AND in_turn"
    ).fetchall():
        queue.hold_session((route, session))
    return queue


def places_of(
    db: BoundedConnection, keys: Sequence[EntryKey], *, limits: QueueLimits, aging_s: float
) -> dict[EntryKey, int]:
    """Of these those that wait, with their places."""
    rows = db.execute(
        text(
            f"SELECT id, route, session, request_id FROM queue JOIN {_BY_KEYS} {_MINE} WHERE owner IS NULL AND ending IS NULL"
        ),
        pg_entries.columns(keys),
    ).fetchall()
    if not rows:
        return {}
    queue = waiting_queue(db, limits=limits, aging_s=aging_s)
    if len(queue) > EXACT_PLACES:
        places = {ticket.key: place for place, ticket in enumerate(queue, start=1)}
    else:
        places = queue.positions(0.0, free=free_slots(db))
    return {EntryKey(*row[1:]): places.get(row[0], 0) for row in rows}


def _replaces(request: PoolRequest, entry: Entry) -> bool:
    """Whether the ended entry is the one that this request may take the place of."""
    return entry.state == "ended" and request.replaces is not None and request.replaces == entry.ended_at


def _known(db: BoundedConnection, keys: Sequence[EntryKey]) -> dict[EntryKey, _Known]:
    rows = db.execute(
        text(
            f"SELECT {pg_entries.COLUMNS}, (SELECT owner FROM queue q WHERE q.id = entries.id) FROM entries "
            f"JOIN {_BY_KEYS} {_MINE} LEFT JOIN payloads USING (id)"
        ),
        pg_entries.columns(keys),
    ).fetchall()
    return {entry.key: _Known(entry, row[15]) for row in rows for entry in [pg_entries.entry_of(row)]}


def _take_early_cancels(db: BoundedConnection, keys: Sequence[EntryKey]) -> set[EntryKey]:
    rows = db.execute(
        text(
            f"WITH given AS (SELECT * FROM {_BY_KEYS}) DELETE FROM early_cancels c USING given g WHERE c.route = g.route "
            "AND c.session = g.session AND c.request_id = g.request_id "
            "RETURNING c.route, c.session, c.request_id, c.until > clock_timestamp()"
        ),
        pg_entries.columns(keys),
    ).fetchall()
    return {EntryKey(*row[:3]) for row in rows if row[3]}
