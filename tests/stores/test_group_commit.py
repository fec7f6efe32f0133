"""The thread that commits: what it does together, what it refuses, and whom it tells."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores import group_commit
from llamacpp_mqtt_deploy.stores.group_commit import GroupCommit, Write
from tests.support.waiting import eventually


class Journal:
    """A table of one column with a thread that commits, which a test can hold in the middle of a write."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.1)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("CREATE TABLE rows (value TEXT UNIQUE)")
        self.statements: list[str] = []
        self.connection.set_trace_callback(self.statements.append)
        self.writer = GroupCommit(
            self.connection, explain=lambda error: StoreError(f"explained: {error}"), make_room=lambda: False
        )

    def add(self, value: object, *, size: int = 0, urgent: bool = False) -> Write:
        return self.writer.submit(
            lambda db: db.execute("INSERT INTO rows VALUES (?)", (value,)), size=size, urgent=urgent
        )

    def hold(self) -> Callable[[], None]:
        """Keep the thread busy; what is submitted until the returned function is called waits together."""
        go_on, there = threading.Event(), threading.Event()

        def step(_: sqlite3.Connection) -> None:
            there.set()
            go_on.wait(20)

        self.writer.submit(step)
        assert there.wait(20)
        self.statements.clear()
        return go_on.set

    def values(self) -> list[str]:
        with self.writer.exclusive() as db:
            return [row[0] for row in db.execute("SELECT value FROM rows ORDER BY rowid").fetchall()]

    def trouble(self) -> StoreError | None:
        return self.writer.trouble

    def commits(self) -> int:
        return self.statements.count("COMMIT") - 1  # the held write's own


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db")
    with closing(journal.connection):
        yield journal
        journal.writer.close(20)


def test_all_that_waits_is_one_transaction_in_the_order_of_the_calls(journal: Journal) -> None:
    go_on = journal.hold()
    writes = [journal.add(str(n)) for n in range(100)]
    assert not writes[0].done()
    go_on()
    for write in writes:
        write.wait(10)
    assert journal.values() == [str(n) for n in range(100)]
    assert journal.commits() == 1


def test_a_transaction_is_bounded_in_number_and_in_bytes(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "MAX_BATCH", 10)
    monkeypatch.setattr(group_commit, "MAX_BATCH_BYTES", 100)
    go_on = journal.hold()
    writes = [journal.add(f"a{n}") for n in range(25)]
    writes += [journal.add(f"b{n}", size=60) for n in range(3)]
    writes += [journal.add("larger than any batch", size=1000)]
    go_on()
    writes[-1].wait(10)
    assert journal.commits() == 6  # 10, 10, 5 and one of 60 bytes, then each alone
    assert len(journal.values()) == 29


def test_what_is_wrong_with_one_write_costs_the_others_of_its_transaction_nothing(journal: Journal) -> None:
    go_on = journal.hold()

    def half(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO rows VALUES ('half of it')")
        raise ZeroDivisionError("a defect")

    first, twice, broken, last = (
        journal.add("first"),
        journal.add("first"),
        journal.writer.submit(half),
        journal.add("last"),
    )
    go_on()
    first.wait(10)
    last.wait(10)
    with pytest.raises(StoreError, match="explained: UNIQUE"):
        twice.wait(10)
    with pytest.raises(StoreError, match="explained: a defect"):
        broken.wait(10)
    assert journal.values() == ["first", "last"]
    assert journal.commits() == 1


def test_writes_that_come_together_need_no_savepoint_each_unless_one_of_them_is_wrong(journal: Journal) -> None:
    go_on = journal.hold()
    writes = [journal.add(str(n)) for n in range(3)]
    go_on()
    writes[-1].wait(10)
    assert journal.statements.count("SAVEPOINT one_write") == 0
    go_on = journal.hold()
    writes = [journal.add("3"), journal.add("0"), journal.add("4")]
    go_on()
    writes[-1].wait(10)
    assert journal.statements.count("SAVEPOINT one_write") == 3
    assert journal.values() == ["0", "1", "2", "3", "4"]


def test_a_program_that_locks_the_file_before_a_transaction_begins_once_more_fails_all_of_it(
    journal: Journal, tmp_path: Path
) -> None:
    go_on = journal.hold()
    other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None, check_same_thread=False)
    with closing(other) as shell:

        def lets_another_program_in(db: sqlite3.Connection) -> None:
            db.execute("ROLLBACK")
            shell.execute("BEGIN IMMEDIATE")
            db.execute("BEGIN")
            raise ZeroDivisionError("a defect")

        writes = [journal.add("first"), journal.writer.submit(lets_another_program_in), journal.add("last")]
        go_on()
        for write in writes:
            with pytest.raises(StoreError, match="locked"):
                write.wait(10)
        shell.execute("ROLLBACK")
    eventually(lambda: not isinstance(journal.writer._locked_out, StoreError))
    journal.add("afterwards").wait(10)
    assert journal.values() == ["afterwards"]


def test_a_queue_that_is_full_refuses_at_once_and_keeps_places_for_what_is_urgent(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "MAX_QUEUED", 8)
    go_on = journal.hold()
    writes = [journal.add(f"request {n}") for n in range(6)]
    with pytest.raises(StoreError, match="too slow: 6 writes"):
        journal.add("one more request")
    writes += [journal.add(f"end {n}", urgent=True) for n in range(2)]
    with pytest.raises(StoreError, match="too slow"):
        journal.add("one more end", urgent=True)
    go_on()
    for write in writes:
        write.wait(10)
    journal.add("there is room again").wait(10)
    assert len(journal.values()) == 9


def test_a_queue_is_full_of_bytes_too(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "MAX_QUEUED_BYTES", 1000)
    go_on = journal.hold()
    large = journal.add("larger than all that is allowed finds a place in an empty queue", size=5000)
    with pytest.raises(StoreError, match="5000 bytes"):
        journal.add("next", size=1)
    go_on()
    large.wait(10)
    journal.add("next", size=700).wait(10)


def test_waiting_has_an_end_when_the_disk_does_not_answer(journal: Journal) -> None:
    go_on = journal.hold()
    write = journal.add("late")
    with pytest.raises(StoreError, match=r"has not taken a write for 0\.05 s"):
        write.wait(0.05)
    assert not write.done()
    go_on()
    write.wait(10)
    assert journal.values() == ["late"]


def test_callbacks_come_in_the_order_of_the_writes_and_one_that_fails_costs_nothing(journal: Journal) -> None:
    told: list[tuple[str, str | None]] = []
    go_on = journal.hold()

    def broken(_: StoreError | None) -> None:
        raise ZeroDivisionError

    for value in ("a", "b", "b", "c"):
        write = journal.add(value)
        write.on_done(broken)
        write.on_done(lambda problem, value=value: told.append((value, problem and str(problem))))  # type: ignore[misc]
    go_on()
    journal.add("d").wait(10)
    assert told == [("a", None), ("b", None), ("b", "explained: UNIQUE constraint failed: rows.value"), ("c", None)]


def test_closing_commits_what_waits_and_takes_no_more(journal: Journal) -> None:
    go_on = journal.hold()
    writes = [journal.add(str(n)) for n in range(600)]
    go_on()
    assert journal.writer.close(20)
    assert all(write.done() for write in writes)
    with pytest.raises(StoreError, match="closed"):
        journal.add("late")
    assert len(journal.values()) == 600


def test_closing_does_not_wait_for_ever(journal: Journal) -> None:
    go_on = journal.hold()
    assert not journal.writer.close(0.05)
    go_on()
    assert journal.writer.close(20)


MIB = 1024 * 1024


def test_a_transaction_has_256_writes_and_four_mebibytes_at_most(journal: Journal) -> None:
    go_on = journal.hold()
    writes = [journal.add(str(n)) for n in range(513)]
    go_on()
    writes[-1].wait(10)
    assert journal.commits() == 3
    go_on = journal.hold()
    writes = [journal.add(f"large {n}", size=2 * MIB) for n in range(2)] + [journal.add("small", size=1)]
    go_on()
    writes[-1].wait(10)
    assert journal.commits() == 2


def nothing(_: sqlite3.Connection) -> None:
    pass


def test_4096_writes_may_wait_and_a_quarter_of_the_places_is_for_urgent_ones(journal: Journal) -> None:
    go_on = journal.hold()
    for _ in range(3072):
        journal.writer.submit(nothing)
    with pytest.raises(StoreError, match=r"3072 writes \(0 bytes\)"):
        journal.writer.submit(nothing)
    for _ in range(1024):
        journal.writer.submit(nothing, urgent=True)
    with pytest.raises(StoreError, match="4096 writes"):
        journal.writer.submit(nothing, urgent=True)
    go_on()


def test_64_mebibytes_may_wait_and_a_quarter_of_them_is_for_urgent_writes(journal: Journal) -> None:
    go_on = journal.hold()
    journal.writer.submit(nothing, size=1)
    journal.writer.submit(nothing, size=48 * MIB - 1)
    with pytest.raises(StoreError, match="too slow"):
        journal.writer.submit(nothing, size=1)
    last = journal.writer.submit(nothing, size=16 * MIB, urgent=True)
    with pytest.raises(StoreError, match=f"{64 * MIB} bytes"):
        journal.writer.submit(nothing, size=1, urgent=True)
    go_on()
    last.wait(10)
    journal.writer.submit(nothing, size=48 * MIB).wait(10)  # nothing of what is done counts on


def test_the_log_is_short_from_a_full_disk_on_until_something_is_written_that_is_not_urgent(journal: Journal) -> None:
    journal.add("before").wait(10)
    journal.writer._free_room()
    assert journal.statements[-2:] == ["PRAGMA wal_autocheckpoint = 16", "PRAGMA wal_checkpoint(TRUNCATE)"]
    journal.statements.clear()
    journal.add("an end", urgent=True).wait(10)
    assert not any("autocheckpoint" in statement for statement in journal.statements)
    journal.add("a request").wait(10)
    journal.add("another one").wait(10)
    assert journal.statements.count("PRAGMA wal_autocheckpoint = 1000") == 1


def test_a_thread_without_work_looks_again_only_while_something_is_wrong(journal: Journal) -> None:
    assert journal.writer._look_again_s() is None
    journal.writer.trouble = StoreError("a disk that failed")
    assert journal.writer._look_again_s() == 2.0
    journal.writer._locked_out = StoreError("another program")
    assert journal.writer._look_again_s() == 0.25


def test_syncing_is_set_once_for_writes_of_one_kind(journal: Journal) -> None:
    for _ in range(3):
        journal.writer.submit(nothing, durable=True).wait(10)
    assert [each for each in journal.statements if "synchronous" in each] == ["PRAGMA synchronous = FULL"]
    journal.writer.submit(nothing).wait(10)
    assert [each for each in journal.statements if "synchronous" in each][1:] == ["PRAGMA synchronous = NORMAL"]


def test_what_somebody_asks_after_the_end_of_a_write_is_answered_at_once(journal: Journal) -> None:
    write = journal.add("a")
    write.wait(10)
    told: list[object] = []
    write.on_done(told.append)
    assert told == [None]
    assert write.done()
    twice = journal.add("a")
    for _ in range(2):
        with pytest.raises(StoreError, match="explained: UNIQUE"):
            twice.wait(10)
    twice.on_done(told.append)
    assert isinstance(told[1], StoreError)


def of_sqlite(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("odd")
    error.sqlite_errorcode = code
    return error


def test_trouble_of_a_disk_is_over_when_something_was_written_and_not_before(journal: Journal) -> None:
    journal.writer.trouble = StoreError("a disk that failed")
    journal.writer.submit(nothing).wait(10)
    assert journal.trouble() is not None, "nothing was written"
    journal.add("a").wait(10)
    assert journal.trouble() is None


def test_of_several_troubles_the_newest_is_told_but_damage_is_not_covered_up(journal: Journal) -> None:
    writer = journal.writer
    full, broken, locked = (StoreError(word) for word in ("full", "damaged", "locked"))
    writer._hindered(of_sqlite(sqlite3.SQLITE_FULL), full)
    writer._hindered(of_sqlite(sqlite3.SQLITE_BUSY), locked)
    assert journal.trouble() is locked
    writer._well_again()
    assert journal.trouble() is None
    writer._hindered(of_sqlite(sqlite3.SQLITE_CORRUPT), broken)
    writer._hindered(of_sqlite(sqlite3.SQLITE_FULL), full)
    journal.add("one part of the file can be written").wait(10)
    assert journal.trouble() is broken


def test_a_look_whether_others_let_go_waits_for_nobody(journal: Journal, tmp_path: Path) -> None:
    writer = journal.writer
    with closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        writer._locked_out = StoreError("another program")
        journal.statements.clear()
        writer._probe()
        assert writer._locked_out is not None
        assert "PRAGMA busy_timeout = 0" in journal.statements
        assert journal.statements[-1] == "PRAGMA busy_timeout = 100", "as long as before"
        with pytest.raises(StoreError, match="another program"):
            journal.add("refused at once")
        writer.trouble = StoreError("a disk that failed")
        writer._try()
        assert journal.trouble() is not None
        shell.execute("ROLLBACK")
        writer._try()
        assert journal.trouble() is None
    writer.trouble = StoreError("another program")
    writer._probe()
    assert journal.trouble() is None
    journal.add("taken again").wait(10)


def test_the_thread_does_not_keep_a_process_that_ends(journal: Journal) -> None:
    assert journal.writer._thread.daemon
    assert journal.writer._thread.name == "journal"


def test_a_disk_that_fails_in_the_middle_of_a_transaction_leaves_nothing_of_it_open(journal: Journal) -> None:
    go_on = journal.hold()

    def broken_disk(_: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    first, broken = journal.add("first"), journal.writer.submit(broken_disk)
    go_on()
    for write in (first, broken):
        with pytest.raises(StoreError, match="disk I/O error"):
            write.wait(10)
    assert journal.values() == []
    journal.add("afterwards").wait(10)
    assert journal.values() == ["afterwards"]
