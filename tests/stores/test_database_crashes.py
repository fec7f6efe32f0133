"""PostgreSQL is killed again and again while workers of a pool use their common journal: what was confirmed is there, once and whole.

`make database-crashes` does it a hundred times. DATABASE_SEED chooses the moments and what the workers do.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.pool_ports import Member
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores.postgres import pg_writer
from llamacpp_mqtt_deploy.stores.postgres.shared_journal import SharedPostgresJournal
from tests.support.journal_users import (
    TOKENS_IN,
    TOKENS_OUT,
    ConfirmationLog,
    Confirmed,
    JournalUser,
    answer_to,
    is_turn,
)
from tests.support.postgres_server import PostgresServer
from tests.support.store_cases import database_in
from tests.support.waiting import eventually

CRASHES = int(os.environ.get("DATABASE_CRASHES", "5"))
SEED = int(os.environ.get("DATABASE_SEED", "3"))
WORKERS = 3

_MOST_STEPS_BETWEEN = 60
_LONGEST_MOMENT_S = 0.02
_WITHIN_S = 60.0


# --- what the database has -----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A request as the tables have it."""

    key: EntryKey
    place: int
    """In the order of arrival."""
    state: str
    terminal: bytes | None
    queued: bool
    streams: bool
    has_body: bool
    record: bytes | None


@dataclass
class Tables:
    """All tables at one moment."""

    rows: dict[EntryKey, Row] = field(default_factory=dict)
    histories: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    ledger: tuple[int, int, int] = (0, 0, 0)
    versions: dict[int, int] = field(default_factory=dict)
    """Of the members, by their fences."""
    left_over: int = 0
    """Rows of the other tables that no request has."""


def read(server: PostgresServer, schema: str) -> Tables:
    import psycopg

    found = Tables()
    with psycopg.connect(server.url, options=f"-c search_path={schema}") as db:
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        for route, session, name, *rest in db.execute(
            "SELECT e.route, e.session, e.request_id, e.id, e.state, e.terminal, q.id IS NOT NULL, "
            "coalesce(q.streaming, false), p.id IS NOT NULL, c.record FROM entries e LEFT JOIN queue q USING (id) "
            "LEFT JOIN payloads p USING (id) LEFT JOIN chunks c USING (id)"
        ).fetchall():
            key = EntryKey(route, session, name)
            assert key not in found.rows, f"{name} is there twice"
            found.rows[key] = Row(key, *rest)
        for route, session, role, message in db.execute(
            "SELECT route, session, role, message FROM messages JOIN sessions ON sessions.id = session_id ORDER BY messages.id"
        ).fetchall():
            found.histories[route, session].append((role, orjson.loads(message)["content"]))
        for requests, tokens_in, tokens_out in db.execute(
            "SELECT coalesce(sum(requests), 0)::int, coalesce(sum(tokens_in), 0)::int, coalesce(sum(tokens_out), 0)::int FROM ledger"
        ).fetchall():
            found.ledger = (requests, tokens_in, tokens_out)
        found.versions = {row[0]: int(row[1]) for row in db.execute("SELECT fence, version FROM members").fetchall()}
        for table in ("queue", "payloads", "chunks"):
            (row,) = db.execute(f"SELECT count(*) FROM {table} WHERE id NOT IN (SELECT id FROM entries)".encode())
            found.left_over += row[0]
    return found


# --- what has to be so -----------------------------------------------------------------------------------------------------


def check(tables: Tables, confirmed: Confirmed) -> None:
    check_confirmed(tables, confirmed)
    check_whole(tables)


def check_confirmed(tables: Tables, confirmed: Confirmed) -> None:
    """What the journal said that it has, it has. `confirmed` is from before the tables were read."""
    for key in confirmed.accepted:
        assert key in tables.rows, f"{key.request_id} was accepted and is lost"
    for key in confirmed.streaming:
        assert tables.rows[key].state in ("streaming", "ended"), f"the first chunk of {key.request_id} is forgotten"
    for key, (_, terminal) in confirmed.ended.items():
        assert tables.rows[key].terminal == terminal, f"the end of {key.request_id} is lost, or is another one"
    for fence, member in confirmed.members.items():
        assert tables.versions.get(fence, int(member.version)) >= int(member.version), (
            f"what member {fence} said of itself is forgotten"
        )


def check_whole(tables: Tables) -> None:
    """An end, its history, its costs and its place in the queue are written together, or none of them is."""
    done: dict[tuple[str, str], list[Row]] = defaultdict(list)
    answers = 0
    for row in tables.rows.values():
        name, ended = row.key.request_id, row.state == "ended"
        assert (row.terminal is not None) == ended, f"{name} is {row.state} with the end {row.terminal!r}"
        assert row.queued == row.has_body == (not ended), f"{name} is {row.state}, and not so for the queue or its body"
        assert row.streams == (row.state == "streaming"), f"{name} is {row.state}, and not so for the queue"
        if row.terminal is not None and row.terminal.startswith(b"done"):
            if is_turn(name):
                done[row.key.route, row.key.session].append(row)
            answers += 1
            assert row.record == f"chunks of {name}".encode(), f"{name} has lost its chunks"
        else:
            assert row.record is None, f"{name} has chunks of an end that it has not"
    for session in {*done, *tables.histories}:
        names = [row.key.request_id for row in sorted(done[session], key=lambda row: row.place)]
        assert _turns(tables.histories[session]) == names, (
            f"the history of {session} and the ends in it are not the same"
        )
    ends = sum(row.state == "ended" for row in tables.rows.values())
    assert tables.ledger == (ends, answers * TOKENS_IN, answers * TOKENS_OUT), "the account is not that of the ends"
    assert tables.left_over == 0


def _turns(messages: Sequence[tuple[str, str]]) -> list[str]:
    """The requests of a history, each with its question and its answer."""
    questions, answers = messages[::2], messages[1::2]
    assert [("assistant", answer_to(text)) for _, text in questions] == answers
    assert {role for role, _ in questions} <= {"user"}
    return [text for _, text in questions]


# --- the loop --------------------------------------------------------------------------------------------------------------


class Pool:
    """Workers of which one is replaced now and then by its next life."""

    def __init__(self, server: PostgresServer, directory: Path, notes: ConfirmationLog) -> None:
        self.schema = database_in(server, directory).schema
        self.notes = notes
        self._server = server
        self._directory = directory
        self._lives: Counter[str] = Counter()
        self._users: dict[str, JournalUser] = {}
        for number in range(WORKERS):
            self._begin(f"w{number}")

    def _begin(self, name: str) -> None:
        self._lives[name] += 1
        database = database_in(self._server, self._directory)
        user = JournalUser(database, name, life=self._lives[name], seed=SEED, notes=self.notes)
        self._users[name] = user
        user.start()

    def kill_one(self, chance: random.Random) -> None:
        name = chance.choice(sorted(self._users))
        self._users.pop(name).close()
        self._begin(name)

    def wait_for_steps(self, number: int) -> None:
        enough = self.notes.count() + number
        eventually(lambda: self.notes.faults or self.notes.count() >= enough, _WITHIN_S)

    def end_all(self) -> None:
        """Nothing more is accepted, and what was has its end."""
        for user in self._users.values():
            user.accept_no_more()
        eventually(lambda: self.notes.faults or not self._left(), _WITHIN_S, every_s=0.1)

    def _left(self) -> object:
        return self._server.sql(f"SELECT 1 FROM {self.schema}.queue LIMIT 1")

    def close(self) -> None:
        for user in self._users.values():
            user.close()


@contextmanager
def pool_on(server: PostgresServer, directory: Path) -> Iterator[Pool]:
    pool = Pool(server, directory, ConfirmationLog())
    try:
        yield pool
    finally:
        pool.close()


def crash(server: PostgresServer, chance: random.Random) -> int:
    """Kill it, now and then once more while it recovers; returns how often."""
    times = 1
    threading.Event().wait(chance.uniform(0.0, _LONGEST_MOMENT_S))
    server.crash()
    while chance.random() < 0.2:
        server.launch()
        threading.Event().wait(chance.uniform(0.0, 0.4))
        server.crash()
        times += 1
    server.start()
    return times


def test_a_database_that_is_killed_again_and_again_loses_doubles_and_tears_nothing(
    start_postgres: Callable[..., PostgresServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pg_writer, "LONGEST_PAUSE_S", 0.1)
    chance, began, crashes = random.Random(SEED), time.monotonic(), 0
    server = start_postgres(fsync=True)
    with capture_logs() as logs, pool_on(server, tmp_path) as pool:
        notes = pool.notes
        while crashes < CRASHES:
            pool.wait_for_steps(chance.randint(1, _MOST_STEPS_BETWEEN))
            crashes += crash(server, chance)
            confirmed = notes.copy()
            check(read(server, pool.schema), confirmed)
            assert notes.faults == []
            if chance.random() < 0.3:
                pool.kill_one(chance)
        pool.end_all()
        assert notes.faults == []
        confirmed, tables = notes.copy(), read(server, pool.schema)
        check(tables, confirmed)
        assert {row.state for row in tables.rows.values()} == {"ended"}
    assert notes.faults == []
    outcomes = Counter(each["committed"] for each in logs if each["event"] == "store.outcome_known")
    how = Counter(str(row.terminal).partition(" ")[0].lstrip("b'") for row in tables.rows.values())
    print(
        f"\n{crashes} crashes in {time.monotonic() - began:.0f} s: {len(tables.rows)} requests, {dict(how)}; "
        f"{len(confirmed.fences)} fences; {notes.failed} writes refused; commits without an answer: {dict(outcomes)}"
    )


def test_a_worker_that_drains_does_so_after_a_crash_too(
    start_postgres: Callable[..., PostgresServer], tmp_path: Path
) -> None:
    server = start_postgres()
    journal = SharedPostgresJournal(database_in(server, tmp_path), lease_s=30.0)
    journal.open()
    member = Member(worker_id="a", instance="a-1", slots=1)
    journal.join(member)
    journal.update(replace(member, draining=True))
    server.crash()
    server.start()
    (row,) = server.sql(f"SELECT draining FROM {database_in(server, tmp_path).schema}.members")
    assert row == (True,)
    journal.close()
