"""What a purge drops: ended requests and sessions whose time has passed, and what is too much of them."""

# ruff: noqa: S608  every statement is joined from constants of this file; values are bound
from __future__ import annotations

import sqlite3

from llamacpp_mqtt_deploy.stores import entries, held_bytes, histories
from llamacpp_mqtt_deploy.stores.bounds import (
    LEVEL_SHARE,
    PURGE_ROWS,
    ROW_BYTES,
    UNDELIVERED_S,
    Portion,
    excess,
)

SPARE_PAGES = 256
"""Free pages (4 KiB each) that stay in the file for what comes next."""

VACUUM_PAGES = 256
"""Most free pages beyond those that one purge gives back to the disk."""


def old_entries(db: sqlite3.Connection, dropped: Portion, *, now: float, remember_s: float) -> None:
    """Ended requests that nobody will ask for again."""
    # Two halves, since an OR would read the whole index.
    rows = db.execute(
        "SELECT id, bytes FROM ("
        "SELECT id, bytes, ended_order FROM entries WHERE state = 'ended' AND delivered = 1 AND ended_at < :old UNION ALL "
        "SELECT id, bytes, ended_order FROM entries WHERE state = 'ended' AND delivered = 0 AND ended_at < min(:old, :lost)) "
        "ORDER BY ended_order LIMIT :most",
        {"old": now - remember_s, "lost": now - UNDELIVERED_S, "most": PURGE_ROWS + 1},
    ).fetchall()
    entries.drop(db, [(entry_id,) for entry_id, size in rows if dropped.takes(size)])


def excess_entries(db: sqlite3.Connection, dropped: Portion, *, max_bytes: int) -> None:
    """The oldest ended requests of whoever holds too much; `held_bytes` has counted them for this connection."""
    if _used_bytes(db) <= max_bytes * LEVEL_SHARE:
        return
    for first_level, delivered, too_much in excess(held_bytes.read(db), max_bytes):
        rows = db.execute(
            "SELECT id, bytes FROM entries WHERE state = 'ended' AND first_level = ? AND delivered = ? "
            "ORDER BY ended_order LIMIT ?",
            (first_level, delivered, PURGE_ROWS + 1),
        ).fetchall()
        victims = []
        freed = 0
        for entry_id, size in rows:
            if freed >= too_much or not dropped.takes(size):
                break
            freed += size + ROW_BYTES
            victims.append((entry_id,))
        entries.drop(db, victims)
        if dropped.full:
            return


def old_sessions(db: sqlite3.Connection, dropped: Portion, *, now: float, ttl_s: float, max_sessions: int) -> None:
    """Sessions that nobody used for long, and the least recently used ones of whoever holds most."""
    idle = (
        "NOT EXISTS (SELECT 1 FROM entries e WHERE e.route = s.route AND e.session = s.session AND e.state <> 'ended')"
    )
    old = db.execute(
        f"SELECT route, session, bytes FROM sessions s WHERE last_used < ? AND {idle} "
        "ORDER BY last_used, route, session LIMIT ?",
        (now - ttl_s, PURGE_ROWS + 1),
    ).fetchall()
    _drop_sessions(db, dropped, old)
    too_many = db.execute("SELECT count(*) FROM sessions").fetchone()[0] - max_sessions
    if too_many <= 0 or dropped.full:
        return
    # A session's depth is its place in its first level, newest first: taking the deepest, one after the other, always takes
    # the least recently used session of whoever holds most.
    victims = db.execute(
        "SELECT route, session, bytes FROM (SELECT route, session, bytes, last_used, row_number() OVER "
        "(PARTITION BY first_level ORDER BY last_used DESC, route DESC, session DESC) AS depth FROM sessions) s "
        f"WHERE {idle} ORDER BY depth DESC, last_used, route, session LIMIT ?",
        (min(too_many, PURGE_ROWS + 1),),
    ).fetchall()
    _drop_sessions(db, dropped, victims)


def free_pages(db: sqlite3.Connection) -> None:
    """Give some of what was freed back to the disk; the rest stays for what comes next."""
    spare = _number(db, "freelist_count") - SPARE_PAGES
    for _ in range(min(spare, VACUUM_PAGES)):
        db.execute("PRAGMA incremental_vacuum(1)")


def _drop_sessions(db: sqlite3.Connection, dropped: Portion, rows: list[tuple[str, str, int]]) -> None:
    for route, session, size in rows:
        if not dropped.takes(size):
            return
        histories.drop(db, (route, session))


def _used_bytes(db: sqlite3.Connection) -> int:
    """Of the whole database: while that is small, nobody has to be asked what he holds."""
    return (_number(db, "page_count") - _number(db, "freelist_count")) * _number(db, "page_size")


def _number(db: sqlite3.Connection, pragma: str) -> int:
    return int(db.execute(f"PRAGMA {pragma}").fetchone()[0])
