"""A request that is surely new is not looked up in the journal; one that is not new always is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stores import known_keys, sqlite
from llamacpp_mqtt_deploy.stores.known_keys import KnownKeys
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import entry

keys = st.builds(EntryKey, st.text(max_size=3), st.text(max_size=3), st.text(max_size=3))


@given(st.sets(keys, max_size=30), st.sets(keys, max_size=30), st.sets(keys, max_size=30))
def test_a_key_that_was_added_may_always_be_there(
    before: set[EntryKey], kept: set[EntryKey], later: set[EntryKey]
) -> None:
    known = KnownKeys(before)
    assert all(map(known.may_have, before))

    def read() -> Iterator[EntryKey]:
        yield from kept
        for key in later:  # accepted while the others are read
            known.add(key)

    known.renew(read())
    assert all(map(known.may_have, kept | later))


def test_few_of_the_new_ones_are_looked_up() -> None:
    known = KnownKeys(EntryKey("default", f"s{number % 100}", f"id-{number}") for number in range(50_000))
    in_vain = sum(known.may_have(EntryKey("default", f"s{number % 100}", f"new-{number}")) for number in range(20_000))
    assert in_vain < 20_000 * 0.02


def test_keys_of_many_threads_are_all_kept() -> None:
    known = KnownKeys()

    def add(at: int) -> None:
        for number in range(3000):
            known.add(EntryKey("r", f"{at}", f"{number}"))

    threads = [threading.Thread(target=add, args=[at]) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(known.may_have(EntryKey("r", f"{at}", f"{n}")) for at in range(4) for n in range(3000))


def test_a_journal_that_remembers_much_is_not_read_whole_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "MOST_ADDED", 10)
    many = [EntryKey("r", "s", f"{number}") for number in range(40)]
    known = KnownKeys(many[:20])
    assert not known.is_full(), "all of these are in the journal"
    for key in many[20:]:
        known.add(key)
    assert known.is_full()
    known.renew(many)
    assert not known.is_full()
    assert all(map(known.may_have, many))
    known.renew(many[:2])
    for key in many[:8]:
        known.add(key)
    assert known.is_full(), "ten again"


def test_a_reading_that_fails_changes_nothing() -> None:
    known = KnownKeys([EntryKey("r", "s", "old")])

    def fails() -> Iterator[EntryKey]:
        yield EntryKey("r", "s", "read")
        raise OSError

    with pytest.raises(OSError):
        known.renew(fails())
    assert known.may_have(EntryKey("r", "s", "old"))
    known.add(EntryKey("r", "s", "new"))
    assert known.may_have(EntryKey("r", "s", "new"))


def test_a_restarted_store_finds_what_it_had_and_what_a_purge_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "_KEYS_AT_ONCE", 3)
    monkeypatch.setattr(known_keys, "MOST_ADDED", 10)
    store = SqliteStore(tmp_path / "state.db")
    store.open()
    entries = [entry(request_id=f"r{number}") for number in range(12)]
    store.accept(entries)
    store.close()
    store.open()
    assert all(store.find(each.key) == each for each in entries)
    more = [entry(request_id=f"m{number}") for number in range(12)]
    store.accept(more)  # with the twelve of the last life it is time to begin anew
    for each in entries[:6]:
        store.finish(each.key, b"{}", now=100.0)
    store.mark_delivered([each.key for each in entries[:6]])
    store.purge(now=10_000.0, remember_s=10.0, ttl_s=1e9, max_sessions=10)
    assert [store.find(each.key) is not None for each in entries] == [False] * 6 + [True] * 6
    # Begun anew with those that are left: the rest is not even looked up.
    assert [store._opened().known.may_have(each.key) for each in entries] == [False] * 6 + [True] * 6
    store.close()
