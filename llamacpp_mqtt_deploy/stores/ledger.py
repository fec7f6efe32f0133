"""The ledger's rows: what each first level has spent in a day, as statements inside a transaction."""

from __future__ import annotations

import sqlite3

from llamacpp_mqtt_deploy.core.spending import REST, LedgerRow, Spent, day_of
from llamacpp_mqtt_deploy.stores.bounds import LEDGER_DAYS, LEDGER_LEVELS, days_to_forget


def add(db: sqlite3.Connection, spent: Spent, now: float) -> None:
    """Count one request. The first of a new day forgets a day beyond the bound."""
    day, first_level = day_of(now), spent.first_level
    if _add_to(db, day, first_level, spent):
        return
    levels = db.execute("SELECT count(*) FROM ledger WHERE day = ?", (day,)).fetchone()[0]
    if levels == 0:
        _make_room(db, day)
    if levels >= LEDGER_LEVELS:
        first_level = REST
        if _add_to(db, day, first_level, spent):
            return
    db.execute(
        "INSERT INTO ledger (day, first_level, requests, tokens_in, tokens_out, engine_s) VALUES (?, ?, 1, ?, ?, ?)",
        (day, first_level, spent.tokens_in, spent.tokens_out, spent.engine_s),
    )


def rows(
    db: sqlite3.Connection, *, since_day: int, until_day: int | None, first_level: str | None, skip: int, most: int
) -> list[LedgerRow]:
    """The newest day first, and within it who took most tokens first."""
    found = db.execute(
        "SELECT day, first_level, requests, tokens_in, tokens_out, engine_s FROM ledger "
        "WHERE day >= :since AND (:until IS NULL OR day <= :until) AND (:level IS NULL OR first_level = :level) "
        "ORDER BY day DESC, tokens_in + tokens_out DESC, first_level LIMIT :most OFFSET :skip",
        {"since": since_day, "until": until_day, "level": first_level, "most": most, "skip": skip},
    )
    return [
        LedgerRow(day=row[0], first_level=row[1], requests=row[2], tokens_in=row[3], tokens_out=row[4], engine_s=row[5])
        for row in found
    ]


def _add_to(db: sqlite3.Connection, day: int, first_level: str, spent: Spent) -> bool:
    """Count the request in a row that is there; False when there is none."""
    changed = db.execute(
        "UPDATE ledger SET requests = requests + 1, tokens_in = tokens_in + ?, tokens_out = tokens_out + ?, "
        "engine_s = engine_s + ? WHERE day = ? AND first_level = ?",
        (spent.tokens_in, spent.tokens_out, spent.engine_s, day, first_level),
    )
    return changed.rowcount > 0


def _make_room(db: sqlite3.Connection, today: int) -> None:
    days = [row[0] for row in db.execute("SELECT DISTINCT day FROM ledger ORDER BY day")]
    gone = days_to_forget(days, today, most=LEDGER_DAYS - 1)
    db.executemany("DELETE FROM ledger WHERE day = ?", [(day,) for day in gone])
