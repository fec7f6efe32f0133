"""Ends that the journal does not take: bounded, tried again, told in time, and forgotten where a reset says so."""

from __future__ import annotations

import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.ports import Entry, EntryKey, HistoryChange, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.worker import unstored_ends
from llamacpp_mqtt_deploy.worker.unstored_ends import TELL_AFTER_S, UnstoredEnds

SESSION = ("default", "demo")


class Disk(SqliteStore):
    """Fails with `problem` as long as there is one; each attempt takes `takes_s` by the clock of the test."""

    problem: Exception | None = StoreError("no space left")
    takes_s = 0.0

    def __init__(self, clock: list[float]) -> None:
        super().__init__(None)
        self.clock, self.tried = clock, list[str]()

    def finish(self, key: EntryKey, *args: Any, **more: Any) -> None:
        self.tried.append(key.request_id)
        self.clock[0] += self.takes_s
        if self.problem is not None:
            raise self.problem
        super().finish(key, *args, **more)


class Bench:
    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.store = Disk(clock)
        self.store.open()
        self.ends = UnstoredEnds(self.store)
        self.told: list[str] = []

    def add(self, name: str, *, size: int = 3, since: float | None = None, **more: Any) -> EntryKey:
        key = EntryKey(*SESSION, name)
        self.store.accept([Entry(key=key, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")])
        given: dict[str, Any] = {"history": None, "chunks": None, "then": lambda: self.told.append(name)} | more
        self.ends.add(key, b"x" * size, now=1.0, since=self.clock[0] if since is None else since, **given)
        return key

    def names(self) -> set[str]:
        return {key.request_id for key in self.ends.waiting()}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    clock = [1000.0]
    bench = Bench(clock)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return bench


def _history() -> HistoryChange:
    return HistoryChange(session=SESSION, append=({"role": "user", "content": "hi"},))


def test_an_end_is_told_once_as_soon_as_it_is_stored(bench: Bench) -> None:
    key = bench.add("r1", history=_history(), chunks=b"record")
    bench.ends.catch_up()
    assert (bench.told, bench.names()) == ([], {"r1"})
    end = bench.ends.find(key)
    assert end is not None
    assert end.terminal == b"xxx"
    bench.store.problem = None
    for _ in range(2):
        bench.ends.catch_up()
    assert (bench.told, bench.names(), bench.ends.find(key)) == (["r1"], set(), None)
    assert bench.store.chunks(key) == b"record"
    assert [message["content"] for message in bench.store.history(SESSION)] == ["hi"]
    assert bench.store.tried == ["r1", "r1"]


def test_an_end_that_is_kept_back_for_long_is_told_once_and_stored_later(bench: Bench) -> None:
    bench.add("r1", since=bench.clock[0] + 1.0 - TELL_AFTER_S)
    bench.clock[0] += 0.9
    bench.ends.catch_up()
    assert bench.told == []
    bench.clock[0] += 0.1
    with capture_logs() as lines:
        for _ in range(2):
            bench.ends.catch_up()
    assert bench.told == ["r1"]
    assert [line["event"] for line in lines] == ["journal.end_told_unstored"]
    assert bench.names() == {"r1"}
    bench.store.problem = None
    bench.ends.catch_up()
    assert (bench.told, bench.names()) == (["r1"], set())


def test_an_end_is_kept_back_for_twenty_seconds_which_is_less_than_a_client_waits() -> None:
    assert TELL_AFTER_S == 20.0


def test_a_disk_that_hangs_keeps_no_end_from_being_told(bench: Bench) -> None:
    for number in range(9):
        bench.add(f"r{number}", since=bench.clock[0] - TELL_AFTER_S)
    bench.store.takes_s = 1.0
    bench.ends.catch_up()
    assert bench.store.tried == ["r0", "r1", "r2"], "a round takes two seconds"
    assert bench.told == [f"r{number}" for number in range(9)]


def test_a_defect_of_one_end_costs_the_others_nothing(bench: Bench) -> None:
    def broken() -> None:
        raise RuntimeError("a defect")

    bench.add("r1", then=broken)
    bench.add("r2")
    bench.add("r3", then=None)
    bench.store.problem = None
    with capture_logs() as lines:
        bench.ends.catch_up()
    assert bench.told == ["r2"]
    assert [line["event"] for line in lines].count("ending.failed") == 1


def test_an_end_that_the_store_cannot_take_for_a_defect_is_told_and_given_up(bench: Bench) -> None:
    bench.add("r1")
    bench.store.problem = RuntimeError("a defect")
    with capture_logs() as lines:
        bench.ends.catch_up()
    assert [line["event"] for line in lines] == ["journal.failed"]
    assert (bench.told, bench.names()) == (["r1"], set())


def test_no_more_than_a_thousand_ends_and_64_mib_are_kept_and_the_oldest_are_told_then(bench: Bench) -> None:
    for number in range(1001):
        bench.add(f"r{number}")
    assert (bench.told, len(bench.names())) == (["r0"], 1000)
    few = Bench(bench.clock)
    mib = 1024 * 1024
    few.add("a", size=32 * mib)
    few.add("b", size=32 * mib)
    assert few.told == []
    few.add("c", size=1)
    assert (few.told, few.names()) == (["a"], {"b", "c"})
    few.add("d", size=65 * mib)
    assert (few.told, few.names()) == (["a", "b", "c"], {"d"}), "one of any size is kept"
    few.add("e", size=1)
    assert few.names() == {"e"}


def test_what_an_end_carries_counts_with_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unstored_ends, "_MAX_UNSTORED_BYTES", 100)
    large = HistoryChange(session=SESSION, append=({"role": "user", "content": "h" * 40},))
    for name, more in (("history", {"history": large}), ("chunks", {"chunks": b"c" * 60})):
        bench.add(f"small-{name}", size=40)
        bench.add(name, size=1, **more)
        assert bench.told.pop() == f"small-{name}"
        bench.store.problem = None
        bench.ends.catch_up()
        bench.told.clear()
        bench.store.problem = StoreError("no space left")


def test_the_same_end_twice_counts_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unstored_ends, "_MAX_UNSTORED_BYTES", 100)
    for _ in range(3):
        bench.add("r1", size=60)
    bench.add("r2", size=40)
    assert (bench.told, bench.names()) == ([], {"r1", "r2"})


def test_a_reset_takes_the_history_of_its_session_and_no_other(bench: Bench) -> None:
    other = ("default", "other")
    bench.add("r1", history=_history())
    bench.add("r2", history=HistoryChange(session=other, append=({"role": "user", "content": "kept"},)))
    bench.add("r3")
    bench.ends.forget(SESSION)
    bench.store.problem = None
    bench.ends.catch_up()
    assert bench.store.history(SESSION) == ()
    assert [message["content"] for message in bench.store.history(other)] == ["kept"]
    assert bench.told == ["r1", "r2", "r3"]
