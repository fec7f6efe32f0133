"""What a worker takes over from another one is its own to end, whatever goes wrong at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.events import encode, interrupted
from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores.postgres.database import Database
from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.pool.fleet import SHORT_LEASE_S, Fleet, PooledWorker, fleet_on
from tests.support.mosquitto import Mosquitto
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, entry, key
from tests.support.waiting import eventually


@pytest.fixture
def fleet(mosquitto: Mosquitto, postgres: PostgresServer) -> Iterator[Fleet]:
    with fleet_on(mosquitto, postgres.url, lease_s=SHORT_LEASE_S) as made:
        yield made


def _journal(worker: PooledWorker) -> Any:
    return worker.daemon.parts.store


def _away() -> None:
    raise StoreError("The database is away for a moment.")


def test_a_database_that_fails_right_after_a_takeover_costs_no_request_its_end(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, gate = [fleet.worker() for _ in range(2)], Gate()
    for worker in workers:
        worker.engine.play("half ", gate, "and half")
    asked = fleet.ask("go on")
    fleet.until(type="chunk", request_id=asked)
    gone, heir = sorted(workers, key=lambda worker: not worker.engine.calls)
    journal = _journal(heir)
    take_over, finish = journal.take_over, journal.finish
    failed = Event()

    def fail_once(*args: Any, **fields: Any) -> None:
        if not failed.is_set():
            failed.set()
            _away()
        finish(*args, **fields)

    def then_fail(fence: int) -> Any:
        claimed = take_over(fence)
        monkeypatch.setattr(journal, "finish", fail_once)
        return claimed

    monkeypatch.setattr(journal, "take_over", then_fail)
    monkeypatch.setattr(_journal(gone), "renew", _away)
    end = fleet.end(asked)
    assert (end["type"], end["code"]) == ("error", "interrupted")
    gate.open()
    assert failed.wait(10)
    eventually(lambda: journal.find(key(asked, ("default", "ada"))).terminal == encode(end))


def test_a_request_that_a_worker_claimed_and_does_not_know_of_is_run_after_a_while(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.pooled.membership._DISOWN_AFTER_S", 1.0)
    worker = fleet.worker()
    journal = _journal(worker)
    claim = journal.claim
    claimed: list[Any] = []

    def claim_in_vain(*args: Any, **fields: Any) -> list[Any]:
        found = claim(*args, **fields)
        if claimed:
            return list(found)
        claimed.extend(found)
        return []

    monkeypatch.setattr(journal, "claim", claim_in_vain)
    asked = fleet.ask("one two")
    assert fleet.end(asked)["full_content"] == "one two"
    assert [each.entry.key.request_id for each in claimed] == [asked]


def test_a_claim_that_the_database_forgot_in_a_crash_is_made_again_and_runs_once(
    fleet: Fleet, postgres: PostgresServer
) -> None:
    gate = Gate()
    worker = fleet.worker(engine=ScriptedEngine(slots=2))
    worker.engine.play(gate, "one two")
    asked = fleet.ask("go on")
    assert gate.reached.wait(10)
    # As if a crash had taken back the last commit that waited for no disk.
    owned = f"FROM lmd_{fleet.root}.queue WHERE request_id = '{asked}' AND owner IS NOT NULL"
    ((owner,),) = postgres.sql(f"SELECT owner {owned}")
    postgres.sql(f"UPDATE lmd_{fleet.root}.queue SET owner = NULL WHERE request_id = '{asked}'")
    eventually(lambda: postgres.sql(f"SELECT owner {owned}") == [(owner,)])
    gate.open()
    end = fleet.end(asked)
    assert (end["type"], end["full_content"]) == ("done", "one two")
    eventually(lambda: worker.daemon.parts.registry.all() == [])
    kinds = [event["type"] for _, _, event in fleet.heard if event.get("request_id") == asked]
    assert kinds.count("start") == kinds.count("done") == len(worker.engine.calls) == 1


def test_an_end_that_a_worker_without_a_pool_has_not_told_is_told_by_the_pool(
    fleet: Fleet, postgres: PostgresServer
) -> None:
    alone = PostgresStore(Database(url=postgres.url, schema=f"lmd_{fleet.root}"))
    alone.open()
    topic, entry_key = f"{fleet.root}/reply/ada", key("r1", ("default", "ada"))
    alone.accept([entry("r1", ("default", "ada"), topic=f"{fleet.root}/request/ada", reply_topic=topic)])
    ids = {"request_id": "r1", "session_id": "ada"}
    alone.finish(
        entry_key,
        interrupted(**ids, code="engine_lost", message="It was lost.", retryable=True, metadata=None),
        now=NOW,
    )
    alone.close()
    worker = fleet.worker()
    assert fleet.end("r1")["code"] == "engine_lost"
    assert fleet.end(fleet.ask("one two"))["full_content"] == "one two"
    eventually(lambda: _journal(worker).undelivered() == [])
