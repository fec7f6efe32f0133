"""A session's own system prompt: kept as long as the session, over restarts, and no longer."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.ports import SessionPrompts
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import NOW, SESSION, new_store, talk

OTHER = ("default", "hall")


@pytest.fixture(params=["sqlite", "memory", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    store = new_store(request.param, tmp_path)
    store.open()
    yield store
    store.close()


def test_a_session_keeps_the_prompt_that_it_was_given_last(store: Any) -> None:
    assert isinstance(store, SessionPrompts)
    assert store.system_prompt(SESSION) is None
    for prompt in ("Be kind.", "Be brief. \N{GRINNING FACE}"):
        store.set_system_prompt(SESSION, prompt, now=NOW, reset=True)
        assert store.system_prompt(SESSION) == prompt
    assert store.system_prompt(OTHER) is None
    assert store.system_prompt(("maze", SESSION[1])) is None
    store.set_system_prompt(SESSION, None, now=NOW, reset=False)
    assert store.system_prompt(SESSION) is None


def test_a_new_prompt_forgets_the_history_only_where_that_was_asked_for(store: Any) -> None:
    talk(store, SESSION)
    store.set_system_prompt(SESSION, "Be kind.", now=NOW, reset=False)
    assert len(store.history(SESSION)) == 2
    store.set_system_prompt(SESSION, "Be brief.", now=NOW, reset=True)
    assert store.history(SESSION) == ()
    store.reset(SESSION)
    assert store.system_prompt(SESSION) == "Be brief."


def test_a_session_that_is_forgotten_takes_its_prompt_along(store: Any) -> None:
    store.set_system_prompt(SESSION, "Be kind.", now=NOW, reset=True)
    store.set_system_prompt(OTHER, "Be brief.", now=NOW, reset=True)
    store.delete(SESSION)
    assert store.system_prompt(SESSION) is None
    assert store.system_prompt(OTHER) == "Be brief."
    purged = store.purge(now=NOW + 100, remember_s=600, ttl_s=50, max_sessions=1000)
    assert purged.sessions == 1
    assert store.system_prompt(OTHER) is None


def test_the_sessions_of_a_route_are_told_in_pieces_and_none_that_began_later_whatever_the_clock_says(
    store: Any,
) -> None:
    for number in range(5):
        store.set_system_prompt(("maze", f"s{number}"), "x", now=NOW, reset=True)
    store.set_system_prompt(OTHER, "x", now=NOW, reset=True)
    up_to = store.newest_session()
    for name, at in (("young", NOW + 10), ("young by a clock that was set back", NOW - 86400)):
        store.set_system_prompt(("maze", name), "x", now=at, reset=True)
    pieces = []
    while found := store.sessions("maze", up_to=up_to, most=2):
        pieces.append([name for _, name in found])
        up_to = found[-1][0] - 1
        for name in pieces[-1]:
            store.delete(("maze", name))
        store.set_system_prompt(("maze", f"young{len(pieces)}"), "x", now=NOW, reset=True)
    assert pieces == [["s4", "s3"], ["s2", "s1"], ["s0"]]


def test_numbers_of_sessions_that_are_free_again_are_not_told_once_more(store: Any) -> None:
    for number in range(3):
        store.set_system_prompt(("maze", f"s{number}"), "x", now=NOW, reset=True)
    up_to = store.newest_session()
    told = []
    while found := store.sessions("maze", up_to=up_to, most=1):
        ((number, name),) = found
        told.append(name)
        up_to = number - 1
        store.delete(("maze", name))
        store.set_system_prompt(("maze", f"again {name}"), "x", now=NOW, reset=True)
    assert told == ["s2", "s1", "s0"]


def test_a_prompt_survives_a_restart_and_a_file_of_an_older_worker_gets_its_place(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first = SqliteStore(path)
    first.open()
    first.close()
    with sqlite3.connect(path) as older:
        older.execute("DROP TABLE system_prompts")
    older.close()
    second = SqliteStore(path)
    second.open()
    second.set_system_prompt(SESSION, "Be kind.", now=NOW, reset=True)
    second.close()
    third = SqliteStore(path)
    third.open()
    assert third.system_prompt(SESSION) == "Be kind."
    third.close()


def test_a_prompt_whose_session_an_older_worker_has_forgotten_is_not_there_again(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    store.open()
    for session in (SESSION, OTHER):
        store.set_system_prompt(session, "Be kind.", now=NOW, reset=True)
    store.close()
    with sqlite3.connect(path) as older:
        older.execute("DELETE FROM sessions WHERE session = ?", (SESSION[1],))
    older.close()
    store.open()
    talk(store, SESSION)
    assert store.system_prompt(SESSION) is None
    assert store.system_prompt(OTHER) == "Be kind."
    store.close()
