"""What clients ask of requests that may be anywhere in the pool: cancels, holding a session, snapshots."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamacpp_mqtt_deploy.core.early_cancels import IN_ALL, PER_LEVEL
from llamacpp_mqtt_deploy.pool_ports import NoticeKind
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores.bounds import first_level_of
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text

_BY_KEY = "route = %s AND session = %s AND request_id = %s"


@dataclass(slots=True)
class FoundByCancel:
    """What a cancel found."""

    claimed: list[tuple[Any, ...]] = field(default_factory=list)
    """Rows of (id, why, by_own_level)."""
    here: list[EntryKey] = field(default_factory=list)
    elsewhere: int = 0
    ended: bool = False


def cancel(
    db: BoundedConnection,
    fence: int,
    session: tuple[str, str],
    request_id: str | None,
    *,
    forget: bool,
    remember_s: float,
    tell: Callable[[str, NoticeKind, EntryKey], None],
) -> FoundByCancel:
    """`tell` brings a notice to the worker of this name."""
    found = FoundByCancel()
    why = "forgotten" if forget else "cancelled"
    for entry_id, key, owner, ending, by_own_level in _rows_of(db, session, request_id):
        if owner is None:
            db.execute(
                "UPDATE queue SET owner = %s, ending = coalesce(ending, %s) WHERE id = %s", (fence, why, entry_id)
            )
            found.claimed.append((entry_id, ending or why, by_own_level))
        elif owner == fence:
            if ending is None:
                found.here.append(key)
        else:
            db.execute("UPDATE queue SET asked = %s WHERE id = %s", (why, entry_id))
            found.elsewhere += 1
            worker = db.execute("SELECT worker_id FROM members WHERE fence = %s", (owner,)).fetchone()
            if worker is not None:
                tell(worker[0], "forget" if forget else "cancel", key)
    if request_id is not None and not (found.claimed or found.here or found.elsewhere):
        key = EntryKey(*session, request_id)
        found.ended = _has_ended(db, key)
        if not found.ended:
            _remember(db, key, remember_s)
    return found


def _rows_of(
    db: BoundedConnection, session: tuple[str, str], request_id: str | None
) -> list[tuple[int, EntryKey, int | None, str | None, bool]]:
    which = "" if request_id is None else "AND request_id = %s"
    rows = db.execute(
        text(
            "SELECT id, route, session, request_id, owner, ending, by_own_level FROM queue "
            f"WHERE route = %s AND session = %s {which} ORDER BY id FOR UPDATE"
        ),
        session if request_id is None else (*session, request_id),
    ).fetchall()
    return [(row[0], EntryKey(*row[1:4]), row[4], row[5], row[6]) for row in rows]


def _has_ended(db: BoundedConnection, key: EntryKey) -> bool:
    row = db.execute(
        text(f"SELECT 1 FROM entries WHERE {_BY_KEY}"), (key.route, key.session, key.request_id)
    ).fetchone()
    return row is not None


def _remember(db: BoundedConnection, key: EntryKey, remember_s: float) -> None:
    """In excess the oldest of the same first level is forgotten; over all, the oldest of all."""
    first_level = first_level_of(key.session)
    db.execute(
        "INSERT INTO early_cancels (route, session, request_id, first_level, until) "
        "VALUES (%s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s)) "
        "ON CONFLICT (route, session, request_id) DO UPDATE SET until = excluded.until",
        (key.route, key.session, key.request_id, first_level, remember_s),
    )
    oldest = "SELECT ctid FROM early_cancels {} ORDER BY until DESC OFFSET %s"
    db.execute(
        text(f"DELETE FROM early_cancels WHERE ctid = ANY(ARRAY({oldest.format('WHERE first_level = %s')}))"),
        (first_level, PER_LEVEL),
    )
    db.execute("DELETE FROM early_cancels WHERE until < clock_timestamp()")
    db.execute(text(f"DELETE FROM early_cancels WHERE ctid = ANY(ARRAY({oldest.format('')}))"), (IN_ALL,))


def hold(db: BoundedConnection, fence: int, session: tuple[str, str], hold_s: float) -> None:
    db.execute(
        "INSERT INTO held_sessions (route, session, fence, until) "
        "VALUES (%s, %s, %s, clock_timestamp() + make_interval(secs => %s)) "
        "ON CONFLICT (route, session) DO UPDATE SET fence = excluded.fence, until = excluded.until",
        (*session, fence, hold_s),
    )
    # Whoever takes one of its prompts at this moment has it before this returns, or does not get it.
    db.execute(
        "SELECT id FROM queue WHERE route = %s AND session = %s AND owner IS NULL ORDER BY id FOR UPDATE", session
    )


def free(db: BoundedConnection, session: tuple[str, str]) -> None:
    db.execute("DELETE FROM held_sessions WHERE route = %s AND session = %s", session)


def running_in(db: BoundedConnection, session: tuple[str, str]) -> int:
    row = db.execute(
        "SELECT count(*) FROM queue WHERE route = %s AND session = %s AND owner IS NOT NULL", session
    ).fetchone()
    return 0 if row is None else int(row[0])


def runner_of(db: BoundedConnection, key: EntryKey) -> str | None:
    """The name of the worker that runs it."""
    row = db.execute(
        text(f"SELECT worker_id FROM queue q JOIN members m ON m.fence = q.owner WHERE {_BY_KEY} AND ending IS NULL"),
        (key.route, key.session, key.request_id),
    ).fetchone()
    return None if row is None else str(row[0])


def release(db: BoundedConnection, fence: int, keys: Sequence[EntryKey]) -> int:
    """Give back what has no chunk yet, or is only to be ended; returns how many."""
    released = db.execute(
        "UPDATE queue q SET owner = NULL, ending = coalesce(ending, asked), asked = NULL "
        "FROM unnest(%s::text[], %s::text[], %s::text[]) AS given (r, s, i) "
        "WHERE q.route = r AND q.session = s AND q.request_id = i AND q.owner = %s "
        "AND (NOT q.streaming OR q.ending IS NOT NULL) RETURNING q.id",
        (
            [key.route for key in keys],
            [key.session for key in keys],
            [key.request_id for key in keys],
            fence,
        ),
    ).fetchall()  # not `rowcount`: within a pipeline that is -1
    return len(released)
