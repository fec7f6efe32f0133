"""Places and turns of the common queue beside those of the queue of a worker alone, and the counts that they rest on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.core.admission import AdmissionQueue
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.queue_places import QueueLimits
from llamacpp_mqtt_deploy.core.turns import Ticket
from llamacpp_mqtt_deploy.pool_ports import Member, PoolRequest
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores.postgres import pg_schema, queue_counts
from llamacpp_mqtt_deploy.stores.postgres.common_queue import waiting_queue
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, database_in, entry

AGING_S = 30.0
LIMITS = QueueLimits(queue_size=9, session_queue=2, max_bytes=400, share=0.5)
SESSIONS = [("default", name) for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "c", "d", "e/1", "e/2")]
_COUNTED = """
    SELECT first_level, model, lane, sum(places), sum(bytes) FROM (
        SELECT first_level, coalesce(model, '') AS model, lane - risen AS lane, 1 AS places, size AS bytes FROM {s}.queue
        WHERE owner IS NULL AND ending IS NULL
        UNION ALL SELECT first_level, model, lane, -places, -bytes FROM {s}.queue_lanes
        UNION ALL SELECT first_level, model, lane, -places, -bytes FROM {s}.queue_changes
    ) AS counted GROUP BY 1, 2, 3 HAVING sum(places) <> 0 OR sum(bytes) <> 0
"""
_SUMMED = """
    SELECT (SELECT coalesce(sum(places), 0) FROM {s}.queue_lanes), (SELECT coalesce(sum(places), 0) FROM {s}.queue_levels),
        (SELECT places FROM {s}.queue_total), (SELECT coalesce(sum(bytes), 0) FROM {s}.queue_lanes),
        (SELECT coalesce(sum(bytes), 0) FROM {s}.queue_levels), (SELECT bytes FROM {s}.queue_total)
"""


class Pool:
    """One member on a schema of its own, and the same state as a worker alone would have it."""

    def __init__(self, server: PostgresServer, folder: Path) -> None:
        self.database = database_in(server, folder)
        self.schema = self.database.schema
        self.journal = SharedPostgresJournal(self.database, lease_s=600.0)
        self.journal.open()
        self.join()
        self.number = 0
        self.db = self.database.connect()

    def join(self) -> None:
        self.journal.join(Member(worker_id="w", instance="i", slots=4))

    def sql(self, statement: str) -> list[tuple[object, ...]]:
        found = self.db.execute(statement.format(s=self.schema).encode())
        return found.fetchall() if found.description else []

    def close(self) -> None:
        self.db.close()
        self.journal.close()

    def on_one_box(self) -> AdmissionQueue:
        queue = waiting_queue(self.db, aging_s=AGING_S, most=1000)()
        assert queue is not None
        queue.limits = LIMITS
        return queue

    def request(
        self, session: tuple[str, str], *, lane: int = 1, in_turn: bool = True, size: int = 10, model: str | None = None
    ) -> PoolRequest:
        self.number += 1
        return PoolRequest(
            entry=entry(f"r{self.number}", session, payload=b"x" * size),
            first_level=session[1].partition("/")[0],
            lane=lane,
            in_turn=in_turn,
            model=model,
        )

    def enqueue(self, *requests: PoolRequest, limits: QueueLimits = LIMITS) -> tuple[list[str], list[EntryKey]]:
        """What each was told, and who lost a place."""
        outcomes, leaving = self.journal.enqueue(requests, limits=limits, retry_after_s=1.0, aging_s=AGING_S)
        for each in leaving:
            self.journal.finish(each.entry.key, b"end", now=NOW)
        told = [each.refused.code if each.refused is not None else "in" for each in outcomes]
        return told, [each.entry.key for each in leaving]

    def take(self, models: tuple[str, ...] = ()) -> EntryKey | None:
        claimed = self.journal.claim(1, models=models, aging_s=AGING_S, prefer_for_s=0.0)
        assert len(claimed) <= 1
        return claimed[0].entry.key if claimed else None

    def counts_are_right(self) -> None:
        assert self.sql(_COUNTED) == []
        lanes, levels, places, sizes, of_levels, of_all = self.sql(_SUMMED)[0]
        assert (lanes, sizes) == (levels, of_levels) == (places, of_all)


@pytest.fixture
def pool(postgres: PostgresServer, tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(postgres, tmp_path)
    yield pool
    pool.close()


@pytest.mark.parametrize("seed", range(4))
def test_whoever_has_a_place_loses_it_or_is_next_is_so_by_the_rules_of_one_box(pool: Pool, seed: int) -> None:
    chance = random.Random(seed)
    running: list[EntryKey] = []
    refused = evicted = 0

    def enqueue() -> None:
        nonlocal refused, evicted
        burst = [
            pool.request(
                chance.choice(SESSIONS),
                lane=chance.choice([0, 1, 1, 2]),
                in_turn=chance.random() < 0.6,
                size=chance.choice([5, 20, 60, 150]),
            )
            for _ in range(chance.choice([1, 1, 2, 4]))
        ]
        expected, leaving = _on_one_box(pool.on_one_box(), burst)
        assert pool.enqueue(*burst) == (expected, leaving)
        refused, evicted = refused + sum(each != "in" for each in expected), evicted + len(leaving)

    def take() -> None:
        expected = pool.on_one_box().next(0.0)
        found = pool.take()
        assert found == (None if expected is None else expected.key)
        if found is not None:
            running.append(found)

    def finish() -> None:
        if running:
            pool.journal.finish(running.pop(chance.randrange(len(running))), b"end", now=NOW)

    def give_back() -> None:
        if running:
            pool.journal.release([running.pop()])

    def cancel() -> None:
        found = pool.journal.cancel(chance.choice(SESSIONS), None)
        for each in found.claimed:
            pool.journal.finish(each.entry.key, b"end", now=NOW)

    def let_time_pass() -> None:
        pool.sql("UPDATE {s}.queue SET arrived = arrived - interval '17 s'")

    steps = {enqueue: 8, take: 5, finish: 4, give_back: 1, cancel: 1, let_time_pass: 1}
    for step in chance.choices([*steps], [*steps.values()], k=120):
        step()
        pool.counts_are_right()
    assert refused > 5
    assert evicted > 2


def _on_one_box(queue: AdmissionQueue, burst: list[PoolRequest]) -> tuple[list[str], list[EntryKey]]:
    told: list[str] = []
    gone: list[EntryKey] = []
    for request in burst:
        key = request.entry.key
        chain = (key.route, key.session) if request.in_turn else None
        size = len(request.entry.payload)
        ticket = Ticket(key, request.lane, request.first_level, chain, arrived=0.0, size=size)
        try:
            leaving = queue.admit(ticket, retry_after_s=1.0)
        except RequestError as refusal:
            told.append(refusal.code)
            continue
        told.append("in")
        gone += [other.key for other in leaving if isinstance(other.key, EntryKey)]
    return told, gone


def test_levels_with_nothing_that_this_worker_may_run_are_passed_over(pool: Pool) -> None:
    wide = QueueLimits(queue_size=1000, session_queue=9, share=1.0)
    for number in range(30):
        pool.enqueue(pool.request(("default", f"big{number}"), model="big"), limits=wide)
    last = pool.request(("default", "small"), lane=2)
    pool.enqueue(last, limits=wide)
    assert pool.take() == last.entry.key
    assert pool.take() is None
    assert pool.take(models=("big",)) == EntryKey("default", "big0", "r1")


def test_in_a_queue_of_many_levels_turns_go_round(pool: Pool) -> None:
    wide = QueueLimits(queue_size=1000, session_queue=9, share=1.0)
    levels = 90  # more than are added up at once
    burst = [pool.request(("default", f"u{n:02}"), in_turn=False) for _ in range(2) for n in range(levels)]
    pool.enqueue(*burst, limits=wide)
    taken = [pool.take() for _ in burst]
    assert taken == [each.entry.key for each in burst]


def _older_worker_adds(pool: Pool, name: str, *, lane: int) -> None:
    """Its statements, which name none of the newer columns and tables."""
    pool.sql(
        "INSERT INTO {s}.entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, reply_topic, delivered, "
        "first_level, bytes) "
        f"VALUES (nextval('{{s}}.places'), 'default', 'old', '{name}', 't', 'd', 1, 'accepted', 0, 'r', false, 'old', 0)"
    )
    pool.sql(
        "INSERT INTO {s}.queue (id, route, session, request_id, first_level, lane, in_turn, size, since) SELECT id, route, session, "
        f"request_id, first_level, {lane}, false, 7, 0 FROM {{s}}.entries WHERE request_id = '{name}'"
    )


def test_what_an_older_worker_puts_into_the_queue_and_takes_out_is_counted(pool: Pool) -> None:
    ours = pool.request(("default", "new"))
    pool.enqueue(ours)
    _older_worker_adds(pool, "theirs", lane=0)
    pool.counts_are_right()
    assert pool.take() == EntryKey("default", "old", "theirs")
    pool.sql("UPDATE {s}.queue SET owner = 1 WHERE request_id = 'r1'")
    pool.counts_are_right()
    assert pool.take() is None
    pool.sql("UPDATE {s}.queue SET owner = NULL WHERE request_id = 'r1'")
    assert pool.take() == ours.entry.key


def test_a_queue_of_the_older_layout_goes_on_after_the_upgrade(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = database_in(postgres, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pg_schema, "MIGRATIONS", pg_schema.MIGRATIONS[:1])
        with database.connect() as db:
            pg_schema.prepare(database, db)
    postgres.sql(
        f"INSERT INTO {database.schema}.entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, "
        "reply_topic, delivered, first_level, bytes) SELECT n, 'default', 'u' || n, 'r' || n, 't', 'd', 1, 'accepted', 0, 'r', "
        "false, 'u' || n, 0 FROM generate_series(1, 3) n RETURNING id"
    )
    postgres.sql(
        f"INSERT INTO {database.schema}.queue (id, route, session, request_id, first_level, lane, in_turn, size, since) SELECT id, "
        f"route, session, request_id, first_level, 1, true, 7, 0 FROM {database.schema}.entries RETURNING id"
    )
    pool = Pool(postgres, tmp_path)
    pool.counts_are_right()
    assert [pool.take() for _ in range(4)] == [*(EntryKey("default", f"u{n}", f"r{n}") for n in (1, 2, 3)), None]
    pool.close()


def test_counts_that_went_wrong_are_right_again_when_a_worker_joins(pool: Pool) -> None:
    made = [pool.request(("default", f"u{n}")) for n in range(4)]
    pool.enqueue(*made)
    pool.sql("UPDATE {s}.queue_levels SET places = 99, bytes = 5")
    pool.sql("DELETE FROM {s}.queue_lanes")
    pool.sql("DELETE FROM {s}.queue_total")
    pool.join()
    pool.counts_are_right()
    assert [pool.take() for _ in made] == [each.entry.key for each in made]


def test_what_older_workers_do_while_they_are_alone_for_long_is_not_noted_and_counted_once_a_newer_one_is_back(
    pool: Pool,
) -> None:
    for name, come_back in (("one", pool.join), ("two", pool.journal.renew)):
        pool.sql("UPDATE {s}.queue_total SET counted_until = clock_timestamp() - interval '1 s'")
        _older_worker_adds(pool, name, lane=1)
        assert pool.sql("SELECT 1 FROM {s}.queue_changes WHERE places > 0") == []
        come_back()
        pool.counts_are_right()
        assert pool.take() == EntryKey("default", "old", name)


def test_a_worker_that_lives_keeps_changes_noted(pool: Pool) -> None:
    pool.sql("UPDATE {s}.queue_total SET counted_until = clock_timestamp() + interval '30 minutes'")
    pool.journal.renew()
    left = pool.sql("SELECT counted_until > clock_timestamp() + interval '1 hour' FROM {s}.queue_total")
    assert left == [(True,)]
    pool.enqueue(pool.request(("default", "u")))
    pool.counts_are_right()


def test_counts_and_turns_of_those_who_come_no_more_are_forgotten(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_counts, "REMEMBERED_TURNS", 3)
    for number in range(6):
        pool.enqueue(pool.request(("default", f"u{number}")))
        found = pool.take()
        assert found is not None
        pool.journal.finish(found, b"end", now=NOW)
    pool.enqueue(pool.request(("default", "waits")))
    pool.journal.purge(now=NOW, remember_s=600.0, ttl_s=600.0, max_sessions=100)
    assert pool.sql("SELECT first_level FROM {s}.queue_lanes") == [("waits",)]
    assert pool.sql("SELECT first_level FROM {s}.queue_levels") == [("waits",)]
    assert pool.sql("SELECT first_level FROM {s}.level_turns ORDER BY turn") == [("u3",), ("u4",), ("u5",)]
    assert pool.sql("SELECT session FROM {s}.session_turns ORDER BY turn") == [("u3",), ("u4",), ("u5",)]
    pool.counts_are_right()
