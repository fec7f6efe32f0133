"""A COMMIT that happened and whose answer was lost with its connection: whoever waits for the write hears what it really did.

The connection is cut before the answer is there, or the server ends it right after: a server that is stopped says so behind its last
answer, and both arrive together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from llamacpp_mqtt_deploy.pool_ports import LeaseLost
from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.stores.test_shared_journal import Worker, request
from tests.support.cable import Cable
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, SESSION, change, database_in, entry, key
from tests.support.waiting import eventually

_Result = TypeVar("_Result")
_LOCK = 4711

_COMMITTED = b"COMMIT\x00"
"""In the answer to COMMIT (PostgreSQL 15, section 55.7: CommandComplete)."""


class Cut:
    """The way of one store to its database. Its commits can be held up, and cut off from their answers."""

    def __init__(self, postgres: PostgresServer, cable: Cable, directory: Path, how: str) -> None:
        self._postgres, self._cable, self._how = postgres, cable, how
        self.database = replace(database_in(postgres, directory), url=postgres.tcp_url(cable.port), name="lmd cut")

    def prepare(self) -> None:
        """The tables are there. From now on each commit of this store waits while a test holds the lock."""
        schema = self.database.schema
        self._postgres.sql(
            f"CREATE FUNCTION {schema}.wait() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN PERFORM pg_advisory_xact_lock({_LOCK}); RETURN NULL; END $$"
        )
        self._postgres.sql(
            f"CREATE CONSTRAINT TRIGGER wait AFTER UPDATE ON {schema}.writers DEFERRABLE INITIALLY DEFERRED "
            f"FOR EACH ROW WHEN (NEW.name = '{self.database.name}') EXECUTE FUNCTION {schema}.wait()"
        )

    def losing_the_answer(self, write: Callable[[], _Result]) -> _Result:
        """What `write` gives, or raises, where the connection is lost with the answer to its COMMIT."""
        with (
            ThreadPoolExecutor(1) as pool,
            psycopg.connect(self._postgres.url, autocommit=True) as holder,
        ):
            holder.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
            before = self._number()
            result = pool.submit(write)
            eventually(self._is_committing)
            ((pid,),) = self._committing()
            if self._how == "cut":
                self._cable.stall()
            else:
                self._cable.hold_from(_COMMITTED)
            holder.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))
            eventually(lambda: self._number() != before)
            if self._how == "cut":
                self._cable.cut()
            else:
                self._cable.wait_until_holding()
                self._postgres.sql(f"SELECT pg_terminate_backend({pid}, 5000)")
            self._cable.resume()
            wait([result], 0.3)
            self._cable.cut()
            return result.result(20)

    def _number(self) -> object:
        """That of the store's last transaction which was committed."""
        return self._postgres.sql(
            f"SELECT number FROM {self.database.schema}.writers WHERE name = '{self.database.name}'"
        )

    def _is_committing(self) -> bool:
        return bool(self._committing())

    def _committing(self) -> Sequence[tuple[Any, ...]]:
        return self._postgres.sql(
            f"SELECT pid FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event = 'advisory' "
            f"AND application_name = '{self.database.name}'"
        )


@pytest.fixture(params=["cut", "ended by the server"])
def cut(
    request: pytest.FixtureRequest, postgres: PostgresServer, cable_to: Callable[[int], Cable], tmp_path: Path
) -> Cut:
    return Cut(postgres, cable_to(postgres.port), tmp_path, request.param)


@pytest.fixture
def worker(cut: Cut) -> Iterator[Worker]:
    """A member of the pool, whose way to the database can be cut."""
    journal = SharedPostgresJournal(cut.database, lease_s=30.0)
    journal.open()
    cut.prepare()
    yield Worker(journal, "a")
    journal.close()


@pytest.fixture
def other(postgres: PostgresServer, tmp_path: Path, worker: Worker) -> Iterator[Worker]:
    """Another member, with a way of its own."""
    journal = SharedPostgresJournal(replace(database_in(postgres, tmp_path), name="lmd other"), lease_s=30.0)
    journal.open()
    yield Worker(journal, "b")
    journal.close()


# --- of a pool -------------------------------------------------------------------------------------------------------------


def test_what_was_claimed_is_given_to_who_claimed_it(cut: Cut, worker: Worker) -> None:
    worker.enqueue(request("r1"), request("r2", ("default", "hall")))
    claimed = cut.losing_the_answer(lambda: worker.claim(2))
    assert [(each.why, each.entry.key.request_id, each.entry.payload) for each in claimed] == [
        ("run", "r1", b'{"prompt":"hi"}'),
        ("run", "r2", b'{"prompt":"hi"}'),
    ]
    assert worker.takes(2) == []


def test_a_claim_that_found_nothing_gives_nothing(cut: Cut, worker: Worker) -> None:
    assert cut.losing_the_answer(worker.claim) == []
    worker.enqueue(request("r1"))
    assert worker.takes() == ["r1"]


def test_what_others_took_over_while_the_line_was_cut_is_not_given_to_who_had_claimed_it(
    postgres: PostgresServer, cut: Cut, worker: Worker, other: Worker
) -> None:
    worker.enqueue(request("r1"))
    schema = cut.database.schema
    postgres.sql(
        f"CREATE FUNCTION {schema}.give() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN UPDATE queue SET owner = {other.fence} WHERE owner = {worker.fence}; RETURN NULL; END $$"
    )
    postgres.sql(
        f"CREATE CONSTRAINT TRIGGER z_give AFTER UPDATE ON {schema}.writers DEFERRABLE INITIALLY DEFERRED "
        f"FOR EACH ROW WHEN (NEW.name = '{cut.database.name}') EXECUTE FUNCTION {schema}.give()"
    )
    assert cut.losing_the_answer(worker.claim) == []
    assert [each.key for each in other.journal.unfinished()] == [key("r1")]


def test_a_start_is_counted_once_and_told(cut: Cut, worker: Worker) -> None:
    worker.enqueue(request("r1"))
    assert worker.takes() == ["r1"]
    assert cut.losing_the_answer(lambda: worker.journal.mark_started(key("r1"))) == 1
    assert worker.journal.mark_started(key("r1")) == 2


def test_an_end_is_stored_once(cut: Cut, worker: Worker) -> None:
    worker.enqueue(request("r1"))
    assert worker.takes() == ["r1"]
    cut.losing_the_answer(lambda: worker.journal.mark_streaming(key("r1")))
    cut.losing_the_answer(lambda: worker.end("r1", history=change("q", "a")))
    assert len(worker.journal.history(SESSION)) == 2
    assert [each.terminal for each in worker.journal.undelivered()] == [b"r1"]


@pytest.mark.parametrize(
    "write",
    [
        lambda worker: worker.journal.mark_started(key("r1")),
        lambda worker: worker.journal.mark_streaming(key("r1")),
        lambda worker: worker.end("r1", history=change("q", "a")),
    ],
    ids=["start", "streaming", "end"],
)
def test_a_write_that_changed_nothing_since_the_request_is_anothers_is_told_so(
    cut: Cut, worker: Worker, other: Worker, write: Callable[[Worker], object]
) -> None:
    other.enqueue(request("r1"))
    assert other.takes() == ["r1"]
    with pytest.raises(LeaseLost):
        cut.losing_the_answer(lambda: write(worker))


def test_a_request_that_was_enqueued_is_told_to_have_its_place(cut: Cut, worker: Worker) -> None:
    (enqueued,) = cut.losing_the_answer(lambda: worker.enqueue(request("r1")))
    assert (enqueued.known, enqueued.refused) == (None, None)
    assert worker.takes() == ["r1"]


# --- of a worker alone -----------------------------------------------------------------------------------------------------


def test_a_worker_alone_hears_too_how_often_a_request_was_started(cut: Cut) -> None:
    store = PostgresStore(cut.database)
    store.open()
    try:
        cut.prepare()
        store.accept([entry("r1")])
        assert cut.losing_the_answer(lambda: store.mark_started(key("r1"))) == 1
        cut.losing_the_answer(lambda: store.finish(key("r1"), b"end", now=NOW, history=change("q", "a")))
        assert len(store.history(SESSION)) == 2
    finally:
        store.close()
