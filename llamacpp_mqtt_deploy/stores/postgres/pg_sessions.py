"""Sessions' own system prompts, and the ledger, in PostgreSQL, as statements inside a transaction."""

from __future__ import annotations

from llamacpp_mqtt_deploy.core.spending import LedgerRow
from llamacpp_mqtt_deploy.stores.bounds import days_to_forget, first_level_of
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection

SessionKey = tuple[str, str]


def prompt(db: BoundedConnection, session: SessionKey) -> str | None:
    row = db.execute("SELECT prompt FROM system_prompts WHERE route = %s AND session = %s", session).fetchone()
    return None if row is None else bytes(row[0]).decode()


def write_prompt(db: BoundedConnection, session: SessionKey, prompt: str | None, *, now: float) -> None:
    """Keep it with its session, which is used by that; None takes it away."""
    route, name = session
    if prompt is None:
        db.execute("DELETE FROM system_prompts WHERE route = %s AND session = %s", session)
        return
    # A session that holds a prompt has its row, so that it is forgotten with all others when its time has passed.
    db.execute(
        "INSERT INTO sessions AS s (route, session, first_level, created, last_used, bytes) VALUES (%s, %s, %s, %s, %s, 0) "
        "ON CONFLICT (route, session) DO UPDATE SET last_used = greatest(s.last_used, excluded.last_used)",
        (route, name, first_level_of(name), now, now),
    )
    db.execute(
        "INSERT INTO system_prompts (route, session, prompt) VALUES (%s, %s, %s) "
        "ON CONFLICT (route, session) DO UPDATE SET prompt = excluded.prompt",
        (*session, prompt.encode()),
    )


def newest(db: BoundedConnection) -> int:
    """The highest number of a session."""
    row = db.execute("SELECT coalesce(max(id), 0) FROM sessions").fetchone()
    return 0 if row is None else int(row[0])


def numbered(db: BoundedConnection, route: str, *, up_to: int, most: int) -> tuple[tuple[int, str], ...]:
    """Sessions of the route, the newest first."""
    rows = db.execute(
        "SELECT id, session FROM sessions WHERE route = %s AND id <= %s ORDER BY id DESC LIMIT %s", (route, up_to, most)
    ).fetchall()
    return tuple((row[0], row[1]) for row in rows)


def begun_in_pool(db: BoundedConnection, route: str, *, age_s: float) -> tuple[str, ...]:
    """Those with a request that waits or that some worker runs, without those that came in the last so many seconds. One that came
    later than now is older: the database's clock was set back since."""
    rows = db.execute(
        "SELECT DISTINCT session FROM queue, (SELECT clock_timestamp() AS now) AS clock WHERE route = %s "
        "AND NOT (arrived > now - make_interval(secs => %s) AND arrived <= now)",
        (route, age_s),
    ).fetchall()
    return tuple(row[0] for row in rows)


def ledger(
    db: BoundedConnection, *, since_day: int, until_day: int | None, first_level: str | None, skip: int, most: int
) -> list[LedgerRow]:
    """The newest day first, and within it who took most tokens first; of all workers together."""
    found = db.execute(
        "SELECT day, first_level, sum(requests), sum(tokens_in), sum(tokens_out), sum(engine_s) FROM ledger "
        "WHERE day >= %(since)s AND (%(until)s::bigint IS NULL OR day <= %(until)s) "
        "AND (%(level)s::text IS NULL OR first_level = %(level)s) GROUP BY day, first_level "
        "ORDER BY day DESC, sum(tokens_in) + sum(tokens_out) DESC, first_level LIMIT %(most)s OFFSET %(skip)s",
        {"since": since_day, "until": until_day, "level": first_level, "most": most, "skip": skip},
    ).fetchall()
    return [
        LedgerRow(
            day=row[0],
            first_level=row[1],
            requests=int(row[2]),
            tokens_in=int(row[3]),
            tokens_out=int(row[4]),
            engine_s=float(row[5]),
        )
        for row in found
    ]


def tidy_ledger(db: BoundedConnection, today: int) -> None:
    """Add up what workers have written into rows of their own on days that are over, and forget days beyond the bound."""
    db.execute(
        "WITH gone AS (DELETE FROM ledger WHERE day < %s AND part <> '' RETURNING *) "
        "INSERT INTO ledger AS l (day, first_level, part, requests, tokens_in, tokens_out, engine_s) "
        "SELECT day, first_level, '', sum(requests), sum(tokens_in), sum(tokens_out), sum(engine_s) FROM gone "
        "GROUP BY day, first_level ON CONFLICT (day, first_level, part) DO UPDATE SET "
        "requests = l.requests + excluded.requests, tokens_in = l.tokens_in + excluded.tokens_in, "
        "tokens_out = l.tokens_out + excluded.tokens_out, engine_s = l.engine_s + excluded.engine_s",
        (today - 1,),
    )
    days = [row[0] for row in db.execute("SELECT DISTINCT day FROM ledger ORDER BY day").fetchall()]
    if gone := days_to_forget(days, today):
        db.execute("DELETE FROM ledger WHERE day = ANY(%s)", (gone,))
