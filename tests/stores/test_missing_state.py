"""State that is removed or replaced under a store that works with it: the next purge notices, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.ports import StoreError, StoreInUse
from llamacpp_mqtt_deploy.stores import schema, sqlite, statefile
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import NOW, SESSION, entry, key, talk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    store.open()
    yield store
    store.close()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _purge(store: SqliteStore) -> None:
    store.purge(now=NOW, remember_s=600, ttl_s=86400, max_sessions=100)


def _replace(path: Path) -> None:
    """As `mv`, rsync and others do it."""
    shutil.copy(path, path.with_name("draft"))
    path.with_name("draft").rename(path)


def the_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def the_database(path: Path) -> None:
    path.unlink()


def its_log(path: Path) -> None:
    _beside(path, "-wal").unlink()


def its_index_of_the_log(path: Path) -> None:
    _beside(path, "-shm").unlink()


def its_lock(path: Path) -> None:
    _beside(path, ".lock").unlink()


def by_another_database(path: Path) -> None:
    _replace(path)


def by_another_database_and_log(path: Path) -> None:
    _replace(path)
    _replace(_beside(path, "-wal"))


def by_a_new_mount(path: Path) -> None:
    path.parent.rename(path.parent.with_name("hidden"))
    shutil.copytree(path.parent.with_name("hidden"), path.parent)


@pytest.mark.parametrize(
    "gone",
    [
        the_directory,
        the_database,
        its_log,
        its_index_of_the_log,
        its_lock,
        by_another_database,
        by_another_database_and_log,
        by_a_new_mount,
    ],
)
def test_whatever_is_removed_or_replaced_is_there_again_after_the_next_purge_with_all_that_was_known(
    store: SqliteStore, path: Path, tmp_path: Path, gone: Callable[[Path], None]
) -> None:
    store.accept([entry("before")])
    talk(store, SESSION)
    gone(path)
    store.accept([entry("unnoticed")])
    _purge(store)
    assert "nothing is lost" in store.trouble()
    assert store.find(key("unnoticed")) is not None
    store.accept([entry("after")])
    store.finish(key("before"), b"{}", now=NOW)
    with pytest.raises(StoreInUse, match=f"pid {os.getpid()}"):
        SqliteStore(path).open()
    # What a kill at this moment leaves behind: the log is not folded in.
    shutil.copytree(path.parent, tmp_path / "killed")
    killed = SqliteStore(tmp_path / "killed" / path.name)
    killed.open()
    for life in (store, killed):
        assert [e.key.request_id for e in life.unfinished()] == ["unnoticed", "after"]
        assert len(life.history(SESSION)) == 2
    killed.close()
    mended = store.trouble()
    _purge(store)
    assert store.trouble() == mended, "noticed once"
    store.close()
    store.open()
    assert [e.key.request_id for e in store.unfinished()] == ["unnoticed", "after"]
    assert not store.trouble()


def test_a_file_that_was_written_anew_is_kept_small_as_before(store: SqliteStore, path: Path) -> None:
    """What each client holds of it is counted along with the connection that writes."""
    names = [f"r{number}" for number in range(20)]
    store.accept([entry(name) for name in names])
    for name in names:
        store.finish(key(name), b"x" * 3000, now=NOW)
    path.unlink()
    _purge(store)
    store.mark_delivered([key(name) for name in names])
    dropped = store.purge(now=NOW, remember_s=600, ttl_s=86400, max_sessions=100, max_bytes=10 * 3512).entries
    assert dropped == 15, "a single client may hold half"
    assert [name for name in names if store.find(key(name)) is None] == names[:15]


def test_what_lies_at_the_path_instead_is_kept_aside_whole(store: SqliteStore, path: Path, tmp_path: Path) -> None:
    """A backup that somebody restored while the worker ran, beside the log of the file that it replaced."""
    backup = tmp_path / "backup.db"
    other = SqliteStore(backup)
    other.open()
    other.accept([entry("of the backup")])
    other.close()
    store.accept([entry()])
    backup.rename(path)
    _purge(store)
    (aside,) = path.parent.glob("state.db.replaced-*")
    assert str(aside) in store.trouble()
    assert "To restore a backup, stop the worker first" in store.trouble()
    assert [e.key for e in store.unfinished()] == [key()]
    with closing(sqlite3.connect(aside)) as shell:
        assert shell.execute("SELECT request_id FROM entries").fetchall() == [("of the backup",)]


def test_a_program_that_replaces_the_file_again_and_again_does_not_fill_the_disk(
    store: SqliteStore, path: Path
) -> None:
    store.accept([entry()])
    for _ in range(5):
        _replace(path)
        _purge(store)
    assert len(list(path.parent.glob("state.db.replaced-*"))) == statefile.KEPT_COPIES
    assert store.find(key()) == entry()


def test_nothing_new_is_accepted_while_the_directory_cannot_be_made_and_what_was_accepted_ends(
    store: SqliteStore, path: Path
) -> None:
    store.accept([entry("before")])
    shutil.rmtree(path.parent)
    path.parent.write_text("in its way")
    _purge(store)
    assert f"{path} (the database itself) was removed" in store.trouble()
    assert f"Make the directory {path.parent} again" in store.trouble()
    with pytest.raises(StoreError, match="takes no new requests"):
        store.accept([entry("refused")])
    store.finish(key("before"), b"{}", now=NOW)
    _purge(store)
    assert "takes no new requests" in store.trouble()
    path.parent.unlink()
    _purge(store)
    assert "nothing is lost" in store.trouble()
    store.accept([entry("after")])
    store.close()
    store.open()
    assert [e.key for e in store.unfinished()] == [key("after")]
    assert [e.key for e in store.undelivered()] == [key("before")]


def test_a_file_that_cannot_be_written_anew_is_tried_again_under_the_lock_that_is_held(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.accept([entry()])
    shutil.rmtree(path.parent)

    def no_room(*_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(schema, "migrate", no_room)
        for _ in range(2):
            _purge(store)
            assert "is full: free some space" in store.trouble()
    assert not path.exists(), "no half of a file is left"
    _purge(store)
    assert "nothing is lost" in store.trouble()
    store.close()
    store.open()
    assert store.find(key()) == entry()


def test_a_second_worker_that_has_taken_the_path_meanwhile_is_named_and_keeps_its_file(
    store: SqliteStore, path: Path
) -> None:
    store.accept([entry("first")])
    shutil.rmtree(path.parent)
    second = SqliteStore(path)
    second.open()
    second.accept([entry("second")])
    _purge(store)
    assert f"Another worker, pid {os.getpid()}, uses {path}: stop it" in store.trouble()
    with pytest.raises(StoreError, match="Another worker"):
        store.accept([entry("refused")])
    assert [e.key for e in second.unfinished()] == [key("second")]
    second.close()
    _purge(store)
    assert "nothing is lost" in store.trouble()
    assert [e.key for e in store.unfinished()] == [key("first")]
    assert len(list(path.parent.glob("state.db.replaced-*"))) == 1


def test_a_mount_that_comes_back_ends_the_trouble(store: SqliteStore, path: Path) -> None:
    store.accept([entry()])
    hidden = path.parent.with_name("hidden")
    path.parent.rename(hidden)
    path.parent.write_text("in its way")
    _purge(store)
    assert store.trouble()
    path.parent.unlink()
    hidden.rename(path.parent)
    _purge(store)
    assert not store.trouble()
    store.accept([entry("after")])


def test_a_log_that_another_program_reads_is_not_folded_in_by_force(store: SqliteStore, path: Path) -> None:
    store.accept([entry()])
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN")
        shell.execute("SELECT * FROM entries").fetchall()
        its_log(path)
        _purge(store)
        assert f"Another program holds {path}" in store.trouble()
        assert store.find(key()) == entry()
    _purge(store)
    assert "nothing is lost" in store.trouble()
    assert store.find(key()) == entry()


def test_a_store_can_be_read_while_a_large_file_is_written_anew_and_what_is_written_meanwhile_comes_after(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take longer than a purge waits for it."""
    store.accept([entry("before")])
    path.unlink()
    monkeypatch.setattr(sqlite, "PURGE_TIMEOUT_S", 0.05)
    copied, go_on = threading.Event(), threading.Event()

    def slowly(*_: object) -> None:
        copied.set()
        assert go_on.wait(20)

    monkeypatch.setattr(statefile, "_must_not_wait", slowly)
    with pytest.raises(StoreError, match="has not taken a write"):
        _purge(store)
    assert copied.wait(20)
    meanwhile = store.accept_soon([entry("meanwhile")])
    assert store.find(key("before")) == entry("before")
    assert not meanwhile.done()
    go_on.set()
    meanwhile.wait(20)
    store.close()
    store.open()
    assert [e.key.request_id for e in store.unfinished()] == ["before", "meanwhile"]


def test_a_store_that_is_closed_while_its_file_is_written_anew_waits_for_it(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.accept([entry()])
    path.unlink()
    monkeypatch.setattr(sqlite, "PURGE_TIMEOUT_S", 0.05)
    copied, go_on = threading.Event(), threading.Event()

    def slowly(*_: object) -> None:
        copied.set()
        assert go_on.wait(20)

    monkeypatch.setattr(statefile, "_must_not_wait", slowly)
    with pytest.raises(StoreError, match="has not taken a write"):
        _purge(store)
    assert copied.wait(20)
    closing_it = threading.Thread(target=store.close)
    closing_it.start()
    go_on.set()
    closing_it.join(20)
    store.open()
    assert store.find(key()) == entry()


def test_a_store_that_is_left_alone_misses_nothing_in_any_of_its_lives(path: Path) -> None:
    for _ in range(2):
        store = SqliteStore(path)
        store.open()
        store.accept([entry()])
        with closing(sqlite3.connect(path)) as shell:
            shell.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        _purge(store)
        assert not store.trouble()
        store.close()


def test_a_state_in_memory_has_no_path_that_could_be_removed() -> None:
    store = SqliteStore(None)
    store.open()
    store.accept([entry()])
    _purge(store)
    assert not store.trouble()
    store.close()
