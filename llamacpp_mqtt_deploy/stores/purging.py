"""What a purge drops: ended requests and sessions whose time has passed, and what is too much of them."""

# ruff: noqa: S608  every statement is joined from constants of this file; values are bound
from __future__ import annotations

import sqlite3

from llamacpp_mqtt_deploy.stores import entries, histories
from llamacpp_mqtt_deploy.stores.bounds import CLOCK_SET_S, CLOCK_SLACK_S, PURGE_ROWS, UNDELIVERED_S


def mend_times(db: sqlite3.Connection, now: float) -> None:
    for table, column, where in (
        # Both values are named so that the index is used: this runs with every purge.
        ("entries", "ended_at", "state = 'ended' AND delivered IN (0, 1) AND"),
        ("sessions", "last_used", ""),
    ):
        statement = f"UPDATE {table} SET {column} = ? WHERE {where} {column}"
        db.execute(f"{statement} > ?", (now, now + CLOCK_SLACK_S))
        if now >= CLOCK_SET_S:
            db.execute(f"{statement} < ?", (now, CLOCK_SET_S))


def old_entries(db: sqlite3.Connection, now: float, remember_s: float) -> int:
    # Two halves, since an OR would read the whole index.
    old = db.execute(
        "SELECT id FROM ("
        "SELECT id, ended_order FROM entries WHERE state = 'ended' AND delivered = 1 AND ended_at < :old UNION ALL "
        "SELECT id, ended_order FROM entries WHERE state = 'ended' AND delivered = 0 AND ended_at < min(:old, :lost)) "
        "ORDER BY ended_order LIMIT :most",
        {"old": now - remember_s, "lost": now - UNDELIVERED_S, "most": PURGE_ROWS},
    ).fetchall()
    entries.drop(db, old)
    return len(old)


def old_sessions(db: sqlite3.Connection, now: float, ttl_s: float, max_sessions: int) -> int:
    idle = (
        "NOT EXISTS (SELECT 1 FROM entries e WHERE e.route = s.route AND e.session = s.session AND e.state <> 'ended')"
    )
    old = db.execute(
        f"SELECT route, session FROM sessions s WHERE last_used < ? AND {idle} "
        "ORDER BY last_used, route, session LIMIT ?",
        (now - ttl_s, PURGE_ROWS),
    ).fetchall()
    for session in old:
        histories.drop(db, session)
    excess = db.execute("SELECT count(*) FROM sessions").fetchone()[0] - max_sessions
    if excess <= 0:
        return len(old)
    # A session's depth is its place in its level, newest first: taking the deepest, one after the other, always takes
    # the least recently used session of whoever holds most.
    victims = db.execute(
        "SELECT route, session FROM (SELECT route, session, last_used, row_number() OVER (PARTITION BY first_level "
        "ORDER BY last_used DESC, route DESC, session DESC) AS depth FROM sessions) s "
        f"WHERE {idle} ORDER BY depth DESC, last_used, route, session LIMIT ?",
        (min(excess, PURGE_ROWS - len(old)),),
    ).fetchall()
    for session in victims:
        histories.drop(db, session)
    return len(old) + len(victims)
