"""Writes of a worker in a pool: each names the worker's fence and changes nothing where the request is another's."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llamacpp_mqtt_deploy.core.turns import LANES
from llamacpp_mqtt_deploy.pool_ports import Claimed
from llamacpp_mqtt_deploy.ports import Entry, EntryKey
from llamacpp_mqtt_deploy.stores.bounds import first_level_of
from llamacpp_mqtt_deploy.stores.postgres import pg_entries
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text
from llamacpp_mqtt_deploy.stores.postgres.pg_members import lost

_BY_KEY = "route = %s AND session = %s AND request_id = %s"


def accept(db: BoundedConnection, entry: Entry, fence: int) -> None:
    """Journal a request that this worker has already; nothing when it is there and unfinished."""
    pg_entries.insert(db, entry, fence)
    db.execute(
        text(
            "INSERT INTO queue (id, route, session, request_id, first_level, lane, in_turn, size, deadline, since, owner, "
            "streaming) SELECT id, route, session, request_id, %s, %s, true, %s, "
            "clock_timestamp() + make_interval(secs => expires_at - accepted_at), 0, %s, state = 'streaming' "
            f"FROM entries WHERE {_BY_KEY} AND state <> 'ended' ON CONFLICT DO NOTHING"
        ),
        (
            first_level_of(entry.key.session),
            LANES.index("normal"),
            len(entry.payload),
            fence,
            *pg_entries.named(entry.key),
        ),
    )


def count_start(db: BoundedConnection, key: EntryKey, fence: int) -> Callable[[], int]:
    found = db.execute(
        text(
            f"WITH mine AS (SELECT id FROM queue WHERE {_BY_KEY} AND owner = %s FOR UPDATE), "
            "counted AS (UPDATE entries SET starts = starts + 1 FROM mine WHERE entries.id = mine.id RETURNING starts) "
            "SELECT starts FROM counted UNION ALL "
            # A quick answer has ended before its start is counted.
            f"SELECT starts FROM entries WHERE {_BY_KEY} AND state = 'ended' AND fence = %s"
        ),
        (*pg_entries.named(key), fence) * 2,
    )

    def read() -> int:
        row = found.fetchone()
        if row is None:
            raise lost()
        return int(row[0])

    return read


def starts(db: BoundedConnection, key: EntryKey, fence: int) -> int:
    """How many were counted; raises LeaseLost where the request is not this worker's."""
    row = db.execute(
        text(
            f"SELECT starts FROM entries WHERE id IN (SELECT id FROM queue WHERE {_BY_KEY} AND owner = %s) "
            f"OR ({_BY_KEY} AND state = 'ended' AND fence = %s)"
        ),
        (*pg_entries.named(key), fence) * 2,
    ).fetchone()
    if row is None:
        raise lost()
    return int(row[0])


def set_streaming(db: BoundedConnection, key: EntryKey, fence: int) -> Callable[[], None]:
    found = db.execute(
        text(
            f"WITH mine AS (UPDATE queue SET streaming = true WHERE {_BY_KEY} AND owner = %s RETURNING id) "
            "UPDATE entries SET state = 'streaming' FROM mine WHERE entries.id = mine.id RETURNING entries.id"
        ),
        (*pg_entries.named(key), fence),
    )

    def read() -> None:
        if found.fetchone() is None:
            raise lost()

    return read


def check_streaming(db: BoundedConnection, key: EntryKey, fence: int) -> None:
    """Raises LeaseLost where the request is not this worker's."""
    row = db.execute(
        text(f"SELECT 1 FROM queue WHERE {_BY_KEY} AND owner = %s AND streaming"), (*pg_entries.named(key), fence)
    ).fetchone()
    if row is None:
        raise lost()


def unfinished(db: BoundedConnection, fence: int) -> list[Entry]:
    ids = [row[0] for row in db.execute("SELECT id FROM queue WHERE owner = %s ORDER BY id", (fence,)).fetchall()]
    found = pg_entries.find_all(db, ids)
    return [found[each] for each in ids if each in found]


def undelivered(db: BoundedConnection, fence: int) -> list[Entry]:
    rows = db.execute(
        text(
            f"SELECT {pg_entries.COLUMNS} FROM entries LEFT JOIN payloads USING (id) "
            "WHERE state = 'ended' AND NOT delivered AND fence = %s ORDER BY ended_order"
        ),
        (fence,),
    ).fetchall()
    return [pg_entries.entry_of(row) for row in rows]


def claimed(db: BoundedConnection, rows: Sequence[tuple[Any, ...]]) -> Callable[[], list[Claimed]]:
    """What was taken from the queue, given as (id, why, by_own_level); what is returned gives it with its entries."""
    if not rows:
        return list
    found = db.execute(
        text(
            f"SELECT e.id, extract(epoch FROM clock_timestamp() - q.arrived)::float8, {_OF_ENTRY} "
            "FROM entries e JOIN queue q USING (id) LEFT JOIN payloads p USING (id) WHERE e.id = ANY(%s)"
        ),
        ([row[0] for row in rows],),
    )

    def read() -> list[Claimed]:
        entries = {row[0]: _in_our_time(pg_entries.entry_of(row[2:]), row[1]) for row in found.fetchall()}
        return [
            Claimed(entry=entries[entry_id], why=why or "run", by_own_level=by_own_level)
            for entry_id, why, by_own_level in rows
            if entry_id in entries
        ]

    return read


def still_claimed(db: BoundedConnection, rows: Sequence[tuple[Any, ...]], fence: int) -> list[Claimed]:
    """Of what was taken from the queue, given as to `claimed`, what is this worker's still."""
    ids = [row[0] for row in rows]
    found = db.execute("SELECT id FROM queue WHERE owner = %s AND id = ANY(%s)", (fence, ids)).fetchall()
    mine = {row[0] for row in found}
    return claimed(db, [row for row in rows if row[0] in mine])()


def to_deliver(db: BoundedConnection, ids: Sequence[int]) -> list[Claimed]:
    """The ends of these numbers, in this order."""
    found = pg_entries.find_all(db, ids)
    return [Claimed(entry=found[each], why="ended") for each in ids if each in found]


_OF_ENTRY = ", ".join(f"{'p' if name == 'payload' else 'e'}.{name}" for name in pg_entries.COLUMNS.split(", "))


def _in_our_time(entry: Entry, waited_s: float) -> Entry:
    """The entry as if this worker had accepted it: the clock of whoever did may differ from ours."""
    accepted_at = time.time() - max(0.0, waited_s)
    expires_at = None if entry.expires_at is None else accepted_at + entry.expires_at - entry.accepted_at
    return replace(entry, accepted_at=accepted_at, expires_at=expires_at)
