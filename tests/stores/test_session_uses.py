"""A session that is used is not forgotten, though its use is written later than the request that used it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.stores import session_uses
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import NOW, SESSION, entry, key, talk

OTHER = ("default", "hall")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    store.open()
    yield store
    store.close()


def fail(store: SqliteStore, name: str, session: tuple[str, str] = SESSION, *, at: float) -> None:
    """A request that leaves nothing in the history."""
    store.accept([entry(name, session, accepted_at=at)])
    store.finish(key(name, session), b"{}", now=at)
    store.mark_delivered([key(name, session)])


def forgotten(store: SqliteStore, *, now: float, remember_s: float = 600.0) -> int:
    return store.purge(now=now, remember_s=remember_s, ttl_s=100.0, max_sessions=10).sessions


def test_a_request_changes_nothing_of_its_session_when_it_is_accepted(store: SqliteStore, path: Path) -> None:
    talk(store, SESSION)
    fail(store, "later", at=NOW + 90)
    with sqlite3.connect(path) as shell:
        assert shell.execute("SELECT last_used FROM sessions").fetchall() == [(NOW,)]
    shell.close()
    assert forgotten(store, now=NOW + 150) == 0


def test_a_session_is_used_by_requests_that_fail_again_and_again(store: SqliteStore) -> None:
    talk(store, SESSION)
    talk(store, OTHER)
    for turn in range(1, 9):
        fail(store, f"r{turn}", at=NOW + 60 * turn)
        assert forgotten(store, now=NOW + 60 * turn + 30) == (1 if turn == 2 else 0)
    assert store.history(SESSION)
    assert not store.history(OTHER)
    assert forgotten(store, now=NOW + 60 * 8 + 101) == 1


def test_a_request_that_is_forgotten_by_the_same_purge_has_used_its_session(store: SqliteStore) -> None:
    talk(store, SESSION)
    fail(store, "short", at=NOW + 90)
    assert forgotten(store, now=NOW + 150, remember_s=1.0) == 0
    assert store.find(key("short")) is None
    assert store.history(SESSION)


def test_a_use_is_known_after_a_restart(store: SqliteStore) -> None:
    talk(store, SESSION)
    fail(store, "later", at=NOW + 90)
    store.close()
    store.open()
    assert forgotten(store, now=NOW + 150) == 0
    assert forgotten(store, now=NOW + 191) == 1


def test_a_request_that_a_kill_interrupted_has_used_its_session(path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import NOW, SESSION, entry, talk
store = SqliteStore(Path(sys.argv[1]))
store.open()
talk(store, SESSION)
store.accept([entry("running", accepted_at=NOW + 90)])
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code, path], check=False, timeout=60, cwd=Path(__file__).parents[2])
    store = SqliteStore(path)
    store.open()
    store.finish(key("running"), b"{}", now=NOW + 95)  # interrupted: nothing for the history
    assert forgotten(store, now=NOW + 150) == 0
    assert forgotten(store, now=NOW + 191) == 1
    store.close()


def test_a_clock_that_is_set_forward_makes_no_use_older(store: SqliteStore) -> None:
    hour_s = 3600.0
    talk(store, SESSION)
    fail(store, "before", at=NOW + 90)
    store.clock_was_set(hour_s, now=NOW + hour_s + 91)
    fail(store, "after", OTHER, at=NOW + hour_s + 92)
    assert forgotten(store, now=NOW + hour_s + 150) == 0
    assert forgotten(store, now=NOW + hour_s + 191) == 1


def test_uses_of_many_requests_are_noted_some_at_a_time(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_uses, "_REQUESTS_AT_ONCE", 3)
    sessions = [("default", f"s{n}") for n in range(8)]
    for session in sessions:
        talk(store, session)
    for turn in range(3):
        for session in sessions:
            fail(store, f"r{turn}", session, at=NOW + 30 * turn)
    before = store.commit_times.read().count
    assert store.purge(now=NOW + 120, remember_s=600.0, ttl_s=100.0, max_sessions=10).sessions == 0
    assert store.commit_times.read().count - before > 8 + 3, "24 requests, three at a time"
    assert store.purge(now=NOW + 161, remember_s=600.0, ttl_s=100.0, max_sessions=10).sessions == 8
