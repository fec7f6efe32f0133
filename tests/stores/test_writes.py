"""How the store writes: what is synced, what is let through when little else is, and how long anybody waits."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from llamacpp_mqtt_deploy.ports import Purged, StoreError
from llamacpp_mqtt_deploy.stores import group_commit
from llamacpp_mqtt_deploy.stores import sqlite as sqlite_store
from llamacpp_mqtt_deploy.stores.group_commit import GroupCommit, Write
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.stores.statefile import StateFile
from tests.support.store_cases import NOW, SESSION, change, entry, key, talk
from tests.support.waiting import eventually

FULL, NORMAL = 2, 1
"""Values of SQLite's `synchronous`."""


class Opened:
    """An open store and the thread that commits for it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = SqliteStore(path)
        made: list[GroupCommit] = []

        class Kept(GroupCommit):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                made.append(self)

        monkeypatch.setattr(sqlite_store, "GroupCommit", Kept)
        self.store.open()
        (self.writer,) = made
        self.held: list[threading.Event] = []

    def hold(self) -> Callable[[], None]:
        """Keep the thread busy until the returned function is called."""
        go_on, there = threading.Event(), threading.Event()
        self.held.append(go_on)

        def step(_: object) -> None:
            there.set()
            go_on.wait(20)

        self.writer.submit(step, urgent=True)
        assert there.wait(20)
        return go_on.set

    def synchronous(self) -> int:
        with self.writer.exclusive() as db:
            return int(db.execute("PRAGMA synchronous").fetchone()[0])


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    opened = Opened(tmp_path / "state.db", monkeypatch)
    yield opened
    for go_on in opened.held:
        go_on.set()
    opened.store.close()


def purge(store: SqliteStore) -> None:
    store.purge(now=NOW, remember_s=600.0, ttl_s=600.0, max_sessions=10)


def test_what_a_power_cut_may_not_take_is_synced_and_the_rest_waits_for_no_disk(opened: Opened) -> None:
    store = opened.store
    steps: dict[str, tuple[Callable[[], object], int]] = {
        "accept": (lambda: store.accept([entry()]), FULL),
        "start": (lambda: store.mark_started(key()), NORMAL),
        "stream": (lambda: store.mark_streaming(key()), FULL),
        "deliver": (lambda: store.mark_delivered([key()]), NORMAL),
        "finish": (lambda: store.finish(key(), b"end", now=NOW, history=change("q", "a")), FULL),
        "purge": (lambda: purge(store), NORMAL),
        "reset": (lambda: store.reset(SESSION), FULL),
        "deliver again": (lambda: store.mark_delivered([key()]), NORMAL),
        "delete": (lambda: store.delete(SESSION), FULL),
    }
    for name, (step, wanted) in steps.items():
        step()
        assert (name, opened.synchronous()) == (name, wanted)


def test_when_the_queue_is_full_of_requests_everything_but_another_one_goes_on(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened.store
    store.accept([entry("running")])
    monkeypatch.setattr(group_commit, "MAX_QUEUED", 40)
    go_on = opened.hold()
    waiting = [store.accept_soon([entry(f"r{n}")]) for n in range(30)]
    with pytest.raises(StoreError, match="too slow"):
        store.accept_soon([entry("one more")])
    waiting += [store.mark_streaming_soon(key("running")), store.finish_soon(key("running"), b"end", now=NOW)]
    failures: list[StoreError] = []

    def do(step: Callable[[], object]) -> None:
        try:
            step()
        except StoreError as problem:
            failures.append(problem)

    steps: list[Callable[[], object]] = [
        lambda: store.mark_started(key("running")),
        lambda: store.mark_delivered([key("running")]),
        lambda: store.reset(SESSION),
        lambda: store.delete(SESSION),
        lambda: purge(store),
    ]
    threads = [threading.Thread(target=do, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    go_on()
    for thread in threads:
        thread.join(20)
    for write in waiting:
        write.wait(10)
    assert failures == []


def test_the_bytes_of_requests_and_of_ends_with_their_texts_count_in_the_queue(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened.store
    monkeypatch.setattr(group_commit, "MAX_QUEUED_BYTES", 4000)
    go_on = opened.hold()
    pending = [store.accept_soon([entry("r0", payload=bytes(100)), entry("r1", payload=bytes(200))])]
    history = change("q" * 900, "a" * 900)
    pending.append(store.finish_soon(key(), bytes(1000), now=NOW, chunks=bytes(500), history=history))
    size = 100 + 200 + 1000 + 500 + sum(len(orjson.dumps(message)) for message in history.append)
    with pytest.raises(StoreError, match=rf"2 writes \({size} bytes\)"):
        store.finish_soon(key(), bytes(4001 - size), now=NOW)
    go_on()
    for write in pending:
        write.wait(10)


def test_whoever_waits_for_the_disk_does_so_for_half_a_minute_a_purge_for_five_seconds_and_closing_for_ten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    wait, close = Write.wait, GroupCommit.close

    def waited(write: Write, timeout_s: float) -> None:
        waits.append(timeout_s)
        wait(write, timeout_s)

    def closed(writer: GroupCommit, timeout_s: float) -> bool:
        waits.append(timeout_s)
        return close(writer, timeout_s)

    monkeypatch.setattr(Write, "wait", waited)
    monkeypatch.setattr(GroupCommit, "close", closed)
    store = SqliteStore(tmp_path / "state.db")
    store.open()
    store.accept([entry()])
    store.mark_started(key())
    store.mark_streaming(key())
    store.finish(key(), b"", now=NOW)
    store.mark_delivered([key()])
    store.reset(SESSION)
    store.delete(SESSION)
    assert waits == [30.0] * 7
    purge(store)
    store.close()
    assert waits[7:] == [5.0, 5.0, 5.0, 5.0, 10.0]


def test_a_store_that_is_not_open_has_no_trouble(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    assert store.trouble() == ""
    store.open()
    assert store.trouble() == ""
    store.close()
    assert store.trouble() == ""


def test_a_store_whose_second_connection_fails_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: StateFile) -> None:
        raise StoreError("no second connection")

    path = tmp_path / "state.db"
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "reader", failing)
        store = SqliteStore(path)
        with pytest.raises(StoreError, match="no second"):
            store.open()
        with pytest.raises(StoreError, match="closed"):
            store.accept([entry()])
    other = SqliteStore(path)
    other.open()  # nobody holds the file
    other.accept([entry()])
    other.close()


def test_a_problem_says_what_caused_it(opened: Opened) -> None:
    with pytest.raises(StoreError, match=r"state\.db cannot hold this: UnicodeEncodeError"):
        opened.store.accept([entry("bad", topic="\ud800")])

    def forbidden(db: Any) -> None:
        db.execute("SELECT * FROM missing_table")

    write = opened.writer.submit(forbidden)
    with pytest.raises(StoreError, match="no such table") as caught:
        write.wait(10)
    assert "no such table" in str(caught.value.__cause__)


def test_what_may_be_kept_back_shares_the_commit_of_what_comes_next(opened: Opened) -> None:
    before = opened.store.commit_times.read().count
    accepted = opened.store.accept_soon([entry("r1")], unhurried=True)
    opened.store.mark_streaming(key("r1"))
    assert accepted.done()
    assert opened.store.commit_times.read().count == before + 1
    found = opened.store.find(key("r1"))
    assert found is not None
    assert found.state == "streaming"


def test_a_purge_that_shares_its_transaction_with_a_write_that_fails_counts_what_it_drops_once(opened: Opened) -> None:
    store = opened.store
    for n in range(3):
        talk(store, ("default", f"s{n}"), at=NOW + n)
    go_on = opened.hold()
    purged: list[Purged] = []

    def drop() -> None:
        purged.append(store.purge(now=NOW + 1000, remember_s=600.0, ttl_s=1e9, max_sessions=10))

    thread = threading.Thread(target=drop, name="purge")
    thread.start()
    eventually(lambda: len(opened.writer._queue) == 1)
    bad = store.accept_soon([entry("bad", topic="llm/request/\ud800")])
    go_on()
    thread.join(20)
    with pytest.raises(StoreError, match="UnicodeEncodeError"):
        bad.wait(10)
    assert purged == [Purged(entries=3, sessions=0, more=False)]


def test_requests_keep_their_order_when_they_are_written_once_more_beside_one_that_fails(opened: Opened) -> None:
    store = opened.store
    store.accept([entry("e1"), entry("e2")])
    go_on = opened.hold()
    writes = [
        store.accept_soon([entry("a1")]),
        store.finish_soon(key("e2"), b"end 2", now=NOW, history=change("q2", "a2")),
        store.accept_soon([entry("half"), entry("bad", topic="llm/request/\ud800")]),
        store.accept_soon([entry("a2")]),
        store.finish_soon(key("e1"), b"end 1", now=NOW, history=change("q1", "a1")),
    ]
    go_on()
    writes[-1].wait(10)
    assert [each.key.request_id for each in store.unfinished()] == ["a1", "a2"]
    assert [each.terminal for each in store.undelivered()] == [b"end 2", b"end 1"]
    assert [message["content"] for message in store.history(SESSION)] == ["q2", "a2", "q1", "a1"]


def test_a_key_that_is_accepted_twice_in_one_transaction_is_there_once(opened: Opened) -> None:
    store = opened.store
    store.accept([entry("ended", payload=b"old")])
    store.finish(key("ended"), b"end", now=NOW, chunks=b"record")
    go_on = opened.hold()
    writes = [
        store.accept_soon([entry("new"), entry("new", payload=b"other")]),
        store.accept_soon([entry("ended", payload=b"again"), entry("new", payload=b"third")]),
        store.accept_soon([entry("ended", payload=b"and again")]),
        store.finish_soon(key("new"), b"end", now=NOW),
        store.accept_soon([entry("new", payload=b"anew")]),
    ]
    go_on()
    for write in writes:
        write.wait(10)
    assert store.unfinished() == [entry("ended", payload=b"again"), entry("new", payload=b"anew")]
    assert store.undelivered() == []
    assert store.chunks(key("ended")) is None


def test_an_idle_worker_notes_on_its_disk_once_an_hour_that_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    store.open()
    talk(store, SESSION)
    shell = sqlite3.connect(path)
    seen = []
    for passed in (0, 5, 3590, 3605, 3610):
        store.purge(now=NOW + passed, remember_s=86400.0, ttl_s=86400.0, max_sessions=10)
        seen.append(shell.execute("PRAGMA data_version").fetchone()[0])
    shell.close()
    store.close()
    assert seen[0] == seen[1] == seen[2] < seen[3] == seen[4]
