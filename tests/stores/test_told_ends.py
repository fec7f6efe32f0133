"""What clients were told although the database was locked or full: the next start gives it to the journal, and nothing ends twice."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.core.spending import Spent
from llamacpp_mqtt_deploy.ports import HistoryChange, StoreError, ToldEnd
from llamacpp_mqtt_deploy.stores import told_ends
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.stores.told_ends import ToldEnds
from tests.support.store_cases import NOW, SESSION, entry, key

HISTORY = HistoryChange(
    session=SESSION, append=({"role": "user", "content": "hü"}, {"role": "assistant", "content": "\u2028"})
)
TERMINAL = b'{"type":"done","full_content":"\xc3\xbc\\n"}'


def _end(request_id: str = "r1", **fields: object) -> ToldEnd:
    given: dict[str, object] = {"terminal": TERMINAL, "now": NOW + 5, "history": HISTORY, "chunks": b'{"chunks":[]}'}
    return ToldEnd(key=key(request_id), **(given | fields))  # type: ignore[arg-type]


@contextmanager
def _opened(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path)
    store.open()
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def _told_under_a_lock(path: Path, *ends: ToldEnd) -> None:
    """A life that was killed while another program held its database."""
    with _opened(path) as store:
        store.accept([entry(end.key.request_id) for end in ends])
        with closing(sqlite3.connect(path, isolation_level=None)) as shell:
            shell.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError):
                store.finish(ends[0].key, ends[0].terminal, now=NOW + 1)
            assert store.set_aside(ends)
            shell.execute("ROLLBACK")


def test_an_end_that_was_told_is_the_only_one_after_a_kill(path: Path) -> None:
    _told_under_a_lock(path, _end())
    with _opened(path) as store:
        assert store.unfinished() == []
        (found,) = store.undelivered()
        assert (found.key, found.terminal, found.state, found.ended_at) == (key(), TERMINAL, "ended", NOW + 5)
        assert store.chunks(key()) == b'{"chunks":[]}'
        assert store.history(SESSION) == HISTORY.append
    assert not path.with_name("state.db.ends").exists()
    with _opened(path) as store:
        assert store.history(SESSION) == HISTORY.append, "taken in once"


def test_ends_are_taken_in_as_they_were_told(path: Path) -> None:
    first, second = _end("r1", chunks=None), _end("r2", history=None)
    _told_under_a_lock(path, first, second)
    with _opened(path) as store:
        assert [found.key.request_id for found in store.undelivered()] == ["r1", "r2"]
        assert (store.chunks(key("r1")), store.chunks(key("r2"))) == (None, b'{"chunks":[]}')


def test_what_the_journal_got_after_all_is_not_ended_again(path: Path) -> None:
    with _opened(path) as store:
        store.accept([entry()])
        assert store.set_aside([_end()])
        store.finish(key(), b"the same", now=NOW + 2, history=HISTORY)
    with _opened(path) as store:
        assert [found.terminal for found in store.undelivered()] == [b"the same"]
        assert store.history(SESSION) == HISTORY.append


def test_an_end_of_a_request_that_is_forgotten_changes_no_history(path: Path) -> None:
    with _opened(path) as store:
        assert store.set_aside([_end()])
    with _opened(path) as store:
        assert store.history(SESSION) == ()


def test_a_file_that_cannot_be_read_is_told_and_keeps_no_worker_from_starting(path: Path) -> None:
    with _opened(path) as store:
        store.accept([entry("r1")])
    path.with_name(f"{path.name}.ends").mkdir()
    with capture_logs() as lines, _opened(path) as store:
        assert [one.key for one in store.unfinished()] == [key("r1")]
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["store.told_ends_unreadable"]


def test_what_was_set_aside_can_be_cleared(path: Path) -> None:
    with _opened(path) as store:
        store.accept([entry()])
        assert store.set_aside([_end()])
        store.clear_aside()
    with _opened(path) as store:
        assert [found.key for found in store.unfinished()] == [key()]


def test_half_a_line_and_lines_of_others_cost_the_rest_nothing(path: Path) -> None:
    _told_under_a_lock(path, _end())
    file = path.with_name("state.db.ends")
    whole = file.read_bytes()
    odd = b'[]\n{"key":1}\n\xff\n' + whole.replace(b'"role":"user"', b'"role":7').replace(b"[{", b"[1,{")
    file.write_bytes(odd + whole + whole[:-20])
    with _opened(path) as store:
        assert [found.terminal for found in store.undelivered()] == [TERMINAL]


def test_a_start_that_cannot_take_them_in_fails_instead_of_ending_them_anew(path: Path) -> None:
    _told_under_a_lock(path, _end())
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="Another program holds"):
            SqliteStore(path).open()
    with _opened(path) as store:
        assert store.unfinished() == []


def test_a_store_in_memory_has_nothing_to_keep_for_a_next_life() -> None:
    store = SqliteStore(None)
    store.open()
    assert store.set_aside([_end()])
    store.clear_aside()
    store.close()


@pytest.mark.parametrize("step", ["open", "write", "fsync"])
def test_a_disk_that_takes_nothing_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    ends = ToldEnds(tmp_path / "ends")
    assert ends.add([_end("r1")])

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fails)
        assert not ends.add([_end("r2")])
    assert ends.add([_end("r3")])
    assert [end.key.request_id for end in ends.read()] == ["r1", "r3"]


def test_half_of_what_was_to_be_written_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = ToldEnds(tmp_path / "ends")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        assert not ends.add([_end("r1")])
    assert ends.add([_end("r2")])
    assert ends.read() == [_end("r2")]


def test_a_disk_that_hangs_is_waited_for_once_and_shortly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_ends, "WRITE_S", 0.05)
    answers = threading.Event()
    ends = ToldEnds(tmp_path / "ends")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: answers.wait(10))
        assert not ends.add([_end("r1")])
        assert not ends.add([_end("r2")]), "at once: it still hangs"
        answers.set()
        for thread in threading.enumerate():
            if thread.name == "told-ends":
                thread.join(10)
    monkeypatch.setattr(told_ends, "WRITE_S", 10.0)
    assert ends.add([_end("r3")])
    # Of the first one it was said that it may be lost, which does not say that it must be.
    assert [end.key.request_id for end in ends.read()] == ["r1", "r3"]


def test_the_file_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_ends, "MAX_BYTES", 10_000)
    ends = ToldEnds(tmp_path / "ends")
    kept = [ends.add([_end(f"r{number}")]) for number in range(50)]
    assert kept.count(False) > 10
    assert (tmp_path / "ends").stat().st_size <= 10_000
    assert len(ends.read()) == kept.count(True)


def test_what_a_told_request_has_cost_is_counted_once_wherever_its_end_was_kept(path: Path) -> None:
    spent = Spent(first_level="alice", tokens_in=3, tokens_out=4, engine_s=0.5)
    _told_under_a_lock(path, _end("r1", spent=spent), _end("r2", spent=spent), _end("r3"))
    with _opened(path) as store:
        (row,) = store.ledger(since_day=0)
        assert (row.first_level, row.requests, row.tokens_in, row.tokens_out, row.engine_s) == ("alice", 2, 6, 8, 1.0)
        store.finish(key("r1"), TERMINAL, now=NOW + 6, spent=spent)
        assert store.ledger(since_day=0) == [row]
    with _opened(path) as store:
        assert store.ledger(since_day=0) == [row]
