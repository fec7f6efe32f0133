"""What one request costs the database in a long queue beside a short one, in rows that are read."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.core.queue_places import QueueLimits
from llamacpp_mqtt_deploy.pool_ports import Member, PoolRequest
from llamacpp_mqtt_deploy.stores.postgres.database import Database
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, database_in, entry
from tests.support.waiting import eventually

FEW, MANY = 20, 2000
TURNS = 6

_ENTRIES = """
    INSERT INTO {s}.entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, reply_topic, delivered,
        first_level, bytes)
    SELECT nextval('{s}.places'), 'default', 'u' || n % {levels} || '/s' || n / 2, 'w' || n, 't', 'd', {now}, 'accepted', 0, 'r',
        false, 'u' || n % {levels}, 0 FROM generate_series(1, {waiting}) n RETURNING id
"""
_BODIES = "INSERT INTO {s}.payloads (id, payload) SELECT id, 'x' FROM {s}.entries RETURNING id"
_QUEUE = """
    INSERT INTO {s}.queue (id, route, session, request_id, first_level, lane, in_turn, size, since)
    SELECT id, route, session, request_id, first_level, 1 + id % 2, true, 1, 0 FROM {s}.entries RETURNING id
"""


@pytest.mark.parametrize("levels", [5, MANY], ids=["few_clients", "many_clients"])
@pytest.mark.parametrize("full", [False, True], ids=["with_places_left", "full"])
def test_a_request_in_a_long_queue_costs_as_much_as_in_a_short_one(
    postgres: PostgresServer, tmp_path: Path, *, levels: int, full: bool
) -> None:
    short = _rows_read(postgres, tmp_path / "short", waiting=FEW, levels=levels, full=full)
    long = _rows_read(postgres, tmp_path / "long", waiting=MANY, levels=levels, full=full)
    print(short, long)
    assert long < short + 60 * TURNS
    assert long < 300 * TURNS, "a request reads a part of the queue that does not grow with it"


def _rows_read(postgres: PostgresServer, folder: Path, *, waiting: int, levels: int, full: bool) -> int:
    """By a worker that enqueues and claims some requests, without what its joining reads."""
    database = database_in(postgres, folder)
    _life(database, postgres, waiting=0, turns=0, full=False)
    for statement in (_ENTRIES, _BODIES, _QUEUE):
        postgres.sql(statement.format(s=database.schema, now=NOW, waiting=waiting, levels=levels))
    _life(database, postgres, waiting=waiting, turns=0, full=full)  # adds up what was filled in
    beginning = _life(database, postgres, waiting=waiting, turns=0, full=full)
    return _life(database, postgres, waiting=waiting, turns=TURNS, full=full) - beginning


def _life(database: Database, postgres: PostgresServer, *, waiting: int, turns: int, full: bool) -> int:
    before = _read_so_far(postgres, database.schema)
    database = replace(database, name=f"lmd {uuid.uuid4().hex[:12]}")
    journal = SharedPostgresJournal(database, lease_s=600.0)
    journal.open()
    journal.join(Member(worker_id="w", instance="i", slots=4))
    size = waiting if full else waiting + 100
    limits = QueueLimits(queue_size=max(1, size), session_queue=9, share=1.0)
    for number in range(turns):
        made = PoolRequest(
            entry=entry(f"r{number}", ("default", f"new/s{number}")), first_level="new", lane=1, in_turn=True
        )
        outcomes, leaving = journal.enqueue([made], limits=limits, retry_after_s=1.0, aging_s=30.0)
        if outcomes[0].refused is not None:
            continue
        assert bool(leaving) == full
        for each in (*leaving, *journal.claim(1, models=(), aging_s=30.0, prefer_for_s=0.0)):
            journal.finish(each.entry.key, b"end", now=NOW)
        if full:  # the place that became free
            refill = replace(made, entry=entry(f"f{number}", ("default", f"u1/f{number}")), first_level="u1")
            journal.enqueue([refill], limits=limits, retry_after_s=1.0, aging_s=30.0)
    journal.close()
    # It is counted when a connection ends.
    connected = f"SELECT 1 FROM pg_stat_activity WHERE application_name = '{database.name}'"
    eventually(lambda: not postgres.sql(connected))
    return _read_so_far(postgres, database.schema) - before


def _read_so_far(postgres: PostgresServer, schema: str) -> int:
    rows = postgres.sql(
        "SELECT coalesce(sum(seq_tup_read), 0) + coalesce((SELECT sum(idx_tup_read) FROM pg_stat_user_indexes "
        f"WHERE schemaname = '{schema}'), 0) FROM pg_stat_user_tables WHERE schemaname = '{schema}'"
    )
    return int(str(rows[0][0]))
