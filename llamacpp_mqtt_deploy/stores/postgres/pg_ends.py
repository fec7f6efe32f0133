"""The end of a request in PostgreSQL, with its history and its costs: one statement, so that many can be on their way at once."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llamacpp_mqtt_deploy.core.spending import DAY_S, REST, Spent
from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange
from llamacpp_mqtt_deploy.stores.bounds import KEEP_SHARE, LEDGER_LEVELS, first_level_of
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text

FoundAtEnd = Literal["unknown", "unfinished", "ended_here", "ended"]
"""`ended_here`: by the same fence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """What is stored when a request ends. `now` is None where the database's clock counts; `part` names the worker's own rows of the
    ledger, so that two workers never wait for each other there."""

    key: EntryKey
    terminal: bytes
    chunks: bytes | None
    history: HistoryChange | None
    appended: Sequence[tuple[str, bytes]]
    """Role and JSON of each message of `history`."""
    spent: Spent | None
    now: float | None
    max_history_bytes: int
    part: str = ""


_BY_KEY = "route = %(route)s AND session = %(session)s AND request_id = %(request_id)s"
_NOW = "coalesce(%(now)s, extract(epoch FROM clock_timestamp()))"

_MINE = {
    False: "mine AS (SELECT id FROM known WHERE state <> 'ended'), ",
    True: f"mine AS (DELETE FROM queue WHERE {_BY_KEY} AND owner = %(fence)s RETURNING id), ",
}
"""What may be ended: without and with a fence."""

_REST = f"""
    ended AS (
        UPDATE entries SET state = 'ended', terminal = %(terminal)s, bytes = %(bytes)s, delivered = false, ended_at = {_NOW},
            ended_order = nextval('places'), fence = %(fence)s
        FROM mine WHERE entries.id = mine.id AND state <> 'ended' RETURNING entries.id
    ), body AS (
        DELETE FROM payloads USING ended WHERE payloads.id = ended.id
    ), record AS (
        INSERT INTO chunks (id, record) SELECT id, %(chunks)s::bytea FROM ended WHERE %(chunks)s::bytea IS NOT NULL
    ), told AS (
        SELECT EXISTS (SELECT 1 FROM ended) AS unfinished, EXISTS (SELECT 1 FROM known) AS known,
            EXISTS (SELECT 1 FROM known WHERE state = 'ended' AND fence = %(fence)s) AS here
    ), talk AS (
        INSERT INTO sessions AS s (route, session, first_level, created, last_used, bytes)
        SELECT %(h_route)s, %(h_session)s, %(h_level)s, {_NOW}, {_NOW}, %(added)s FROM told
        WHERE %(has_history)s AND (unfinished OR (NOT known AND %(fence)s::bigint IS NULL))
        ON CONFLICT (route, session) DO UPDATE SET last_used = greatest(s.last_used, excluded.last_used),
            bytes = CASE WHEN %(forget)s THEN 0 ELSE s.bytes END + excluded.bytes
        RETURNING id
    ), forgotten AS (
        DELETE FROM messages USING talk WHERE session_id = talk.id AND %(forget)s
    ), appended AS (
        INSERT INTO messages (session_id, role, message) SELECT talk.id, role, message
        FROM talk, unnest(%(roles)s::text[], %(messages)s::bytea[]) WITH ORDINALITY AS given (role, message, place) ORDER BY place
    ), counted AS (
        INSERT INTO ledger AS l (day, first_level, part, requests, tokens_in, tokens_out, engine_s)
        SELECT floor({_NOW} / {DAY_S}), CASE
                WHEN EXISTS (SELECT 1 FROM ledger WHERE day = floor({_NOW} / {DAY_S}) AND first_level = %(level)s) THEN %(level)s
                WHEN (SELECT count(DISTINCT first_level) FROM ledger WHERE day = floor({_NOW} / {DAY_S})) < {LEDGER_LEVELS}
                    THEN %(level)s
                ELSE '{REST}' END,
            %(part)s, 1, %(tokens_in)s, %(tokens_out)s, %(engine_s)s
        FROM told WHERE unfinished AND %(has_spent)s
        ON CONFLICT (day, first_level, part) DO UPDATE SET requests = l.requests + 1,
            tokens_in = l.tokens_in + excluded.tokens_in, tokens_out = l.tokens_out + excluded.tokens_out,
            engine_s = l.engine_s + excluded.engine_s
    )
    SELECT unfinished, known, here, EXISTS (
        SELECT 1 FROM queue WHERE route = %(route)s AND session = %(session)s AND owner IS NULL AND unfinished
    ) FROM told
"""
_STATEMENTS = {
    fenced: f"WITH known AS (SELECT id, state, fence FROM entries WHERE {_BY_KEY}), {mine} {_REST}"
    for fenced, mine in _MINE.items()
}

# As `bounds.messages_to_forget`: the oldest exchanges, up to the first user message from which on little enough is left.
_TRIM = f"""
    WITH talk AS (
        SELECT id, bytes FROM sessions WHERE route = %(h_route)s AND session = %(h_session)s AND bytes > %(most)s
    ), sized AS (
        SELECT m.id, m.role, sum(length(m.message)) OVER (ORDER BY m.id DESC) AS left_over,
            row_number() OVER (ORDER BY m.id) AS place
        FROM messages m JOIN talk ON m.session_id = talk.id
    ), cut AS (
        SELECT coalesce(min(id) FILTER (WHERE left_over <= %(most)s * {KEEP_SHARE}), max(id)) AS first_kept
        FROM sized WHERE role = 'user' AND place > 1
    ), dropped AS (
        DELETE FROM messages USING talk, cut WHERE session_id = talk.id AND messages.id < first_kept
        RETURNING length(message) AS size
    )
    UPDATE sessions SET bytes = sessions.bytes - (SELECT coalesce(sum(size), 0) FROM dropped)
    FROM talk WHERE sessions.id = talk.id
"""


def end(
    db: BoundedConnection, request: RequestEnd, *, fence: int | None, on_next: Callable[[], None] = lambda: None
) -> Callable[[], FoundAtEnd]:
    """Store it all, if the request is unfinished and (where there is a fence) its owner's; the history also under an unknown key
    where there is none. What is returned tells how it was found, and calls back when a later prompt of the session waits."""
    values = _values(request) | {"fence": fence}
    found = db.execute(text(_STATEMENTS[fence is not None]), values)
    if request.history is not None:
        db.execute(text(_TRIM), values | {"most": request.max_history_bytes})

    def read() -> FoundAtEnd:
        row = found.fetchone()
        assert row is not None
        unfinished, known, here, waiting = row
        if waiting:
            on_next()
        if unfinished:
            return "unfinished"
        return "unknown" if not known else "ended_here" if here else "ended"

    return read


def ended_by(db: BoundedConnection, key: EntryKey, fence: int) -> bool:
    """Whether it was this worker that ended the request."""
    row = db.execute(
        "SELECT 1 FROM entries WHERE route = %s AND session = %s AND request_id = %s AND state = 'ended' AND fence = %s",
        (key.route, key.session, key.request_id, fence),
    ).fetchone()
    return row is not None


def _values(request: RequestEnd) -> dict[str, Any]:
    key, history, spent = request.key, request.history, request.spent
    h_route, h_session = ("", "") if history is None else history.session
    spent_on = spent or Spent(first_level="")
    return {
        "route": key.route,
        "session": key.session,
        "request_id": key.request_id,
        "terminal": request.terminal,
        "bytes": len(request.terminal) + len(request.chunks or b""),
        "chunks": request.chunks,
        "now": request.now,
        "has_history": history is not None,
        "h_route": h_route,
        "h_session": h_session,
        "h_level": first_level_of(h_session),
        "forget": history is not None and history.forget_before,
        "added": sum(len(message) for _, message in request.appended),
        "roles": [role for role, _ in request.appended],
        "messages": [message for _, message in request.appended],
        "has_spent": spent is not None,
        "level": spent_on.first_level,
        "tokens_in": spent_on.tokens_in,
        "tokens_out": spent_on.tokens_out,
        "engine_s": spent_on.engine_s,
        "part": request.part,
    }
