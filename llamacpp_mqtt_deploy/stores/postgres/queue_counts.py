"""How much waits, kept as counts: so that a long queue costs a newcomer no more than a short one.

Triggers note each change of what waits in the table `queue_changes`, in the same transaction: so older workers count too, nothing
is lost in a crash, and no two transactions wait for each other's count. Whoever holds the lock of the queue moves the changes into
the tables of sums. Within one statement sums and changes together are always exact.
"""

# ruff: noqa: S608  every statement is joined from constants of this package; values are bound
from __future__ import annotations

from collections.abc import Sequence

from llamacpp_mqtt_deploy.core.queue_places import Counted, Measure
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, text

FOLD_ABOVE = 64
"""When so many levels have changes that were not added up, a claim sees to it: with no newcomers nobody else does."""

_TIDIED = 5000
"""Rows that one tidying takes out of a table."""

REMEMBERED_TURNS = 50_000
"""First levels, and sessions, whose last turn is remembered; both are named by clients."""

_WAITS = "owner IS NULL AND ending IS NULL"

THIS_WAITS = "num_nulls(owner, ending) = 2"
"""The same in words that no index is made for: of rows that are found by their key, which the database would else look for in one of
all that wait."""

_PAGE = 16
"""Most tickets that are looked at at once in search of those that lose their place."""

_ALL = (1, "")
"""There is no further one."""

# The sums of all lanes of a level that changed are written anew, since its turn has changed for all of them.
_FOLD = """
    WITH gone AS (
        DELETE FROM queue_changes RETURNING request, first_level, model, lane, places, bytes
    ), named AS (
        SELECT DISTINCT first_level FROM gone
    ), levels AS (
        INSERT INTO queue_levels AS l (first_level, places, bytes)
        SELECT first_level, sum(places), sum(bytes) FROM gone GROUP BY first_level
        ON CONFLICT (first_level) DO UPDATE SET places = l.places + excluded.places, bytes = l.bytes + excluded.bytes
    ), lanes AS (
        INSERT INTO queue_lanes AS l (first_level, model, lane, places, bytes, turn, came)
        SELECT c.first_level, c.model, c.lane, sum(c.places), sum(c.bytes),
            coalesce((SELECT turn FROM level_turns t WHERE t.first_level = c.first_level), 0),
            coalesce(min(c.request) FILTER (WHERE c.places > 0), 0)
        FROM (
            SELECT first_level, model, lane, places, bytes, request FROM gone
            UNION ALL
            SELECT n.first_level, k.model, k.lane, 0, 0, 0 FROM named n CROSS JOIN LATERAL (
                SELECT model, lane FROM queue_lanes k WHERE k.first_level = n.first_level OFFSET 0
            ) AS k
        ) AS c GROUP BY c.first_level, c.model, c.lane
        ON CONFLICT (first_level, model, lane) DO UPDATE SET places = l.places + excluded.places,
            bytes = l.bytes + excluded.bytes, turn = excluded.turn,
            came = CASE WHEN l.places > 0 THEN l.came ELSE excluded.came END
    )
    UPDATE queue_total SET places = places + coalesce((SELECT sum(g.places) FROM gone g), 0),
        bytes = bytes + coalesce((SELECT sum(g.bytes) FROM gone g), 0)
"""
# What is counted beside what there is, as further changes.
_CORRECTION = f"""
    INSERT INTO queue_changes (request, first_level, model, lane, places, bytes)
    SELECT coalesce(min(request), 0), first_level, model, lane, sum(places), sum(bytes) FROM (
        SELECT id AS request, first_level, coalesce(model, '') COLLATE "C" AS model, lane - risen AS lane, 1 AS places, size AS bytes
        FROM queue WHERE {_WAITS}
        UNION ALL SELECT NULL, first_level, model, lane, -places, -bytes FROM queue_lanes
        UNION ALL SELECT NULL, first_level, model, lane, -places, -bytes FROM queue_changes
    ) AS counted GROUP BY first_level, model, lane HAVING sum(places) <> 0 OR sum(bytes) <> 0
"""


def prefer_indexes(db: BoundedConnection) -> None:
    """For the rest of the transaction: take rows from the index that has them in order. Of a queue that has just grown the database
    believes that it is short, and would rather read it as a whole and sort it. And plan each statement once, not for each set of
    values: that takes longer than to run it."""
    db.execute(
        "SELECT set_config('enable_sort', 'off', true), set_config('enable_seqscan', 'off', true), "
        "set_config('plan_cache_mode', 'force_generic_plan', true)"
    )


def fold(db: BoundedConnection) -> None:
    """Add up the changes. For whoever holds the lock of the queue, in a transaction that should `prefer_indexes`."""
    db.execute(text(_FOLD))


def fold_alone(db: BoundedConnection) -> None:
    """The same in a transaction that is for nothing else."""
    prefer_indexes(db)
    fold(db)


def keep_counting(db: BoundedConnection) -> bool:
    """Now and then: changes are noted for the next hours too. False where they were not for a while: `recount` is needed."""
    db.execute(
        "UPDATE queue_total SET counted_until = clock_timestamp() + interval '2 hours' WHERE counted_until BETWEEN "
        "clock_timestamp() + interval '1 minute' AND clock_timestamp() + interval '1 hour'"
    )
    return _are_noted(db)


def _are_noted(db: BoundedConnection) -> bool:
    """Whether changes are, and will be for as long as any transaction takes."""
    row = db.execute(
        "SELECT 1 FROM queue_total WHERE counted_until > clock_timestamp() + interval '1 minute'"
    ).fetchone()
    return row is not None


def recount(db: BoundedConnection) -> None:
    """Make all counts right, whatever they were. For whoever holds the lock of the queue; this reads all that waits."""
    if not _are_noted(db):
        # Until this is over nobody changes the queue: what is under way now may not be noted.
        db.execute("LOCK TABLE queue IN SHARE ROW EXCLUSIVE MODE")
    prefer_indexes(db)
    db.execute("DELETE FROM queue_lanes WHERE places = 0 AND bytes = 0")
    db.execute("DELETE FROM queue_levels")
    db.execute(
        "INSERT INTO queue_levels (first_level, places, bytes) SELECT first_level, sum(places), sum(bytes) FROM queue_lanes "
        "GROUP BY first_level"
    )
    db.execute("DELETE FROM queue_total")
    db.execute(
        "INSERT INTO queue_total (places, bytes, counted_until) SELECT coalesce(sum(places), 0), coalesce(sum(bytes), 0), "
        "clock_timestamp() + interval '2 hours' FROM queue_lanes"
    )
    db.execute(text(_CORRECTION))
    fold(db)


def tidy(db: BoundedConnection) -> None:
    """Forget counts of those who have nothing waiting, and the oldest turns. For whoever holds the lock of the queue."""
    fold_alone(db)
    for table, empty in (("queue_lanes", "places = 0"), ("queue_levels", "places = 0")):
        db.execute(
            text(f"DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE {empty} LIMIT {_TIDIED}))")
        )
    for table in ("level_turns", "session_turns"):
        # Never waits: a claim may be writing them.
        db.execute(
            text(
                f"DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE turn <= "
                f"(SELECT turn FROM {table} ORDER BY turn DESC OFFSET %s LIMIT 1) ORDER BY turn LIMIT {_TIDIED} "
                "FOR UPDATE SKIP LOCKED))"
            ),
            (REMEMBERED_TURNS,),
        )


class CountedQueue:
    """Satisfies `queue_places.Waiting`, for one transaction that holds the lock of the queue: the counts at its beginning, and what
    `enter` and `leave` have changed since.

    The transaction should `prefer_indexes`. It is asked about `levels` and `sessions` (pairs of route and session) alone; its questions
    are on their way when it is made.
    """

    def __init__(self, db: BoundedConnection, levels: Sequence[str], sessions: Sequence[tuple[str, str]]) -> None:
        self._db = db
        self._asked_levels = sorted(set(levels))
        self._asked_sessions = sorted(set(sessions))
        self._levels: dict[str, list[int]] = {}
        self._in_all = [0, 0]
        self._sessions: dict[tuple[str, str], tuple[int, bool]] = {}
        self._pages: dict[tuple[str, int], list[Ticket]] = {}
        self._seen: dict[str, tuple[int, str]] = {}
        """By measure: of the levels in their order, those that hold most first, the last one that was looked up."""
        self._gone: set[int] = set()
        self.outdated = False
        """Others have taken what was counted here: `ask` and `read` again."""
        self.ask()

    def ask(self) -> None:
        fold(self._db)
        self._counts = self._db.execute(
            "SELECT first_level, places, bytes FROM queue_levels WHERE first_level = ANY(%s) "
            "UNION ALL SELECT NULL, places, bytes FROM queue_total",
            (self._asked_levels,),
        )
        self._chains = self._db.execute(
            text(
                "SELECT route, session, (SELECT count(*) FROM queue q WHERE in_turn AND q.route = g.route "
                f"AND q.session = g.session AND {THIS_WAITS}), EXISTS (SELECT 1 FROM queue q WHERE in_turn AND q.route = g.route "
                "AND q.session = g.session AND owner IS NOT NULL) FROM unnest(%s::text[], %s::text[]) AS g (route, session)"
            ),
            ([route for route, _ in self._asked_sessions], [session for _, session in self._asked_sessions]),
        )

    def read(self) -> None:
        self.outdated = False
        self._pages.clear()
        self._seen.clear()
        self._levels = {level: [0, 0] for level in self._asked_levels}
        for level, places, size in self._counts.fetchall():
            if level is None:
                self._in_all = [places, size]
            else:
                self._levels[level] = [places, size]
        self._sessions = {(row[0], row[1]): (row[2], row[3]) for row in self._chains.fetchall()}

    def __len__(self) -> int:
        return self._in_all[0]

    # --- as the rules ask ------------------------------------------------------------------------------------------------

    def in_session(self, session: tuple[str, str]) -> tuple[int, bool]:
        """How many prompts of it wait, and whether one of them is some worker's."""
        return self._sessions[session]

    def held(self, measure: Measure, level: str | None = None) -> int:
        return (self._in_all if level is None else self._levels[level])[measure.name == "bytes"]

    def largest(self, measure: Measure, *, but: str, without: Counted) -> tuple[str, int] | None:
        while True:
            left = {
                level: self.held(measure, level) - without.held(measure, level)
                for level, (places, _) in self._levels.items()
                if level != but and places > without.places(level)
            }
            found = min(((-held, level) for level, held in left.items()), default=None)
            seen = self._seen.get(measure.name)
            if seen is not None and (seen == _ALL or (found is not None and found <= seen)):
                return None if found is None else (found[1], -found[0])
            self._seen[measure.name] = self._look_up_the_next(measure)

    def _look_up_the_next(self, measure: Measure) -> tuple[int, str]:
        """Of the levels that are not known here the one that holds most: all others hold no more."""
        order = "bytes" if measure.name == "bytes" else "places"
        row = self._db.execute(
            text(
                "SELECT first_level, places, bytes FROM queue_levels WHERE places > 0 AND first_level <> ALL(%s) "
                f"ORDER BY {order} DESC, first_level LIMIT 1"
            ),
            (list(self._levels),),
        ).fetchone()
        if row is None:
            return _ALL
        self._levels[row[0]] = [row[1], row[2]]
        return -self.held(measure, row[0]), row[0]

    def last(self, level: str, *, lower_than: int = -1, without: Counted) -> Ticket | None:
        page = self._pages.setdefault((level, lower_than), [])
        found = self._first_left(page, without)
        if found is None:
            page += self._newest(level, lower_than, self._gone | {int(str(key)) for key in without.keys})
            found = self._first_left(page, without)
        if found is None and lower_than < 0:
            self.outdated = True
        return found

    def _first_left(self, page: Sequence[Ticket], without: Counted) -> Ticket | None:
        return next((each for each in page if each.key not in self._gone and each.key not in without.keys), None)

    def _newest(self, level: str, lower_than: int, gone: set[int]) -> list[Ticket]:
        rows = self._db.execute(
            text(
                f"SELECT id, lane, route, session, in_turn, size FROM queue WHERE {_WAITS} AND first_level = %s AND lane > %s "
                f"AND id <> ALL(%s) ORDER BY lane DESC, arrived DESC, id DESC LIMIT {_PAGE}"
            ),
            (level, lower_than, list(gone)),
        ).fetchall()
        return [
            Ticket(row[0], row[1], level, (row[2], row[3]) if row[4] else None, arrived=0.0, size=row[5])
            for row in rows
        ]

    # --- what changes ----------------------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> None:
        """It was written into the queue."""
        self._pages.clear()
        self._change(ticket, 1)

    def leave(self, ticket: Ticket) -> None:
        """It has lost its place."""
        self._gone.add(int(str(ticket.key)))
        self._change(ticket, -1)

    def _change(self, ticket: Ticket, by: int) -> None:
        for held in (self._in_all, self._levels[ticket.first_level]):
            held[0] += by
            held[1] += by * ticket.size
        session = ticket.session
        if isinstance(session, tuple) and session in self._sessions:
            waiting, busy = self._sessions[session]
            self._sessions[session] = (waiting + by, busy)
