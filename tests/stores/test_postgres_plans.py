"""What runs for every request finds its rows by an index, however many others there are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llamacpp_mqtt_deploy.core.admission import QueueLimits
from llamacpp_mqtt_deploy.pool_ports import Member, PoolRequest
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores.postgres.database import Database
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, change, database_in, entry
from tests.support.waiting import eventually

_Result = TypeVar("_Result")

ENDED, WAITING = 100_000, 10_000
LIMITS = QueueLimits(queue_size=100_000, session_queue=1000, share=1.0, max_bytes=1 << 40)

_FILL = """
    INSERT INTO {s}.entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, terminal, reply_topic,
        delivered, ended_at, ended_order, first_level, bytes, fence)
    SELECT n, 'default', 'u' || n %% 50 || '/s' || n %% 1000, 'e' || n, 't', 'd', {now}, 'ended', 1, 'end', 'r', true, {now}, n,
        'u' || n %% 50, 3, 1 FROM generate_series(1, {ended}) n;
    INSERT INTO {s}.entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, reply_topic, delivered,
        first_level, bytes)
    SELECT {ended} + n, 'default', 'u' || n %% 50 || '/s' || n %% 5000, 'w' || n, 't', 'd', {now}, 'accepted', 0, 'r', false,
        'u' || n %% 50, 0 FROM generate_series(1, {waiting}) n;
    INSERT INTO {s}.payloads (id, payload) SELECT {ended} + n, 'x' FROM generate_series(1, {waiting}) n;
    INSERT INTO {s}.queue (id, route, session, request_id, first_level, lane, in_turn, size, since)
    SELECT id, route, session, request_id, first_level, 1, true, 1, 0 FROM {s}.entries WHERE state <> 'ended';
    INSERT INTO {s}.sessions (route, session, first_level, created, last_used, bytes)
    SELECT 'default', 'u' || n %% 50 || '/s' || n, 'u' || n %% 50, {now}, {now}, 4000 FROM generate_series(0, 9999) n;
    INSERT INTO {s}.messages (session_id, role, message)
    SELECT id, 'user', '{{"role":"user","content":"hi"}}' FROM {s}.sessions, generate_series(1, 10);
    SELECT setval('{s}.places', {ended} + {waiting} + 1);
"""


def test_among_a_hundred_thousand_ended_and_ten_thousand_waiting_requests_no_table_of_the_journal_is_read_as_a_whole(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    database = database_in(postgres, tmp_path)
    schema = database.schema
    _life(database, postgres, requests=0)
    for statement in _FILL.format(s=schema, now=NOW, ended=ENDED, waiting=WAITING).replace("%%", "%").split(";\n"):
        if statement.strip():
            postgres.sql(statement)
    for table in ("entries", "payloads", "queue", "sessions", "messages"):
        postgres.sql(f"ANALYZE {schema}.{table}")
    beginning = _life(database, postgres, requests=0)  # to join is no matter of every request
    read = _life(database, postgres, requests=8)
    tables = ("entries", "payloads", "chunks", "sessions", "messages")
    assert [table for table in tables if read[table] > beginning[table]] == []


def _life(database: Database, postgres: PostgresServer, *, requests: int) -> dict[str, int]:
    """How often each table was read as a whole by a worker that handled so many requests."""
    before = _whole_reads(postgres, database.schema)
    database = replace(database, name=f"lmd with {requests}")
    journal = SharedPostgresJournal(database, lease_s=60.0)
    journal.open()
    journal.join(Member(worker_id="w", instance="i", slots=4))
    took: dict[str, float] = {}
    for number in range(requests):
        _one_request(journal, number, took)
    journal.close()
    print({name: f"{1000 * each:.1f} ms" for name, each in took.items()})
    # It is counted when a connection ends.
    connected = f"SELECT 1 FROM pg_stat_activity WHERE application_name = '{database.name}'"
    eventually(lambda: not postgres.sql(connected))
    after = _whole_reads(postgres, database.schema)
    return {table: count - before.get(table, 0) for table, count in after.items()}


def _one_request(journal: SharedPostgresJournal, number: int, took: dict[str, float]) -> None:
    session = ("default", f"new/s{number}")
    key = EntryKey(*session, f"r{number}")
    made = PoolRequest(entry=entry(key.request_id, session), first_level="new", lane=0, in_turn=True)
    history = change("q", "a", session=session)
    _timed(took, "enqueue", lambda: journal.enqueue([made], limits=LIMITS, retry_after_s=1.0, aging_s=30.0))
    claimed = _timed(took, "claim", lambda: journal.claim(1, models=(), aging_s=30.0, prefer_for_s=1.0))
    assert [each.entry.key for each in claimed] == [key]
    _timed(took, "start", lambda: journal.mark_started(key))
    _timed(took, "stream", lambda: journal.mark_streaming(key))
    _timed(took, "finish", lambda: journal.finish(key, b"end", now=NOW, history=history, chunks=b"c"))
    _timed(took, "find", lambda: journal.find(EntryKey("default", "u1/s1", "e1")))
    _timed(took, "history", lambda: journal.history(("default", "u1/s1")))
    _timed(took, "undelivered", journal.undelivered)
    _timed(took, "delivered", lambda: journal.mark_delivered([key]))
    _timed(took, "cancel", lambda: journal.cancel(("default", "u3/s3"), f"none{number}"))
    _timed(took, "renew", journal.renew)


def _whole_reads(postgres: PostgresServer, schema: str) -> dict[str, int]:
    rows = postgres.sql(f"SELECT relname, seq_scan FROM pg_stat_user_tables WHERE schemaname = '{schema}'")
    return {str(name): int(str(count)) for name, count in rows}


def _timed(took: dict[str, float], name: str, step: Callable[[], _Result]) -> _Result:
    began = time.monotonic()
    result = step()
    took[name] = min(took.get(name, 99.0), time.monotonic() - began)
    return result
