"""Which workers are in the pool: registrations with leases by the database's clock, and what becomes of those of the dead."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamacpp_mqtt_deploy.core.turns import LANES
from llamacpp_mqtt_deploy.pool_ports import LeaseLost, Member, MemberSeen, PoolLoad
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text

_COLUMNS = "worker_id, instance, slots, models, version, draining"

_OVER = "TIMESTAMPTZ 'epoch'"
"""The lease of a registration that ended by word and not by time."""

_IS_OVER = f"""
    (m.lease_until = {_OVER} OR (
        m.lease_until < clock_timestamp()
        AND me.fresh_since < clock_timestamp() - make_interval(secs => %(lease_s)s)
        AND NOT pg_postmaster_start_time() BETWEEN clock_timestamp() - make_interval(secs => %(lease_s)s) AND clock_timestamp()
    ))
"""
"""Whether `m` may be taken over by `me`. Where the database was away all leases look over: so `me` must have renewed its own without
a gap for as long as a lease lasts, in which time everybody who is alive has renewed his. One that started later than now did so
before its clock was set back."""

_FAR = "lease_until > clock_timestamp() + make_interval(secs => %(lease_s)s)"
"""A lease that nobody could get now: the database's clock was set back since."""


def lost() -> LeaseLost:
    return LeaseLost("This worker's lease is over, and another worker has its requests or may have them.")


def join(db: BoundedConnection, member: Member, lease_s: float) -> int:
    db.execute(text(f"UPDATE members SET lease_until = {_OVER} WHERE worker_id = %s"), (member.worker_id,))
    row = db.execute(
        text(
            f"INSERT INTO members (fence, {_COLUMNS}, lease_until, fresh_since) VALUES (nextval('fences'), "
            "%s, %s, %s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s), clock_timestamp()) RETURNING fence"
        ),
        (*_values(member), lease_s),
    ).fetchone()
    assert row is not None
    _adopt(db, row[0])
    return int(row[0])


def _adopt(db: BoundedConnection, fence: int) -> None:
    """What a worker without a pool has left in these tables, waits, or is to be ended, and to be delivered, from now on."""
    db.execute(
        "INSERT INTO queue (id, route, session, request_id, first_level, lane, in_turn, size, deadline, since, ending) "
        "SELECT e.id, e.route, e.session, e.request_id, e.first_level, %s, true, coalesce(length(p.payload), 0), "
        "clock_timestamp() + make_interval(secs => e.expires_at - e.accepted_at), 0, "
        "CASE WHEN e.state = 'streaming' THEN 'interrupted' END FROM entries e LEFT JOIN payloads p USING (id) "
        "WHERE e.state <> 'ended' AND NOT EXISTS (SELECT 1 FROM queue q WHERE q.id = e.id)",
        (LANES.index("normal"),),
    )
    db.execute(
        "UPDATE queue SET owner = NULL, ending = CASE WHEN streaming THEN 'interrupted' ELSE ending END "
        "WHERE owner IS NOT NULL AND NOT EXISTS (SELECT 1 FROM members m WHERE m.fence = owner)"
    )
    db.execute(
        "UPDATE entries SET fence = %s WHERE state = 'ended' AND NOT delivered AND (fence IS NULL OR NOT EXISTS "
        "(SELECT 1 FROM members m WHERE m.fence = entries.fence))",
        (fence,),
    )


def update(db: BoundedConnection, fence: int, member: Member) -> None:
    row = db.execute(
        text(f"UPDATE members SET ({_COLUMNS}) = (%s, %s, %s, %s, %s, %s) WHERE fence = %s RETURNING fence"),
        (*_values(member), fence),
    ).fetchone()
    if row is None:
        raise lost()


def renew(db: BoundedConnection, fence: int, lease_s: float) -> list[tuple[EntryKey, str]]:
    """Extend the lease; returns what this worker was asked to do with its requests."""
    row = db.execute(
        text(
            f"WITH was AS (SELECT {_FAR} AS far FROM members WHERE fence = %(fence)s) "
            "UPDATE members SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s), fresh_since = "
            "CASE WHEN far OR clock_timestamp() NOT BETWEEN fresh_since AND lease_until THEN clock_timestamp() "
            f"ELSE fresh_since END FROM was WHERE fence = %(fence)s AND lease_until <> {_OVER} RETURNING far"
        ),
        {"fence": fence, "lease_s": lease_s},
    ).fetchone()
    if row is None:
        raise lost()
    if row[0]:
        _bring_near(db, lease_s)
    rows = db.execute(
        "SELECT route, session, request_id, asked FROM queue WHERE owner = %s AND asked IS NOT NULL ORDER BY id",
        (fence,),
    ).fetchall()
    return [(EntryKey(*row[:3]), row[3]) for row in rows]


def _bring_near(db: BoundedConnection, lease_s: float) -> None:
    """Those of the dead would last as much longer as the clock was set back. Whoever renews his at this moment lives."""
    db.execute(
        text(
            "UPDATE members SET lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s) WHERE fence = ANY(ARRAY("
            f"SELECT fence FROM members WHERE {_FAR} FOR NO KEY UPDATE SKIP LOCKED))"
        ),
        {"lease_s": lease_s},
    )


def leave(db: BoundedConnection, fence: int) -> None:
    """What waits goes to others at once; what streamed and what no broker acknowledged goes to whoever takes over."""
    db.execute("UPDATE queue SET owner = NULL WHERE owner = %s AND NOT streaming", (fence,))
    db.execute("DELETE FROM held_sessions WHERE fence = %s", (fence,))
    db.execute(text(f"UPDATE members SET lease_until = {_OVER} WHERE fence = %s"), (fence,))
    db.execute(
        "DELETE FROM members WHERE fence = %s AND NOT EXISTS (SELECT 1 FROM queue WHERE owner = %s) AND NOT EXISTS "
        "(SELECT 1 FROM entries WHERE fence = %s AND state = 'ended' AND NOT delivered)",
        (fence, fence, fence),
    )


def hold_membership(db: BoundedConnection, fence: int) -> Callable[[], tuple[bool, bool]]:
    """Keep this worker's registration until the end of the transaction: nobody takes over from it meanwhile, or it is over
    already. What is returned tells whether its lease lasts, and whether it drains, and raises LeaseLost."""
    found = db.execute(
        "SELECT lease_until > clock_timestamp(), draining FROM members WHERE fence = %s FOR KEY SHARE", (fence,)
    )

    def read() -> tuple[bool, bool]:
        row = found.fetchone()
        if row is None:
            raise lost()
        return bool(row[0]), bool(row[1])

    return read


# --- the others ------------------------------------------------------------------------------------------------------


def overdue(db: BoundedConnection, fence: int, lease_s: float) -> list[MemberSeen]:
    rows = db.execute(
        text(
            f"{_SEEN} CROSS JOIN members me WHERE me.fence = %(fence)s AND m.fence <> %(fence)s "
            f"AND me.lease_until > clock_timestamp() AND {_IS_OVER} ORDER BY m.fence"
        ),
        {"fence": fence, "lease_s": lease_s},
    ).fetchall()
    return [_seen(row) for row in rows]


def end_overdue(db: BoundedConnection, fence: int, other: int, lease_s: float) -> bool:
    """End the other's membership if its lease is over; at most one worker ever hears True."""
    row = db.execute(
        text(
            "DELETE FROM members m USING members me WHERE m.fence = %(other)s AND me.fence = %(fence)s "
            f"AND me.fence <> m.fence AND me.lease_until > clock_timestamp() AND {_IS_OVER} RETURNING m.fence"
        ),
        {"other": other, "fence": fence, "lease_s": lease_s},
    ).fetchone()
    return row is not None


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What a dead worker had: rows (id, ending, by_own_level) that its heir has to end, the numbers of stored ends that the heir has to
    deliver, and how many wait again."""

    to_end: list[tuple[Any, ...]]
    to_deliver: list[int]
    waiting: int


def inherit(db: BoundedConnection, fence: int, dead: int) -> Inheritance:
    mine = db.execute(
        "UPDATE queue SET owner = %s, ending = coalesce(ending, CASE WHEN streaming THEN 'interrupted' ELSE asked END), "
        "asked = NULL WHERE owner = %s AND (streaming OR ending IS NOT NULL OR asked IS NOT NULL) "
        "RETURNING id, ending, by_own_level",
        (fence, dead),
    ).fetchall()
    # Not `rowcount`: within a pipeline that is -1.
    waiting = len(db.execute("UPDATE queue SET owner = NULL WHERE owner = %s RETURNING id", (dead,)).fetchall())
    ended = db.execute(
        "UPDATE entries SET fence = %s WHERE fence = %s AND state = 'ended' AND NOT delivered RETURNING ended_order, id",
        (fence, dead),
    ).fetchall()
    db.execute("DELETE FROM held_sessions WHERE fence = %s", (dead,))
    return Inheritance(mine, [row[1] for row in sorted(ended)], waiting)


def load(db: BoundedConnection) -> PoolLoad:
    members = db.execute(text(f"{_SEEN} ORDER BY m.fence")).fetchall()
    lanes = db.execute(
        "SELECT lane, count(*), extract(epoch FROM clock_timestamp() - min(arrived)) FROM queue "
        "WHERE owner IS NULL AND ending IS NULL GROUP BY lane"
    ).fetchall()
    queued = dict.fromkeys(LANES, 0) | {LANES[row[0]]: int(row[1]) for row in lanes}
    return PoolLoad(
        members=tuple(_seen(row) for row in members),
        queued=queued,
        oldest_wait_s=max([0.0, *(float(row[2]) for row in lanes)]),  # less than 0 after the clock was set back
    )


def free_slots(db: BoundedConnection) -> Callable[[], int]:
    """Of all members that are alive and take requests."""
    found = db.execute(
        "SELECT coalesce(sum(greatest(0, slots - (SELECT count(*) FROM queue WHERE owner = m.fence))), 0) FROM members m "
        "WHERE NOT draining AND lease_until > clock_timestamp()"
    )

    def read() -> int:
        row = found.fetchone()
        return 0 if row is None else int(row[0])

    return read


_SEEN = (
    f"SELECT m.fence, extract(epoch FROM m.lease_until - clock_timestamp()), "
    "(SELECT count(*) FROM queue WHERE owner = m.fence), "
    f"{', '.join(f'm.{name}' for name in _COLUMNS.split(', '))} FROM members m"
)


def _seen(row: Sequence[Any]) -> MemberSeen:
    fence, left_s, running, worker_id, instance, slots, models, version, draining = row
    member = Member(
        worker_id=worker_id,
        instance=instance,
        slots=slots,
        models=tuple(models),
        version=version,
        draining=draining,
    )
    return MemberSeen(member=member, fence=fence, lease_left_s=float(left_s), running=int(running))


def _values(member: Member) -> tuple[Any, ...]:
    return (
        member.worker_id,
        member.instance,
        member.slots,
        list(member.models),
        member.version,
        member.draining,
    )
