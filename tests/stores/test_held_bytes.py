"""What each first level holds of ended requests is counted along, in step with the rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.stores import entries, held_bytes, purging, schema
from llamacpp_mqtt_deploy.stores.bounds import ROW_BYTES, Portion
from tests.support.store_cases import NOW, entry, key

SESSIONS = (("default", "kitchen/tablet"), ("default", "hall/robot"), ("other", "kitchen/lamp"))
NAMES = ("r1", "r2")


def database() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    schema.migrate(db)
    return db


def in_the_rows(db: sqlite3.Connection) -> dict[tuple[str, bool], int]:
    found = db.execute(
        "SELECT first_level, delivered, sum(bytes + ?) FROM entries WHERE state = 'ended' GROUP BY first_level, delivered",
        (ROW_BYTES,),
    ).fetchall()
    return {(row[0], bool(row[1])): row[2] for row in found}


class _Work:
    """What a store does to the rows, with places as it gives them."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._place = 0

    def accept(self, session: tuple[str, str], name: str, _size: int) -> None:
        self._place += 1
        entries.insert(self._db, entry(name, session), self._place)

    def accept_ended(self, session: tuple[str, str], name: str, size: int) -> None:
        self._place += 1
        ended = entry(name, session, state="ended", terminal=b"x" * size, ended_at=NOW)
        entries.insert(self._db, ended, self._place)

    def stream(self, session: tuple[str, str], name: str, _size: int) -> None:
        entries.set_streaming(self._db, key(name, session))

    def end(self, session: tuple[str, str], name: str, size: int) -> None:
        self._place += 1
        record = b"y" * (size // 2) if size % 2 else None
        entries.end(self._db, key(name, session), b"x" * size, now=NOW, place=self._place, chunks=record)

    def deliver(self, session: tuple[str, str], name: str, _size: int) -> None:
        entries.set_delivered(self._db, [key(name, session)])

    def drop(self, session: tuple[str, str], name: str, _size: int) -> None:
        found = self._db.execute(
            "SELECT id FROM entries WHERE session = ? AND request_id = ?", (session[1], name)
        ).fetchall()
        entries.drop(self._db, found)


STEPS = (_Work.accept, _Work.accept_ended, _Work.stream, _Work.end, _Work.deliver, _Work.drop)
WORK = st.lists(
    st.tuples(st.sampled_from(STEPS), st.sampled_from(SESSIONS), st.sampled_from(NAMES), st.integers(0, 9)), max_size=30
)
Step = tuple[Callable[[_Work, tuple[str, str], str, int], None], tuple[str, str], str, int]


def run(work: _Work, steps: list[Step]) -> None:
    for step, session, name, size in steps:
        step(work, session, name, size)


@given(before=WORK, after=WORK)
def test_it_is_the_sum_of_the_rows_whatever_happens_to_them(before: list[Step], after: list[Step]) -> None:
    db = database()
    work = _Work(db)
    run(work, before)
    held_bytes.count(db)
    assert held_bytes.read(db) == in_the_rows(db)
    for step in after:
        run(work, [step])
        assert held_bytes.read(db) == in_the_rows(db)
    db.close()


@given(kept=WORK, taken_back=WORK)
@pytest.mark.parametrize(
    "begin, undo",
    [("BEGIN", ("ROLLBACK",)), ("SAVEPOINT one_write", ("ROLLBACK TO one_write", "RELEASE one_write"))],
)
def test_what_is_rolled_back_was_never_held(
    begin: str, undo: tuple[str, ...], kept: list[Step], taken_back: list[Step]
) -> None:
    db = database()
    held_bytes.count(db)
    work = _Work(db)
    run(work, kept)
    db.execute(begin)
    run(work, taken_back)
    for statement in undo:
        db.execute(statement)
    assert held_bytes.read(db) == in_the_rows(db)
    db.close()


def test_a_level_that_holds_nothing_more_has_no_row() -> None:
    """Or each name that ever came would stay until the next start."""
    db = database()
    held_bytes.count(db)
    work = _Work(db)
    for number in range(50):
        session = ("default", f"u{number}/x")
        work.accept_ended(session, "r", 9)
        work.deliver(session, "r", 0)
        work.drop(session, "r", 0)
    assert db.execute("SELECT count(*) FROM held_bytes").fetchone() == (0,)
    db.close()


def _steps_of_a_purge(rows: int) -> int:
    """How many hundred instructions of SQLite it takes to drop two of so many rows."""
    db = database()
    held_bytes.count(db)
    terminal = b"x" * 2100  # one to a page of the database: the purge looks first whether all of it is small
    for place in range(1, rows + 1):
        entries.insert(db, entry(f"r{place}", state="ended", terminal=terminal, ended_at=NOW, delivered=True), place)
    held = sum(held_bytes.read(db).values())
    steps = 0

    def one_more() -> int:
        nonlocal steps
        steps += 1
        return 0

    db.set_progress_handler(one_more, 100)
    dropped = Portion()
    # Half of it is the share of the one level that is there.
    purging.excess_entries(db, dropped, max_bytes=2 * (held - ROW_BYTES - len(terminal) - 1))
    assert dropped.rows == 2
    db.close()
    return steps


def test_a_purge_works_as_much_for_a_full_journal_as_for_a_short_one() -> None:
    """It comes every few seconds, and requests wait for it."""
    assert _steps_of_a_purge(5000) <= 2 * _steps_of_a_purge(500)
