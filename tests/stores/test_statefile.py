"""The file that holds the state: what is said of its errors, whose file it is, and what it gives back to the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.ports import StoreError, StoreFull, StoreInUse
from llamacpp_mqtt_deploy.stores import schema, statefile
from llamacpp_mqtt_deploy.stores.memory import MemoryFile
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.stores.statefile import StateFile, translated
from tests.support.store_cases import NOW, SESSION, entry, key, talk

PATH = Path("/var/lib/lmd/state.db")
MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


def filled(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    for number in range(30):
        talk(store, SESSION, at=NOW + number, text=f"{number} " + "x" * 300)
    store.close()


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code,words",
    [
        (sqlite3.SQLITE_FULL, "The disk that holds /var/lib/lmd/state.db is full: free some space there"),
        (sqlite3.SQLITE_READONLY, "cannot be written: set sessions.path"),
        (sqlite3.SQLITE_READONLY_DBMOVED, "cannot be written: set sessions.path"),
        (sqlite3.SQLITE_CANTOPEN, "cannot be written: set sessions.path"),
        (sqlite3.SQLITE_PERM, "cannot be written: set sessions.path"),
        (sqlite3.SQLITE_AUTH, "cannot be written: set sessions.path"),
        (sqlite3.SQLITE_BUSY, "Another program holds /var/lib/lmd/state.db"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, "Another program holds /var/lib/lmd/state.db"),
        (sqlite3.SQLITE_LOCKED, "Another program holds /var/lib/lmd/state.db"),
        (sqlite3.SQLITE_CORRUPT, "is damaged: restart the worker"),
        (sqlite3.SQLITE_NOTADB, "is damaged: restart the worker"),
        (sqlite3.SQLITE_IOERR, "look for disk errors (dmesg)"),
        (sqlite3.SQLITE_IOERR_WRITE, "look for disk errors (dmesg)"),
        (sqlite3.SQLITE_CONSTRAINT, "SQLite refused to work on /var/lib/lmd/state.db"),
        (None, "SQLite refused to work on /var/lib/lmd/state.db"),
    ],
)
def test_each_error_of_the_database_says_what_to_do(code: int | None, words: str) -> None:
    error = sqlite3.OperationalError("odd")
    if code is not None:
        error.sqlite_errorcode, error.sqlite_errorname = code, "SQLITE_NAME"
    told = translated(error, PATH)
    assert words in str(told)
    assert str(told).endswith("(odd; SQLITE_NAME)." if code is not None else "(odd; OperationalError).")
    assert isinstance(told, StoreFull) is (code == sqlite3.SQLITE_FULL)


@pytest.mark.parametrize("number, full", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_each_error_of_the_file_system_says_what_to_do(number: int, full: bool) -> None:
    told = translated(OSError(number, os.strerror(number)), PATH)
    assert isinstance(told, StoreFull) is full
    assert ("full: free some space" if full else "cannot be opened: set sessions.path") in str(told)
    assert str(told).endswith(f"({os.strerror(number)}).")
    assert str(translated(OSError("odd"), PATH)).endswith("(odd).")


# --- locks and disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_does_not_stop_the_worker(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def without(*_: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", without)
    store = SqliteStore(path)
    store.open()
    talk(store, SESSION)
    store.close()


def test_a_lock_that_fails_otherwise_stops_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: int) -> None:
        raise OSError(errno.EIO, "a bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", failing)
        with pytest.raises(StoreError, match="a bad disk"):
            SqliteStore(path).open()


def test_a_disk_with_less_than_a_quarter_of_a_mebibyte_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(tmp_path / "state.db")
    disk = os.statvfs(tmp_path)
    for blocks, full in ((64, False), (63, True)):
        found = os.statvfs_result([disk[0], 4096, *disk[2:4], blocks, *disk[5:]])
        monkeypatch.setattr(os, "statvfs", lambda _, found=found: found)
        assert file._disk_is_full() is full

    def failing(_: object) -> None:
        raise OSError(errno.EIO, "a bad disk")

    monkeypatch.setattr(os, "statvfs", failing)
    assert not file._disk_is_full()


def test_without_a_second_connection_reads_take_turns_with_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(path)
    assert file.reader() is None, "nothing says yet that there is a write-ahead log"
    monkeypatch.setattr(StateFile, "reader", lambda _: None)
    store = SqliteStore(path)
    store.open()
    talk(store, SESSION)
    assert len(store.history(SESSION)) == 2
    store.close()


def test_the_second_connection_only_reads(path: Path) -> None:
    file = StateFile(path)
    connection = file.open(lambda _: None)
    reader = file.reader()
    assert reader is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("DELETE FROM entries")
    reader.close()
    connection.close()
    file.release()
    file.release()


def test_a_database_that_is_open_is_waited_for_one_second(path: Path) -> None:
    file = StateFile(path)
    connection = file.open(lambda _: None)
    reader = file.reader()
    assert reader is not None
    for each in (connection, reader):
        assert each.execute("PRAGMA busy_timeout").fetchone() == (1000,)
        each.close()
    file.release()


def test_a_log_is_cut_to_eight_mebibytes_and_forgotten_text_is_overwritten(path: Path) -> None:
    file = StateFile(path)
    connection = file.open(lambda _: None)
    found = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in SETTINGS}
    assert found == SETTINGS
    connection.close()
    file.release()


SETTINGS = {
    "journal_mode": "wal",
    "journal_size_limit": 8 * 1024 * 1024,
    "secure_delete": 2,  # FAST
    "temp_store": 2,  # MEMORY
    "synchronous": 2,  # FULL
    "auto_vacuum": 2,  # INCREMENTAL
    "application_id": 0x4C4D4451,
    "user_version": 3,
}


# --- whose file it is ------------------------------------------------------------------------------------------------


def test_a_log_that_another_program_keeps_from_being_folded_in_is_told_until_that_program_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statefile, "LONG_LOG_BYTES", MIB)
    wal = path.with_name(path.name + "-wal")
    store = SqliteStore(path)
    store.open()

    def grown_to(mebibytes: int) -> str:
        number = 0
        while wal.stat().st_size <= mebibytes * MIB:
            number += 1
            store.accept([entry(f"{mebibytes}-{number}", payload=b"x" * 200_000)])
        store.purge(now=NOW, remember_s=600, ttl_s=86400, max_sessions=100)
        return store.trouble()

    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM entries").fetchall()
    told = grown_to(2)
    assert f"{wal} is larger than 2 MiB and grows until the disk is full: another program has {path} open" in told
    assert grown_to(3) == told, "not another line in the log every few seconds"
    assert "is larger than 4 MiB" in grown_to(5)
    reader.close()
    store.purge(now=NOW, remember_s=600, ttl_s=86400, max_sessions=100)
    assert not store.trouble(), "without a further write"
    assert wal.stat().st_size == 0
    assert not grown_to(2), "what is long for a moment, with nobody to read in it, is cut and not told"
    assert wal.stat().st_size < MIB
    store.close()


def test_a_program_that_reads_is_not_waited_for_with_a_long_log(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writer would wait behind."""
    monkeypatch.setattr(statefile, "LONG_LOG_BYTES", 1)
    monkeypatch.setattr(statefile, "BUSY_TIMEOUT_S", 600.0)
    store = SqliteStore(path)
    store.open()
    store.accept([entry()])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM entries").fetchall()
    store.purge(now=NOW, remember_s=600, ttl_s=86400, max_sessions=100)
    assert "another program" in store.trouble()
    reader.close()
    store.close()


def damaged_copy(path: Path, directory: Path) -> Path:
    """Half of a database, as a copy that a kill left behind: without what a worker notes beside its own file."""
    directory.mkdir()
    copy = directory / "state.db"
    shutil.copy(path, copy)
    os.truncate(copy, path.stat().st_size // 2 // 4096 * 4096)
    (directory / "state.db-wal").write_bytes(b"left by a kill")
    return copy


def test_a_damaged_copy_of_a_state_file_is_known_by_its_header(path: Path, tmp_path: Path) -> None:
    filled(path)
    copy = damaged_copy(path, tmp_path / "restored")
    store = SqliteStore(copy)
    store.open()
    assert store.moved_aside is not None
    store.close()


@pytest.mark.parametrize("number", [0x4C4D4450, 0x4C4D4451 + 2**24, 0])
def test_a_damaged_database_of_another_program_is_left_alone(path: Path, tmp_path: Path, number: int) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA application_id = {number}")
    db.close()
    copy = damaged_copy(path, tmp_path / "restored")
    before = copy.read_bytes()
    with pytest.raises(StoreError, match="not a state file of this program"):
        SqliteStore(copy).open()
    assert copy.read_bytes() == before


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_purge_gives_back_one_mebibyte_at_a_time_and_one_stays_for_what_comes_next(
    path: Path, in_memory: bool
) -> None:
    store = SqliteStore(None if in_memory else path)
    store.open()
    names = [f"r{n}" for n in range(200)]
    store.accept([entry(name) for name in names])
    for name in names:
        store.finish(key(name), bytes(20_000), now=NOW)
    store.mark_delivered([key(name) for name in names])

    def spare_pages_after_a_purge() -> int:
        store.purge(now=NOW + 1000, remember_s=600, ttl_s=1e9, max_sessions=1000)
        with store._read() as db:
            return int(db.execute("PRAGMA freelist_count").fetchone()[0])

    before = spare_pages_after_a_purge()
    assert before > 2 * 256
    assert [spare_pages_after_a_purge() for _ in range(3)] == [before - 256, 256, 256]
    store.close()


def test_an_end_larger_than_what_one_purge_drops_is_dropped_alone(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    store.accept([entry("huge"), entry("next")])
    store.finish(key("huge"), bytes(5 * 1024 * 1024), now=NOW)
    store.finish(key("next"), b"", now=NOW)
    store.mark_delivered([key("huge"), key("next")])
    limits: dict[str, Any] = {"now": NOW + 1000, "remember_s": 600, "ttl_s": 1e9, "max_sessions": 1000}
    assert [(purged.entries, purged.more) for purged in (store.purge(**limits), store.purge(**limits))] == [
        (1, True),
        (1, False),
    ]
    store.close()


def test_the_version_of_the_file_is_the_number_of_its_migrations() -> None:
    assert len(schema.MIGRATIONS) == SETTINGS["user_version"]


# --- in memory -------------------------------------------------------------------------------------------------------


def test_a_state_in_memory_has_no_disk_that_could_be_full_or_damaged() -> None:
    file = MemoryFile()
    assert (file.full(), file.make_room(), file.reader(), file.moved_aside) == (None, False, None, None)
    store = SqliteStore(None)
    store.open()
    assert store._open is not None
    write = store._open.writer.submit(lambda db: db.execute("SELECT * FROM missing_table"))
    with pytest.raises(StoreError, match="missing_table"):
        write.wait(10)
    assert store.trouble() == ""
    store.close()


@pytest.mark.skipif(sqlite3.sqlite_version_info < (3, 37), reason="this SQLite does not enforce types")
def test_a_value_of_a_wrong_type_is_not_written(path: Path) -> None:
    connection = StateFile(path).open(lambda _: None)
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
        connection.execute("INSERT INTO sessions VALUES (1, 'default', 's', 's', 0, 0, 'many')")
    connection.close()


# --- what is logged --------------------------------------------------------------------------------------------------


def opened_and_closed(path: Path) -> list[str]:
    """The events that are logged meanwhile."""
    with capture_logs() as logs:
        store = SqliteStore(path)
        store.open()
        store.close()
    return [line["event"] for line in logs]


def test_a_new_and_an_older_file_are_told_in_the_log_and_an_ordinary_one_is_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened_and_closed(path) == ["store.created"]
    assert opened_and_closed(path) == []
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("CREATE TABLE more (a)",)))
    assert opened_and_closed(path) == ["store.migrated"]
    assert opened_and_closed(path) == []


def test_a_worker_that_noted_no_pid_is_unknown(path: Path) -> None:
    path.parent.mkdir()
    with path.with_name("state.db.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreInUse, match="Another worker, pid unknown, uses"):
            SqliteStore(path).open()


def test_neither_connection_keeps_more_than_half_a_mebibyte_of_a_large_file(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    for number in range(40):
        talk(store, ("default", f"s{number}"), text="x" * 50_000)
        assert store.history(("default", f"s{number}"))
    opened = store._opened()
    assert path.stat().st_size + path.with_name(path.name + "-wal").stat().st_size > 2_000_000
    with opened.writer.exclusive() as writer, opened.reading() as reader:
        assert writer is not reader
        assert [db.execute("PRAGMA cache_size").fetchone() for db in (writer, reader)] == [(-500,), (-500,)]
    store.close()


def test_a_damaged_file_that_was_just_moved_aside_is_kept_though_the_clock_is_behind(path: Path) -> None:
    path.parent.mkdir(parents=True)
    newer = [path.with_name(f"{path.name}.corrupt-29{year}0101T000000.000000Z") for year in range(10, 14)]
    for copy in newer:
        copy.write_bytes(b"an older one")
    filled(path)
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 8000)
    store = SqliteStore(path)
    store.open()
    store.close()
    assert store.moved_aside is not None
    assert sorted(path.parent.glob(f"{path.name}.corrupt-*")) == [store.moved_aside, *newer[-2:]]
