"""Who runs what next: a worker takes from the common queue those whose turn it is."""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psycopg

from llamacpp_mqtt_deploy.core.turns import LANES, Ticket, Turns
from llamacpp_mqtt_deploy.stores.postgres.common_queue import arrived_s
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text
from llamacpp_mqtt_deploy.stores.postgres.queue_counts import THIS_WAITS

AT_ONCE = 16
"""Most that one look at the queue picks."""

ENDS_AT_ONCE = 8
"""Most that are claimed at once only to be ended."""

LOOKED_AT = 256
"""Of a first level, in a lane and for a model, so many are looked at in search of one that can go. Those that cannot are prompts of
sessions that run or are held, or that have an earlier prompt in another lane: a level that has more of them than this at its
front waits for itself."""

RISE_AT_ONCE = 256
"""Most requests of a lane that one claim moves up."""

_LOOKS = 4
"""How often a claim looks again when other workers took what it picked."""

# A prompt goes when no earlier one of its session is left and nobody holds the session; and not yet where a worker that has the
# session's prompt in its cache has a slot free.
_HELD = (
    "EXISTS (SELECT 1 FROM held_sessions h WHERE q.in_turn AND h.route = q.route AND h.session = q.session "
    "AND h.until > clock_timestamp())"
)
_READY = f"""
    q.id <> ALL(%(tried)s)
    AND NOT EXISTS (
        SELECT 1 FROM queue e WHERE q.in_turn AND e.in_turn AND e.route = q.route AND e.session = q.session
        AND (e.id < q.id OR e.owner IS NOT NULL)
    )
    AND NOT {_HELD}
    AND NOT EXISTS (
        SELECT 1 FROM session_turns t WHERE q.in_turn AND q.arrived > statement_timestamp() - make_interval(secs => %(prefer_for_s)s)
        AND t.route = q.route AND t.session = q.session AND t.worker_id IN (SELECT worker_id FROM roomy)
    )
"""
_FRONT = f"""
    (
        SELECT id, lane, first_level, since, arrived, route, session, in_turn FROM queue
        WHERE owner IS NULL AND ending IS NULL AND first_level = l.first_level
        AND coalesce(model, '') COLLATE "C" = l.model AND lane - risen = l.lane ORDER BY since, arrived, id LIMIT {LOOKED_AT}
    ) AS q
"""
"""The first ones of a level, in a lane and for a model, in their order."""

# Of each first level its best ones, and of the levels the best: whatever `Turns` takes first is among these, since a turn makes no
# level's rank better. Within a lane the levels are kept in the order of their turns; those of which something has changed since are
# looked at in any case.
_CANDIDATES = f"""
    WITH roomy AS MATERIALIZED (
        SELECT worker_id FROM members m WHERE worker_id <> %(worker_id)s AND NOT draining AND lease_until > clock_timestamp()
        AND slots > (SELECT count(*) FROM queue WHERE owner = m.fence)
    ), changed AS MATERIALIZED (
        SELECT DISTINCT first_level FROM queue_changes
    ), lanes AS MATERIALIZED (
        SELECT model, lane::smallint FROM unnest(%(models)s::text[]) AS model, generate_series(0, {len(LANES) - 1}) AS lane
    ), looked_at AS (
        SELECT wanted.model, wanted.lane, found.first_level FROM lanes wanted CROSS JOIN LATERAL (
            SELECT l.first_level FROM queue_lanes l WHERE l.model = wanted.model AND l.lane = wanted.lane AND l.places > 0
            AND l.first_level <> ALL(ARRAY(SELECT first_level FROM changed)) AND EXISTS (SELECT 1 FROM {_FRONT} WHERE {_READY})
            ORDER BY l.turn, l.came LIMIT %(most)s
        ) AS found
        UNION ALL SELECT wanted.model, wanted.lane, changed.first_level FROM lanes wanted CROSS JOIN changed
    ), ready AS (
        SELECT best.*, greatest(0, best.lane - floor(-{arrived_s("best")} / %(aging_s)s)::int) AS aged
        FROM looked_at l CROSS JOIN LATERAL (
            SELECT * FROM {_FRONT} WHERE {_READY} ORDER BY since, arrived, id LIMIT %(most)s
        ) AS best
    ), ranked AS (
        SELECT *, row_number() OVER (PARTITION BY first_level ORDER BY aged, since, arrived, id) AS place FROM ready
    ), heads AS (
        SELECT first_level, coalesce(turn, 0) AS turn FROM ranked LEFT JOIN level_turns USING (first_level) WHERE place = 1
        ORDER BY aged, coalesce(turn, 0), since, arrived, id LIMIT %(most)s
    )
    SELECT id, lane, first_level, route, session, in_turn, {arrived_s("ranked")}, since, turn,
        (SELECT count(*) FROM changed)
    FROM ranked JOIN heads USING (first_level) WHERE place <= %(most)s ORDER BY id
"""
# Those that move up a lane now. Whoever is being taken at this moment needs it no more.
_RISE = f"""
    UPDATE queue SET risen = least(lane, floor(extract(epoch FROM statement_timestamp() - arrived) / %(aging_s)s)::int)
    WHERE id = ANY(ARRAY(
        SELECT due.id FROM (VALUES {", ".join(f"({lane}, {risen})" for lane in range(len(LANES)) for risen in range(lane))})
            AS step (lane, risen)
        CROSS JOIN LATERAL (
            SELECT id FROM queue q WHERE owner IS NULL AND ending IS NULL AND q.risen < q.lane
            AND q.lane = step.lane::smallint AND q.risen = step.risen::smallint
            AND q.arrived < statement_timestamp() - make_interval(secs => %(aging_s)s * (step.risen + 1))
            ORDER BY q.arrived LIMIT {RISE_AT_ONCE} FOR UPDATE SKIP LOCKED
        ) AS due
    ))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Who claims, and what it may get."""

    fence: int
    worker_id: str
    models: Sequence[str]
    aging_s: float
    prefer_for_s: float


def take_ends(db: BoundedConnection, fence: int) -> Callable[[], list[tuple[Any, ...]]]:
    """Those that are only to be ended, a few; what is returned gives rows of (id, why, by_own_level)."""
    found = [
        db.execute(
            text(
                "UPDATE queue SET owner = %s, ending = coalesce(ending, 'expired') WHERE id IN (SELECT id FROM queue "
                f"WHERE owner IS NULL AND {which} LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING id, ending, by_own_level"
            ),
            (fence, ENDS_AT_ONCE),
        )
        for which in ("ending IS NOT NULL ORDER BY id", "deadline < clock_timestamp() ORDER BY deadline")
    ]
    return lambda: [row for cursor in found for row in cursor.fetchall()]


class TurnTaking:
    """One claim of up to `free`, whose first question is on its way when this is made."""

    def __init__(self, db: BoundedConnection, free: int, wishes: Wishes) -> None:
        self._db = db
        self._free = free
        self._wishes = wishes
        self._tried: list[int] = []
        self.unsummed = 0
        """How many levels have changes that were not added up."""
        self._asked: psycopg.Cursor[tuple[Any, ...]] | None = None
        if free > 0:
            db.execute(text(_RISE), {"aging_s": wishes.aging_s})
            self._asked = self._ask(min(free, AT_ONCE))

    def take(self) -> list[tuple[Any, ...]]:
        """Rows of (id, None, False)."""
        taken: list[tuple[Any, ...]] = []
        for _ in range(_LOOKS + self._free // AT_ONCE):
            wanted = min(self._free - len(taken), AT_ONCE)
            picked = self._pick(wanted)
            if not picked:
                break
            got = _lock(self._db, self._wishes.fence, [ticket.key for ticket in picked])
            self._tried += [int(str(ticket.key)) for ticket in picked if ticket.key not in got]
            mine = [ticket for ticket in picked if ticket.key in got]
            _note_turns(self._db, mine, self._wishes.worker_id)
            taken += [(ticket.key, None, False) for ticket in mine]
            if len(picked) < wanted or len(taken) == self._free:
                break
        return taken

    def _ask(self, most: int) -> psycopg.Cursor[tuple[Any, ...]]:
        return self._db.execute(
            text(_CANDIDATES),
            {
                "tried": self._tried,
                "worker_id": self._wishes.worker_id,
                "models": ["", *self._wishes.models],
                "aging_s": self._wishes.aging_s,
                "prefer_for_s": self._wishes.prefer_for_s,
                "most": most,
            },
        )

    def _pick(self, most: int) -> list[Ticket]:
        if most <= 0:
            return []
        asked, self._asked = self._asked or self._ask(most), None
        rows = asked.fetchall()
        self.unsummed = max((row[9] for row in rows), default=0)
        turns = Turns(self._wishes.aging_s)
        turns.recall({row[2]: row[8] for row in rows})
        tickets = []
        for entry_id, lane, first_level, route, session, in_turn, arrived, since, _, _ in rows:
            ticket = Ticket(entry_id, lane, first_level, (route, session) if in_turn else None, arrived=arrived)
            turns.arrive(ticket)
            ticket.came_at_turn = since
            tickets.append(ticket)
        return list(islice(turns.order([[ticket] for ticket in tickets], now=0.0), most))


def _lock(db: BoundedConnection, fence: int, ids: Sequence[object]) -> set[object]:
    rows = db.execute(
        text(
            "UPDATE queue SET owner = %s WHERE id IN (SELECT id FROM queue q WHERE id = ANY(%s) "
            f"AND {THIS_WAITS} AND NOT {_HELD} FOR UPDATE SKIP LOCKED) RETURNING id"
        ),
        (fence, list(ids)),
    ).fetchall()
    return {row[0] for row in rows}


def _note_turns(db: BoundedConnection, tickets: Sequence[Ticket], worker_id: str) -> None:
    """They have their turns, and so have their levels and sessions, in this order."""
    if not tickets:
        return
    # Numbers of a sequence, taken in the order of the turns.
    numbered = "SELECT n, nextval('turns') AS turn FROM generate_series(1, %s) AS n ORDER BY n"
    rows = db.execute(text(numbered), (len(tickets),)).fetchall()
    turns = [int(row[1]) for row in rows]
    levels = {ticket.first_level: turn for ticket, turn in zip(tickets, turns, strict=True)}
    # In one order everywhere, so that two workers never wait for each other.
    names = sorted(levels)
    db.execute(
        "INSERT INTO level_turns (first_level, turn) SELECT * FROM unnest(%s::text[], %s::bigint[]) ORDER BY 1 "
        "ON CONFLICT (first_level) DO UPDATE SET turn = greatest(level_turns.turn, excluded.turn)",
        (names, [levels[name] for name in names]),
    )
    sessions = {t.session: turn for t, turn in zip(tickets, turns, strict=True) if isinstance(t.session, tuple)}
    if sessions:
        keys = sorted(sessions)
        routes, paths, numbers = [k[0] for k in keys], [k[1] for k in keys], [sessions[k] for k in keys]
        db.execute(
            "INSERT INTO session_turns (route, session, turn, worker_id) "
            "SELECT r, s, t, %s FROM unnest(%s::text[], %s::text[], %s::bigint[]) AS given (r, s, t) ORDER BY r, s "
            "ON CONFLICT (route, session) DO UPDATE SET turn = excluded.turn, worker_id = excluded.worker_id",
            (worker_id, routes, paths, numbers),
        )
        db.execute(
            "UPDATE queue SET since = t FROM (SELECT id, t FROM queue "
            "JOIN unnest(%s::text[], %s::text[], %s::bigint[]) AS given (r, s, t) ON route = r AND session = s "
            "WHERE in_turn AND owner IS NULL FOR UPDATE OF queue SKIP LOCKED) AS next WHERE queue.id = next.id",
            (routes, paths, numbers),
        )
