"""Several workers that start at once on a database where nothing is yet."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from llamacpp_mqtt_deploy.stores.postgres.database import Database
from llamacpp_mqtt_deploy.stores.postgres.pg_schema import prepare
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually


def test_a_worker_that_waited_while_another_made_the_tables_uses_them(postgres: PostgresServer) -> None:
    database = Database(url=postgres.tcp_url(), schema=f"together_{uuid.uuid4().hex[:8]}")
    first, second = database.connect(), database.connect()
    second_pid = second.info.backend_pid
    waits = f"SELECT 1 FROM pg_locks WHERE pid = {second_pid} AND locktype = 'advisory' AND NOT granted"
    with first, second, ThreadPoolExecutor(1) as thread:
        first.execute("BEGIN")
        first.execute("SELECT pg_advisory_xact_lock(%s)", (database.lock_key("layout"),))
        preparing = thread.submit(prepare, database, second)
        eventually(lambda: postgres.sql(waits), 10)
        prepare(database, first)
        first.execute("COMMIT")
        preparing.result(10)
        assert second.execute("SELECT count(*) FROM layout").fetchone() == (1,)
