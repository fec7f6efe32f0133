"""What a purge drops from PostgreSQL: ended requests and sessions whose time has passed, and what is too much of them."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Sequence

from llamacpp_mqtt_deploy.stores.bounds import LEVEL_SHARE, PURGE_ROWS, ROW_BYTES, UNDELIVERED_S, Portion, excess
from llamacpp_mqtt_deploy.stores.postgres import pg_entries, pg_histories
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text


def old_entries(db: BoundedConnection, dropped: Portion, *, now: float, remember_s: float) -> None:
    """Ended requests that nobody will ask for again."""
    one = "(SELECT id, bytes, ended_order FROM entries WHERE state = 'ended' AND delivered = %s AND ended_at < %s)"
    old = now - remember_s
    rows = db.execute(
        text(f"SELECT id, bytes FROM ({one} UNION ALL {one}) AS old ORDER BY ended_order LIMIT %s"),
        (True, old, False, min(old, now - UNDELIVERED_S), PURGE_ROWS + 1),
    ).fetchall()
    pg_entries.drop(db, [entry_id for entry_id, size in rows if dropped.takes(size)])


def excess_entries(db: BoundedConnection, dropped: Portion, *, max_bytes: int) -> None:
    """The oldest ended requests of whoever holds too much."""
    if _used_bytes(db) <= max_bytes * LEVEL_SHARE:
        return
    held = db.execute(
        "SELECT first_level, delivered, sum(bytes + %s) FROM entries WHERE state = 'ended' GROUP BY first_level, delivered",
        (ROW_BYTES,),
    ).fetchall()
    for first_level, delivered, too_much in excess({(row[0], row[1]): int(row[2]) for row in held}, max_bytes):
        rows = db.execute(
            "SELECT id, bytes FROM entries WHERE state = 'ended' AND first_level = %s AND delivered = %s "
            "ORDER BY ended_order LIMIT %s",
            (first_level, delivered, PURGE_ROWS + 1),
        ).fetchall()
        victims = []
        freed = 0
        for entry_id, size in rows:
            if freed >= too_much or not dropped.takes(size):
                break
            freed += size + ROW_BYTES
            victims.append(entry_id)
        pg_entries.drop(db, victims)
        if dropped.full:
            return


def old_sessions(db: BoundedConnection, dropped: Portion, *, now: float, ttl_s: float, max_sessions: int) -> None:
    """Sessions that nobody used for long, and the least recently used ones of whoever holds most."""
    idle = (
        "NOT EXISTS (SELECT 1 FROM entries e WHERE e.route = s.route AND e.session = s.session AND e.state <> 'ended')"
    )
    old = db.execute(
        text(
            f"SELECT route, session, bytes FROM sessions s WHERE last_used < %s AND {idle} "
            "ORDER BY last_used, route, session LIMIT %s"
        ),
        (now - ttl_s, PURGE_ROWS + 1),
    ).fetchall()
    _drop_sessions(db, dropped, old)
    count = db.execute("SELECT count(*) FROM sessions").fetchone()
    too_many = (0 if count is None else count[0]) - max_sessions
    if too_many <= 0 or dropped.full:
        return
    # A session's depth is its place in its first level, newest first: taking the deepest, one after the other, always takes
    # the least recently used session of whoever holds most.
    victims = db.execute(
        text(
            "SELECT route, session, bytes FROM (SELECT route, session, bytes, last_used, row_number() OVER "
            "(PARTITION BY first_level ORDER BY last_used DESC, route DESC, session DESC) AS depth FROM sessions) s "
            f"WHERE {idle} ORDER BY depth DESC, last_used, route, session LIMIT %s"
        ),
        (min(too_many, PURGE_ROWS + 1),),
    ).fetchall()
    _drop_sessions(db, dropped, victims)


def _drop_sessions(db: BoundedConnection, dropped: Portion, rows: Sequence[tuple[str, str, int]]) -> None:
    for route, session, size in rows:
        if not dropped.takes(size):
            return
        pg_histories.drop(db, (route, session))


def forget_writers(db: BoundedConnection) -> None:
    """Connections that have been away for a day ask no more whether they have committed."""
    db.execute(
        "DELETE FROM writers WHERE since < clock_timestamp() - interval '1 day' AND NOT EXISTS "
        "(SELECT 1 FROM pg_stat_activity WHERE application_name = writers.name)"
    )


def _used_bytes(db: BoundedConnection) -> int:
    """Of all entries: while that is small, nobody has to be asked what he holds."""
    row = db.execute("SELECT pg_total_relation_size('entries') + pg_total_relation_size('chunks')").fetchone()
    return 0 if row is None else int(row[0])
