"""A worker of a pool that stands still in the middle of a transaction, with locks that the others need."""

from __future__ import annotations

import time
import uuid

from llamacpp_mqtt_deploy.config.loading import load
from llamacpp_mqtt_deploy.pool_ports import Member
from llamacpp_mqtt_deploy.stores.postgres import database_of
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.stores.test_shared_journal import LIMITS, request
from tests.support.postgres_server import PostgresServer

LEASE_S = 2.0


def test_a_worker_that_is_frozen_in_a_transaction_costs_no_other_worker_its_lease(postgres: PostgresServer) -> None:
    given = {
        "mqtt.root": f"frozen{uuid.uuid4().hex[:8]}",
        "sessions.store": "postgres",
        "sessions.url": postgres.tcp_url(),
        "pool.name": "fleet",
        "pool.lease_s": str(LEASE_S),
    }
    database = database_of(load(None, given, environ={}).settings, lambda: None)
    journal = SharedPostgresJournal(database, lease_s=LEASE_S)
    journal.open()
    try:
        journal.join(Member(worker_id="a", instance="a-1", slots=1))
        with database.connect() as frozen:
            frozen.execute("BEGIN")
            frozen.execute("SELECT pg_advisory_xact_lock(%s)", (database.lock_key("queue"),))
            journal.renew()
            began = time.monotonic()
            journal.enqueue([request("r1")], limits=LIMITS, retry_after_s=1.0, aging_s=30.0)
            assert time.monotonic() - began < LEASE_S / 2
            journal.renew()
            frozen.close()
    finally:
        journal.close()
