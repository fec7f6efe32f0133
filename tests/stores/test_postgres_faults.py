"""What a store on PostgreSQL does when the database restarts, is cut off, hangs, refuses or is not the right one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from llamacpp_mqtt_deploy.ports import StoreError, StoreInUse
from llamacpp_mqtt_deploy.stores.postgres import database as database_module
from llamacpp_mqtt_deploy.stores.postgres import pg_schema, postgres_store
from llamacpp_mqtt_deploy.stores.postgres.database import BoundedConnection, Database
from llamacpp_mqtt_deploy.stores.postgres.database_probe import look_at
from llamacpp_mqtt_deploy.stores.postgres.pg_writer import PgWriter
from llamacpp_mqtt_deploy.stores.postgres.postgres_store import PostgresStore
from tests.support.cable import Cable
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import NOW, SESSION, change, database_in, entry, key
from tests.support.waiting import eventually


@pytest.fixture
def database(postgres: PostgresServer, tmp_path: Path) -> Database:
    return database_in(postgres, tmp_path)


@pytest.fixture
def opened() -> Iterator[Callable[[Database], PostgresStore]]:
    """Open a store that is closed after the test."""
    stores: list[PostgresStore] = []

    def open_one(database: Database) -> PostgresStore:
        store = PostgresStore(database)
        store.open()
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


def over(cable: Cable, database: Database, postgres: PostgresServer) -> Database:
    return replace(database, url=postgres.tcp_url(cable.port))


def takes_writes(store: PostgresStore, name: str) -> bool:
    try:
        store.accept([entry(name)])
    except StoreError:
        return False
    return True


# --- lost connections ----------------------------------------------------------------------------------------------------


def test_a_connection_that_was_cut_costs_nobody_anything(
    postgres: PostgresServer,
    database: Database,
    cable_to: Callable[[int], Cable],
    opened: Callable[[Database], PostgresStore],
) -> None:
    cable = cable_to(postgres.port)
    store = opened(over(cable, database, postgres))
    for turn in range(5):
        store.accept([entry(f"r{turn}")])
        cable.cut()
    assert [e.key.request_id for e in store.unfinished()] == [f"r{n}" for n in range(5)]
    assert store.trouble() == ""


def test_while_the_database_is_away_everything_is_refused_at_once_and_then_goes_on(
    start_postgres: Callable[..., PostgresServer], tmp_path: Path, opened: Callable[[Database], PostgresStore]
) -> None:
    server = start_postgres()
    store = opened(database_in(server, tmp_path))
    store.accept([entry("before")])
    server.stop("immediate")
    assert not takes_writes(store, "away")
    began = time.monotonic()
    steps: list[Callable[[], object]] = [
        lambda: store.accept([entry("x")]),
        lambda: store.accept_soon([entry("x")]),
        lambda: store.find(key("before")),
        lambda: store.mark_started(key("before")),
        lambda: store.finish(key("before"), b"end", now=NOW),
        lambda: store.history(SESSION),
        store.unfinished,
        store.undelivered,
        lambda: store.reset(SESSION),
        lambda: store.purge(now=NOW, remember_s=1.0, ttl_s=1.0, max_sessions=1),
    ]
    for step in steps:
        with pytest.raises(StoreError, match=r"out of reach|ended the connection|starting or stopping"):
            step()
    assert time.monotonic() - began < 5
    assert "sessions.url" in store.trouble()
    server.start()
    eventually(lambda: takes_writes(store, "after"), 20.0)
    assert store.trouble() == ""
    assert [e.key.request_id for e in store.unfinished()] == ["before", "after"]


def test_reads_go_on_as_soon_as_the_database_is_back_however_long_it_was_away(
    start_postgres: Callable[..., PostgresServer], tmp_path: Path, opened: Callable[[Database], PostgresStore]
) -> None:
    server = start_postgres()
    store = opened(database_in(server, tmp_path))
    store.accept([entry("before")])
    with contextlib.ExitStack() as held:
        for _ in range(postgres_store.READERS):
            held.enter_context(store._read())
    server.stop()
    # Nobody writes, so that it is the reads that find out.
    readers = store._readers
    assert readers is not None

    def has_tried_often() -> bool:
        with pytest.raises(StoreError):
            store.find(key("before"))
        return readers.get_stats()["connections_errors"] >= 4 * postgres_store.READERS

    eventually(has_tried_often, 60.0)
    server.start()
    found = store.find(key("before"))
    assert found is not None


def test_a_database_that_crashes_in_the_middle_of_everything_loses_and_doubles_nothing(
    start_postgres: Callable[..., PostgresServer], tmp_path: Path, opened: Callable[[Database], PostgresStore]
) -> None:
    server = start_postgres(fsync=True)
    store = opened(database_in(server, tmp_path))
    told: list[str] = []
    stop = threading.Event()

    def write(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            name, session = f"{number}-{turn}", ("default", f"s{number}")
            try:
                store.accept([entry(name, session)])
                store.finish(key(name, session), b"end", now=NOW, history=change(name, "yo", session=session))
            except StoreError:
                stop.wait(0.02)
            else:
                told.append(name)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        so_far = len(told)
        eventually(lambda so_far=so_far: len(told) > so_far + 20, 30.0)  # type: ignore[misc]
        server.restart("immediate")
    so_far = len(told)
    eventually(lambda: len(told) > so_far + 20, 30.0)
    stop.set()
    for thread in threads:
        thread.join(60)
    for number in range(4):
        contents = [m["content"] for m in store.history(("default", f"s{number}"))][::2]
        assert len(contents) == len(set(contents))
        assert {name for name in told if name.startswith(f"{number}-")} <= set(contents)


def test_a_database_that_falls_silent_is_given_up_after_a_while(
    postgres: PostgresServer,
    database: Database,
    cable_to: Callable[[int], Cable],
    opened: Callable[[Database], PostgresStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database_module, "ANSWER_S", 0.5)
    monkeypatch.setattr(database_module, "CONNECT_S", 2)
    monkeypatch.setattr(postgres_store, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(postgres_store, "WRITE_TIMEOUT_S", 2.0)
    cable = cable_to(postgres.port)
    store = opened(over(cable, database, postgres))
    store.accept([entry("before")])
    cable.stall()
    began = time.monotonic()
    with pytest.raises(StoreError, match="has not taken a write for 2 s"):
        store.accept([entry("away")])
    eventually(lambda: "does not answer" in store.trouble())
    with pytest.raises(StoreError, match="does not answer"):
        store.accept([entry("refused")])
    with pytest.raises(StoreError):
        store.find(key("before"))
    assert time.monotonic() - began < 8
    cable.resume()
    eventually(lambda: takes_writes(store, "after"), 20.0)
    assert "refused" not in [e.key.request_id for e in store.unfinished()]


# --- a COMMIT without an answer --------------------------------------------------------------------------------------------


class Marks:
    """A writer over a cable, and a table whose rows are counted. A commit of a row 'slow' takes until the test lets it go on."""

    def __init__(self, postgres: PostgresServer, database: Database, cable: Cable) -> None:
        self._postgres, self.cable, self._schema = postgres, cable, database.schema
        store = PostgresStore(database)
        store.open()
        store.close()
        postgres.sql(f"CREATE TABLE {self._schema}.marks (name TEXT)")
        postgres.sql(
            f"CREATE FUNCTION {self._schema}.wait() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_advisory_xact_lock(77); RETURN NULL; END $$"
        )
        postgres.sql(
            f"CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON {self._schema}.marks DEFERRABLE INITIALLY DEFERRED "
            f"FOR EACH ROW WHEN (NEW.name = 'slow') EXECUTE FUNCTION {self._schema}.wait()"
        )
        self.writer = PgWriter(over(cable, database, postgres), claim_schema=lambda _: None)

    def add(self, name: str) -> Any:
        def step(db: BoundedConnection) -> None:
            db.execute("INSERT INTO marks VALUES (%s)", (name,))

        return self.writer.submit(step, durable=True)

    def names(self) -> list[object]:
        return [row[0] for row in self._postgres.sql(f"SELECT name FROM {self._schema}.marks")]

    def is_committing(self) -> bool:
        rows = self._postgres.sql("SELECT 1 FROM pg_stat_activity WHERE query = 'COMMIT' AND wait_event = 'advisory'")
        return bool(rows)


@pytest.fixture
def marks(postgres: PostgresServer, database: Database, cable_to: Callable[[int], Cable]) -> Iterator[Marks]:
    marks = Marks(postgres, database, cable_to(postgres.port))
    yield marks
    marks.writer.close(10)


def test_a_commit_whose_answer_was_lost_is_found_to_have_happened_and_is_not_done_again(
    postgres: PostgresServer, marks: Marks
) -> None:
    with psycopg.connect(postgres.url, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(77)")
        write = marks.add("slow")
        eventually(marks.is_committing)
        marks.cable.stall()
        holder.execute("SELECT pg_advisory_unlock(77)")
        eventually(lambda: marks.names() == ["slow"])
        marks.cable.cut()
        marks.cable.resume()
    write.wait(10)
    marks.add("next").wait(10)
    assert marks.names() == ["slow", "next"]


def test_a_commit_that_the_lost_connection_took_along_is_done_again_once(
    postgres: PostgresServer, marks: Marks
) -> None:
    with psycopg.connect(postgres.url, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(77)")
        write = marks.add("slow")
        eventually(marks.is_committing)
        marks.cable.cut()
        eventually(lambda: marks.writer.connections >= 2)
        holder.execute("SELECT pg_advisory_unlock(77)")
    write.wait(10)
    marks.add("next").wait(10)
    assert marks.names() == ["slow", "next"]


def test_many_writes_over_a_connection_that_is_cut_again_and_again_happen_once_each(marks: Marks) -> None:
    writes = []
    for number in range(300):
        writes.append(marks.add(str(number)))
        if number % 15 == 14:
            marks.cable.cut()
            # Not once more while it reconnects: that is a database that is away.
            eventually(writes[-1].done)
    for write in writes:
        write.wait(20)
    assert marks.names() == [str(number) for number in range(300)]


# --- locks, and what is wrong with one write alone ---------------------------------------------------------------------------


def test_a_row_that_another_program_has_locked_is_waited_for_for_a_while_and_costs_the_others_nothing(
    postgres: PostgresServer,
    database: Database,
    opened: Callable[[Database], PostgresStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database_module, "LOCK_S", 0.3)
    store = opened(database)
    store.accept([entry("locked"), entry("free")])
    with psycopg.connect(postgres.url) as holder:
        holder.execute(f"SELECT * FROM {database.schema}.entries WHERE request_id = 'locked' FOR UPDATE".encode())
        pending = [store.mark_streaming_soon(key("locked")), store.mark_streaming_soon(key("free"))]
        pending[1].wait(10)
        with pytest.raises(StoreError, match="holds a lock"):
            pending[0].wait(10)
    assert [e.state for e in store.unfinished()] == ["accepted", "streaming"]
    store.mark_streaming(key("locked"))
    assert store.trouble() == ""


def test_a_write_that_fails_among_others_spoils_no_statement_that_comes_after_it(
    database: Database, opened: Callable[[Database], PostgresStore]
) -> None:
    """Psycopg prepares what it sends often, and may believe so of what the server has passed over after an error."""
    store = opened(database)
    go_on = threading.Event()
    for turn in range(12):
        go_on.clear()
        store._write().submit(lambda db: go_on.wait(10))
        bad = store._write().submit(lambda db: db.execute("SELECT 1 / 0").fetchone())
        good = [store.accept_soon([entry(f"{turn}-{n}")]) for n in range(6)]
        good += [store.mark_streaming_soon(key(f"{turn}-{n}")) for n in range(6)]
        go_on.set()
        with pytest.raises(StoreError, match="division by zero"):
            bad.wait(10)
        for write in good:
            write.wait(10)
    assert len(store.unfinished()) == 72


def test_transactions_that_got_into_each_others_way_are_done_again(
    postgres: PostgresServer, database: Database, opened: Callable[[Database], PostgresStore]
) -> None:
    store = opened(database)
    store.accept([entry("a"), entry("b")])
    lock = f"SELECT * FROM {database.schema}.entries WHERE request_id = %s FOR UPDATE".encode()
    with psycopg.connect(postgres.url) as holder:
        holder.execute("SET deadlock_timeout = '10s'")
        holder.execute(lock, ("b",))

        def step(db: BoundedConnection) -> None:
            for name in ("a", "b"):
                db.execute("UPDATE entries SET topic = 'done' WHERE request_id = %s", (name,))

        write = store._write().submit(step)
        eventually(lambda: postgres.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
        holder.execute(lock, ("a",))
    write.wait(10)
    assert [e.topic for e in store.unfinished()] == ["done", "done"]


def test_a_worker_that_is_frozen_in_the_middle_of_a_transaction_does_not_keep_the_others_waiting(
    postgres: PostgresServer,
    database: Database,
    opened: Callable[[Database], PostgresStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = replace(database, idle_in_transaction_s=0.3)
    store = opened(database)
    store.accept([entry("a")])
    frozen = replace(database, name="lmd frozen").connect()
    frozen.execute("BEGIN")
    frozen.execute("SELECT * FROM entries WHERE request_id = 'a' FOR UPDATE")
    store.mark_streaming(key("a"))
    with pytest.raises(psycopg.Error, match="idle-in-transaction"):
        frozen.execute("COMMIT")
    frozen.close()


# --- who may use it ----------------------------------------------------------------------------------------------------------


def test_a_second_worker_on_the_same_schema_is_refused_and_one_on_another_is_not(
    postgres: PostgresServer,
    database: Database,
    opened: Callable[[Database], PostgresStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres_store, "_CLAIM_TRIES_S", 0.1)
    first = opened(database)
    first.accept([entry("mine")])
    with pytest.raises(StoreInUse, match="Another worker uses the schema"):
        opened(replace(database, name="lmd second"))
    other = opened(replace(database, schema=f"{database.schema}_b", name="lmd third"))
    assert other.find(key("mine")) is None
    first.close()
    assert len(opened(replace(database, name="lmd fourth")).unfinished()) == 1


def test_a_worker_whose_connection_was_cut_gets_its_schema_back_before_the_server_knows(
    postgres: PostgresServer,
    database: Database,
    cable_to: Callable[[int], Cable],
    opened: Callable[[Database], PostgresStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database_module, "ANSWER_S", 0.5)
    cable = cable_to(postgres.port)
    store = opened(over(cable, database, postgres))
    store.accept([entry("a")])
    cable.stall()
    with pytest.raises(StoreError):
        store._write().submit(lambda db: db.execute("SELECT 1").fetchone()).wait(1)
    cable.resume()
    eventually(lambda: takes_writes(store, "b"), 20.0)


@pytest.mark.parametrize(
    "change_url,said",
    [
        (lambda s: "postgresql://nobody@127.0.0.1:1/lmd", "out of reach"),
        (lambda s: s.url.replace("/postgres?", "/missing?"), "does not exist"),
        (lambda s: s.tcp_url(user="guarded"), "refused the password"),
        (lambda s: s.tcp_url() + "?sslmode=require", "TLS"),
        (lambda s: "nonsense", "is no address of a database"),
    ],
)
def test_a_database_that_cannot_be_reached_is_told_in_a_sentence(
    postgres: PostgresServer, change_url: Callable[[PostgresServer], str], said: str
) -> None:
    if not postgres.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guarded'"):
        postgres.sql("CREATE ROLE guarded LOGIN PASSWORD 'correct horse'")
    store = PostgresStore(Database(url=change_url(postgres), schema="nowhere", password=lambda: "wrong secret"))
    with pytest.raises(StoreError, match=said) as caught:
        store.open()
    assert "wrong secret" not in str(caught.value)
    assert str(caught.value).endswith(".")
    with pytest.raises(StoreError, match="closed"):
        store.unfinished()


def test_the_password_is_asked_for_with_every_connection(
    postgres: PostgresServer, tmp_path: Path, opened: Callable[[Database], PostgresStore]
) -> None:
    if not postgres.sql("SELECT 1 FROM pg_roles WHERE rolname = 'guarded'"):
        postgres.sql("CREATE ROLE guarded LOGIN")
    postgres.sql("ALTER ROLE guarded PASSWORD 'correct horse'")
    postgres.sql("GRANT CREATE ON DATABASE postgres TO guarded")
    passwords = ["correct horse"]
    database = replace(
        database_in(postgres, tmp_path), url=postgres.tcp_url(user="guarded"), password=lambda: passwords[-1]
    )
    store = opened(database)
    store.accept([entry("a")])
    postgres.sql("ALTER ROLE guarded PASSWORD 'battery staple'")
    passwords.append("battery staple")
    postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'guarded'")
    store.accept([entry("b")])
    assert len(store.unfinished()) == 2
    assert "correct horse" not in database.shown


def test_a_database_that_cannot_hold_every_text_is_refused(postgres: PostgresServer, tmp_path: Path) -> None:
    postgres.sql("DROP DATABASE IF EXISTS latin")
    postgres.sql("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    database = replace(database_in(postgres, tmp_path), url=postgres.url.replace("/postgres?", "/latin?"))
    with pytest.raises(StoreError, match="encoding LATIN1"):
        PostgresStore(database).open()


# --- the layout --------------------------------------------------------------------------------------------------------------


class _BehindAPooler(Database):
    """What the server hears of a connection behind a pooler that ignores its options."""

    def _options(self) -> str:
        return ""


def test_a_pooler_that_ignores_the_options_of_a_connection_is_refused_before_anything_is_made(
    postgres: PostgresServer, database: Database
) -> None:
    pooled = _BehindAPooler(url=postgres.url, schema=database.schema)
    with pytest.raises(StoreError, match="connection pooler"):
        PostgresStore(pooled).open()
    with pytest.raises(StoreError, match="connection pooler"):
        look_at(pooled)
    assert postgres.sql("SELECT 1 FROM pg_tables WHERE tablename = 'layout' AND schemaname = 'public'") == []
    assert postgres.sql(f"SELECT 1 FROM pg_namespace WHERE nspname = '{database.schema}'") == []


def test_a_worker_of_this_version_works_on_while_and_after_a_newer_one_extends_the_tables(
    database: Database, opened: Callable[[Database], PostgresStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(database)
    store.accept([entry("before")])
    newer = pg_schema.LayoutStep(
        statements=(
            "ALTER TABLE entries ADD COLUMN colour TEXT NOT NULL DEFAULT 'none'",
            "ALTER TABLE queue ADD COLUMN colour TEXT",
            "CREATE TABLE colours (name TEXT PRIMARY KEY)",
        ),
        works_with=len(pg_schema.MIGRATIONS),
    )
    with monkeypatch.context() as patch:
        patch.setattr(pg_schema, "MIGRATIONS", (*pg_schema.MIGRATIONS, newer))
        with replace(database, name="lmd newer").connect() as db:
            pg_schema.prepare(database, db)
    store.accept([entry("after")])
    store.finish(key("before"), b"end", now=NOW, history=change("q", "a"))
    store.close()
    store.open()
    assert [e.key.request_id for e in store.unfinished()] == ["after"]


def test_tables_that_only_newer_workers_can_use_are_left_alone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking = pg_schema.LayoutStep(statements=(), works_with=len(pg_schema.MIGRATIONS) + 1)
    with monkeypatch.context() as patch:
        patch.setattr(pg_schema, "MIGRATIONS", (*pg_schema.MIGRATIONS, breaking))
        store = PostgresStore(database)
        store.open()
        store.close()
    with pytest.raises(StoreError, match="newer version"):
        PostgresStore(database).open()


def test_a_schema_with_tables_of_another_program_is_left_alone(postgres: PostgresServer, database: Database) -> None:
    postgres.sql(f"CREATE SCHEMA {database.schema}")
    postgres.sql(f"CREATE TABLE {database.schema}.invoices (id INT)")
    with pytest.raises(StoreError, match="invoices"):
        PostgresStore(database).open()


def test_a_user_without_the_right_to_create_schemas_works_in_one_that_is_his(
    postgres: PostgresServer, database: Database, opened: Callable[[Database], PostgresStore]
) -> None:
    if not postgres.sql("SELECT 1 FROM pg_roles WHERE rolname = 'modest'"):
        postgres.sql("CREATE ROLE modest LOGIN")
    mine = replace(database, url=postgres.tcp_url(user="modest"))
    with pytest.raises(StoreError, match="may not do this"):
        PostgresStore(mine).open()
    postgres.sql(f"CREATE SCHEMA {database.schema} AUTHORIZATION modest")
    opened(mine).accept([entry("a")])


def test_many_workers_that_start_together_make_the_tables_once(database: Database) -> None:
    failures: list[BaseException] = []

    def prepare(number: int) -> None:
        try:
            with replace(database, name=f"lmd {number}").connect() as db:
                pg_schema.prepare(database, db)
        except BaseException as error:  # noqa: BLE001  brought back to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=prepare, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
