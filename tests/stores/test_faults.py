"""The file store among real faults: kill, full disk, no permission, damage, other programs, other versions, two workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

import llamacpp_mqtt_deploy
from llamacpp_mqtt_deploy.core.spending import LedgerRow, Spent
from llamacpp_mqtt_deploy.ports import StoreError, StoreFull, StoreInUse
from llamacpp_mqtt_deploy.stores import schema, statefile
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import NOW, SESSION, change, entry, key, talk
from tests.support.waiting import eventually

ROOT = Path(llamacpp_mqtt_deploy.__file__).parents[1]


@contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process of our own that runs this code; killed at the end, whatever happened."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PREAMBLE + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


_PREAMBLE = """
import sys
from pathlib import Path
import structlog
from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from tests.support.store_cases import NOW, change, entry, key
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
store = SqliteStore(Path(sys.argv[1]))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    mount = shutil.which("mount")
    directory = tmp_path / "small"
    directory.mkdir()
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield directory
    # Lazily: a test that failed may have left a file open, and a mount left behind would fail the runs after this one.
    subprocess.run(["umount", "-l", directory], check=True)


def filled(path: Path, sessions: Sequence[tuple[str, str]] = (SESSION,), exchanges: int = 1) -> None:
    store = SqliteStore(path)
    store.open()
    for number in range(exchanges):
        for session in sessions:
            talk(store, session, at=NOW + number, text=f"{number} " + "x" * 300)
    store.close()


def fill_up(ballast: Path) -> None:
    """Take the disk's last byte."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def copies(path: Path) -> list[Path]:
    return sorted(p for p in path.parent.glob(path.name + ".corrupt-*") if not p.name.endswith(("-wal", "-shm")))


# --- death -----------------------------------------------------------------------------------------------------------


def test_whatever_was_accepted_survives_a_kill_in_the_middle_of_a_burst(path: Path) -> None:
    burst = """
store.open()
n = 0
while True:
    names = [f"r{n + i}" for i in range(1 + n % 7)]
    store.accept([entry(name) for name in names])
    print(*names, sep="\\n", flush=True)
    n += len(names)
"""
    with child(burst, path) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(300)]
        process.kill()
        told += [line.strip() for line in process.stdout if line.endswith("\n")]
    store = SqliteStore(path)
    store.open()
    kept = [e.key.request_id for e in store.unfinished()]
    assert told[0] == "r0"
    assert kept[: len(told)] == told
    assert len(kept) - len(told) <= 7  # at most the one burst that it had no time to tell
    store.close()


def test_a_kill_neither_loses_nor_doubles_what_a_request_has_cost(path: Path) -> None:
    work = """
from llamacpp_mqtt_deploy.core.spending import Spent
store.open()
for n in range(100_000):
    names = [f"r{n}-{i}" for i in range(3)]
    store.accept([entry(name) for name in names])
    spent = Spent(first_level="alice", tokens_in=2, tokens_out=5, engine_s=0.25)
    ends = [store.finish_soon(key(name), b"end", now=NOW, spent=spent) for name in names]
    for end in ends:
        end.wait(30)
    print("ended", flush=True)
"""
    for life in range(3):
        with child(work.replace("r{n}", f"life{life}-{{n}}"), path) as process:
            assert process.stdout is not None
            for _ in range(40):
                assert process.stdout.readline() == "ended\n"
            process.kill()
            process.wait()
        store = SqliteStore(path)
        store.open()
        ended = len(store.undelivered())
        (row,) = store.ledger(since_day=0)
        assert (row.requests, row.tokens_in, row.tokens_out, row.engine_s) == (ended, 2 * ended, 5 * ended, ended / 4)
        # The next life ends again what this one could not know to be ended.
        for left in store.unfinished():
            store.finish(
                left.key, b"end", now=NOW, spent=Spent(first_level="alice", tokens_in=2, tokens_out=5, engine_s=0.25)
            )
        store.close()


def test_a_kill_never_parts_an_end_from_its_history(path: Path) -> None:
    work = """
store.open()
for n in range(100_000):
    name = f"r{n}"
    store.accept([entry(name)])
    store.mark_started(key(name))
    store.mark_streaming(key(name))
    print(name, "streaming", flush=True)
    store.finish(key(name), name.encode(), now=NOW, history=change(name, "answer to " + name))
    print(name, "ended", flush=True)
"""
    with child(work, path) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().split() for _ in range(401)]
        process.kill()
        told += [line.split() for line in process.stdout if line.endswith("\n")]
    store = SqliteStore(path)
    store.open()
    ended = [e.key.request_id for e in store.undelivered()]
    assert [m["content"] for m in store.history(SESSION)][::2] == ended
    assert len(store.history(SESSION)) == 2 * len(ended)
    assert set(ended) >= {name for name, state in told if state == "ended"}
    for name in {name for name, state in told if state == "streaming"} - set(ended):
        found = store.find(key(name))
        assert found is not None
        assert (found.state, found.starts) == ("streaming", 1)
    store.close()


def test_what_was_waited_for_survives_a_kill_among_many_that_wait(path: Path) -> None:
    work = """
store.open()
import os, threading
def tell(*words):
    os.write(1, (" ".join(words) + "\\n").encode())
def live(number):
    for turn in range(100_000):
        name = f"{number}-{turn}"
        accepted = store.accept_soon([entry(name)])
        streaming = store.mark_streaming_soon(key(name))
        accepted.wait(10)
        tell(name, "accepted")
        ended = store.finish_soon(key(name), name.encode(), now=NOW, history=change(name, name))
        streaming.wait(10)
        tell(name, "streaming")
        ended.on_done(lambda problem, name=name: tell(name, "ended"))
        if turn % 3 == 0:
            ended.wait(10)
for number in range(8):
    threading.Thread(target=live, args=(number,)).start()
"""
    with child(work, path) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().split() for _ in range(1500)]
        process.kill()
        told += [line.split() for line in process.stdout if line.endswith("\n")]
    store = SqliteStore(path)
    store.open()
    known = {e.key.request_id: e.state for e in (*store.unfinished(), *store.undelivered())}
    allowed = {"accepted": {"accepted", "streaming", "ended"}, "streaming": {"streaming", "ended"}, "ended": {"ended"}}
    for name, state in told:
        assert known[name] in allowed[state]
    ended = [e.key.request_id for e in store.undelivered()]
    assert [m["content"] for m in store.history(SESSION)][::2] == ended[-len(store.history(SESSION)) // 2 :]
    store.close()


# --- full disk, no permission ----------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_the_store_goes_on_when_there_is_room_again(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "state.db")
    store.open()
    talk(store, SESSION)
    ballast = small_disk / "ballast"
    fill_up(ballast)
    accepted: list[str] = []

    def flood() -> None:
        for n in range(200):
            store.accept([entry(f"r{n}", payload=bytes(50_000))])
            accepted.append(f"r{n}")

    with pytest.raises(StoreError, match="full: free some space"):
        flood()
    assert store.find(key(f"r{len(accepted)}")) is None  # all of it or nothing
    assert len(store.history(SESSION)) == 2  # reading still works
    ballast.unlink()
    store.accept([entry("later")])
    store.finish(key("later"), b"end", now=NOW, history=change("q", "a"))
    store.close()
    store.open()
    assert [e.key.request_id for e in store.unfinished()] == accepted
    assert len(store.history(SESSION)) == 4
    store.close()


def test_what_does_not_fit_on_the_disk_takes_no_small_write_along(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "state.db")
    store.open()
    store.accept([entry("running")])
    pending = [store.accept_soon([entry("large", payload=bytes(3_000_000))]), store.accept_soon([entry("small")])]
    pending.append(store.finish_soon(key("running"), b"end", now=NOW, history=change("q", "a")))
    with pytest.raises(StoreError, match="full: free some space"):
        pending[0].wait(10)
    pending[1].wait(10)
    pending[2].wait(10)
    assert store.find(key("large")) is None
    assert [e.key.request_id for e in store.unfinished()] == ["small"]
    assert len(store.history(SESSION)) == 2
    store.close()


def test_what_was_accepted_can_end_on_a_full_disk_and_nothing_new_is_accepted_until_there_is_room(
    small_disk: Path,
) -> None:
    store = SqliteStore(small_disk / "state.db")
    store.open()
    names = [f"r{n}" for n in range(20)]
    store.accept([entry(name) for name in names])
    fill_up(small_disk / "ballast")
    for name in names:
        store.mark_streaming(key(name))
        store.finish(key(name), bytes(10_000), now=NOW, history=change(name, "x" * 1000))
    with pytest.raises(StoreFull, match="full: free some space"):
        store.accept([entry("new")])
    store.close()
    store.open()  # the disk is as full as before
    store.mark_delivered([key(name) for name in names[1:]])
    assert [e.key.request_id for e in store.undelivered()] == ["r0"]
    assert len(store.history(SESSION)) == 40
    (small_disk / "ballast").unlink()
    eventually(lambda: accepted(store))
    store.close()


def test_a_worker_that_was_killed_starts_on_a_full_disk_and_ends_what_it_had_accepted(small_disk: Path) -> None:
    work = """
store.open()
store.accept([entry("running")])
print("accepted", flush=True)
import threading; threading.Event().wait()
"""
    with child(work, small_disk / "state.db") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "accepted\n"
    fill_up(small_disk / "ballast")
    store = SqliteStore(small_disk / "state.db")
    store.open()
    assert [e.key.request_id for e in store.unfinished()] == ["running"]
    store.finish(key("running"), b"end", now=NOW)
    with pytest.raises(StoreFull):
        store.accept([entry("new")])
    store.close()
    store.open()
    assert [e.terminal for e in store.undelivered()] == [b"end"]
    store.close()


def test_a_journal_that_filled_its_disk_frees_it_by_purging(small_disk: Path) -> None:
    store = SqliteStore(small_disk / "state.db")
    store.open()
    number = 0
    with contextlib.suppress(StoreFull):
        while True:
            store.accept([entry(f"r{number}")])
            store.finish(key(f"r{number}"), bytes(20_000), now=NOW)
            store.mark_delivered([key(f"r{number}")])
            number += 1
    assert number > 10
    store.purge(now=NOW + 1000, remember_s=600, ttl_s=1e9, max_sessions=1000)
    eventually(lambda: accepted(store))
    store.close()


def test_a_disk_that_is_full_at_start_is_named(small_disk: Path) -> None:
    fill_up(small_disk / "ballast")
    store = SqliteStore(small_disk / "state.db")
    with pytest.raises(StoreFull, match="full: free some space"):
        store.open()
    (small_disk / "ballast").unlink()
    store.open()
    eventually(lambda: accepted(store))
    store.close()


def test_a_full_disk_does_not_hide_that_the_file_is_another_programs(small_disk: Path) -> None:
    wrong = small_disk / "home-assistant.db"
    other = sqlite3.connect(wrong)
    other.execute("CREATE TABLE states (a)")
    other.commit()
    other.close()
    fill_up(small_disk / "ballast")
    with pytest.raises(StoreError, match="another program") as caught:
        SqliteStore(wrong).open()
    assert type(caught.value) is StoreError


def test_a_file_size_limit_ends_in_a_store_error_and_keeps_what_was_accepted(path: Path) -> None:
    limited = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
store.open()
try:
    for n in range(1000):
        store.accept([entry(f"r{n}", payload=bytes(20_000))])
        print(f"r{n}", flush=True)
except StoreError as error:
    print("StoreError", error, flush=True)
"""
    with child(limited, path) as process:
        assert process.stdout is not None
        *told, last = process.stdout.read().splitlines()
    assert last.startswith("StoreError")
    assert "limit" in last or "full" in last
    assert told
    store = SqliteStore(path)
    store.open()
    assert [e.key.request_id for e in store.unfinished()] == told
    store.close()


def test_a_disk_that_fails_is_told_as_trouble_until_it_takes_a_write_again(path: Path) -> None:
    failing = """
import resource, signal, threading
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store.open()
store.accept([entry("before")])
print(repr(store.trouble()), flush=True)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
try:
    store.accept([entry("meanwhile", payload=bytes(100_000))])
except StoreError:
    print(repr(store.trouble()), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
for _ in range(100):
    if not store.trouble():
        break
    threading.Event().wait(0.1)
print(repr(store.trouble()), flush=True)
"""
    with child(failing, path) as process:
        assert process.stdout is not None
        before, meanwhile, after = process.stdout.read().splitlines()
    assert before == after == "''"
    assert "look for disk errors" in meanwhile or "full" in meanwhile


def test_a_read_only_disk_says_which_setting_to_change(small_disk: Path) -> None:
    filled(small_disk / "state.db")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for place in (small_disk / "state.db", small_disk / "new.db", small_disk / "below" / "state.db"):
        with pytest.raises(StoreError, match=r"sessions\.path.*StateDirectory="):
            SqliteStore(place).open()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission_says_which_setting_to_change(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"sessions\.path"):
            SqliteStore(tmp_path / "state.db").open()
    finally:
        tmp_path.chmod(0o700)


def test_a_path_that_cannot_be_a_file_says_which_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    for wrong in (tmp_path / "plain" / "state.db", tmp_path):
        with pytest.raises(StoreError, match=r"sessions\.path"):
            SqliteStore(wrong).open()


def test_state_is_private_to_its_user(path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = SqliteStore(path)
        store.open()
        talk(store, SESSION)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
        assert modes == dict.fromkeys(modes, 0o600)
        assert set(modes) == {"state.db", "state.db-wal", "state.db-shm", "state.db.lock", "state.db.reserve"}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        store.close()
    finally:
        os.umask(before)
    assert {p.name for p in path.parent.iterdir()} == {"state.db", "state.db.lock", "state.db.reserve"}


# --- damage ----------------------------------------------------------------------------------------------------------


def zeros(path: Path) -> None:
    path.write_bytes(bytes(8192))


def noise(path: Path) -> None:
    path.write_bytes(b"\x01\x02noise" * 4000)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


@pytest.mark.parametrize("damage", [zeros, noise, half])
def test_a_damaged_file_is_kept_aside_and_the_worker_begins_anew(path: Path, damage: Callable[[Path], None]) -> None:
    filled(path, exchanges=30)
    damage(path)
    (path.parent / "state.db-wal").write_bytes(b"left by a kill")
    before = path.read_bytes()
    store = SqliteStore(path)
    store.open()
    assert store.moved_aside is not None
    assert store.moved_aside.read_bytes() == before
    assert copies(path) == [store.moved_aside]
    assert store.history(SESSION) == ()
    talk(store, SESSION)
    store.close()
    store.open()
    assert len(store.history(SESSION)) == 2
    store.close()


def test_damage_met_at_work_is_an_error_and_the_next_start_begins_anew(path: Path) -> None:
    sessions = [("default", f"s{n}") for n in range(20)]
    filled(path, sessions, exchanges=10)
    db = sqlite3.connect(path)
    page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'messages'").fetchone()[0]
    db.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    store = SqliteStore(path)
    store.open()  # a clean end leaves no reason to read all of it at every start

    def work() -> None:
        for session in sessions:
            store.history(session)
            talk(store, session, at=NOW + 1000)

    with pytest.raises(StoreError, match="damaged: restart the worker"):
        work()
    assert "damaged: restart the worker" in store.trouble()
    store.close()
    store.open()
    assert store.trouble() == "", "what opening met, it mended"
    assert store.moved_aside is not None
    assert store.moved_aside.exists()
    talk(store, SESSION)
    store.close()


def test_a_disk_that_damages_the_file_again_and_again_is_not_filled_with_copies(path: Path) -> None:
    filled(path)
    seen = []
    for _ in range(6):
        noise(path)
        store = SqliteStore(path)
        store.open()
        assert store.moved_aside is not None
        seen.append(store.moved_aside)
        store.close()
    assert copies(path) == seen[-3:]


def test_a_file_that_never_was_ours_is_left_alone(tmp_path: Path) -> None:
    wrong = tmp_path / "notes.txt"
    wrong.write_text("[mqtt]\nhost = 'localhost'\n" * 100)
    before = wrong.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"not a state file.*sessions\.path"):
            SqliteStore(wrong).open()
        assert wrong.read_bytes() == before
        assert copies(wrong) == []


def test_the_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    wrong = tmp_path / "home-assistant.db"
    other = sqlite3.connect(wrong)
    other.execute("CREATE TABLE states (a)")
    other.commit()
    other.close()
    before = wrong.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreError, match="another program"):
            SqliteStore(wrong).open()
        assert wrong.read_bytes() == before


# --- versions --------------------------------------------------------------------------------------------------------


def test_the_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer version.*schema 99"):
        SqliteStore(path).open()
    assert path.read_bytes() == before


def test_an_older_file_is_migrated_with_all_it_knows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    added = ("ALTER TABLE sessions ADD COLUMN title TEXT", "UPDATE sessions SET title = 'old ' || session")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, added))
    store = SqliteStore(path)
    store.open()
    assert len(store.history(SESSION)) == 2
    store.close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone()[0] == len(schema.MIGRATIONS)
    assert db.execute("SELECT title FROM sessions").fetchall() == [(f"old {SESSION[1]}",)]
    db.close()


def test_a_file_of_the_first_version_is_migrated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        file = statefile.StateFile(path)
        file.open(lambda _: None).close()
        file.release()
    db = sqlite3.connect(path)
    db.execute(
        "INSERT INTO entries (id, route, session, request_id, topic, digest, accepted_at, state, starts, terminal, "
        "reply_topic, delivered, ended_at, ended_order) "
        "VALUES (1, 'default', 'kitchen/tablet', 'r1', 't', 'd', ?, 'ended', 1, x'656e64', 'llm/reply', 1, ?, 2)",
        (NOW, NOW),
    )
    db.execute("INSERT INTO sessions VALUES (1, 'default', 'kitchen/tablet', 'kitchen', ?, ?, 26)", (NOW, NOW))
    db.execute("""INSERT INTO messages VALUES (1, 1, 'user', CAST('{"role":"user","content":1}' AS BLOB))""")
    db.commit()
    db.close()
    store = SqliteStore(path)
    store.open()
    found = store.find(key())
    assert found is not None
    assert found.terminal == b"end"
    assert len(store.history(SESSION)) == 1
    assert store.purge(now=NOW, remember_s=600, ttl_s=1e9, max_sessions=10, max_bytes=1).entries == 1
    store.close()


def test_the_ledger_comes_and_goes_with_newer_and_older_workers_on_the_same_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def life(name: str) -> list[LedgerRow]:
        store = SqliteStore(path)
        store.open()
        store.accept([entry(name)])
        spent = None if older else Spent(first_level="alice", tokens_in=1)
        store.finish(key(name), b"end", now=NOW, spent=spent)
        rows = [] if older else store.ledger(since_day=0)
        store.close()
        return rows

    for older, name, requests in ((True, "a", 0), (False, "b", 1), (True, "c", 0), (False, "d", 2)):
        with monkeypatch.context() as patch:
            if older:
                patch.setattr(schema, "_ADDED", ())
                patch.setattr(schema, "_forget_orphans", lambda _: None)
            assert [row.requests for row in life(name)] == ([requests] if requests else [])


def test_a_migration_that_fails_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    broken = ("ALTER TABLE sessions ADD COLUMN title TEXT", "UPDATE nonsense SET a = 1")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
        with pytest.raises(StoreError, match="nonsense"):
            SqliteStore(path).open()
    store = SqliteStore(path)
    store.open()
    assert len(store.history(SESSION)) == 2
    store.close()


# --- company ---------------------------------------------------------------------------------------------------------


def test_a_second_worker_on_the_same_file_is_told_who_has_it(path: Path) -> None:
    hold = """
store.open()
print("open", flush=True)
import threading; threading.Event().wait()
"""
    with child(hold, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        second = SqliteStore(path)
        with pytest.raises(StoreInUse, match=f"Another worker, pid {process.pid}, uses"):
            second.open()
        process.kill()
        process.wait()
        second.open()  # a kill leaves no lock behind
        second.close()


def test_two_stores_of_one_process_do_not_share_a_file_either(path: Path) -> None:
    first = SqliteStore(path)
    first.open()
    with pytest.raises(StoreInUse, match=f"pid {os.getpid()}"):
        SqliteStore(path).open()
    first.close()


def test_a_shell_that_holds_the_file_is_named_and_may_read_while_we_work(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statefile, "BUSY_TIMEOUT_S", 0.05)
    store = SqliteStore(path)
    store.open()
    talk(store, SESSION)
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="Another program holds"):
        store.accept([entry()])
    shell.execute("ROLLBACK")
    shell.execute("BEGIN")
    assert shell.execute("SELECT count(*) FROM messages").fetchone() == (2,)
    eventually(lambda: accepted(store))
    shell.close()
    assert store.find(key()) == entry()
    store.close()


def accepted(store: SqliteStore) -> bool:
    try:
        store.accept([entry()])
    except StoreError:
        return False
    return True


def test_while_another_program_holds_the_file_only_the_first_write_waits(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    store.accept([entry("before")])
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    pending = [
        store.finish_soon(key("before"), b"end", now=NOW),
        *(store.accept_soon([entry(f"r{n}")]) for n in range(30)),
    ]
    for write in pending:
        with pytest.raises(StoreError, match="Another program holds"):
            write.wait(10)
    for _ in range(30):
        with pytest.raises(StoreError, match="Another program holds"):
            store.accept([entry()])
    assert time.monotonic() - began < 5  # each on its own: a minute
    shell.close()
    eventually(lambda: accepted(store))
    store.finish(key("before"), b"end", now=NOW)
    assert [e.key.request_id for e in store.unfinished()] == ["r1"]
    store.close()


def test_reading_does_not_wait_for_a_write_that_is_held_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "BUSY_TIMEOUT_S", 0.5)
    store = SqliteStore(path)
    store.open()
    talk(store, SESSION)
    shell = sqlite3.connect(path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")

    def write() -> None:
        with contextlib.suppress(StoreError):
            store.accept([entry()])

    writing = threading.Thread(target=write, name="writing")
    writing.start()
    reads = 0
    while writing.is_alive():
        assert store.find(key()) is None
        assert len(store.history(SESSION)) == 2
        assert store.unfinished() == []
        reads += 1
    writing.join()
    assert reads > 10
    shell.close()
    store.close()


# --- size ------------------------------------------------------------------------------------------------------------


def test_the_file_shrinks_again_after_a_flood(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    names = [f"r{n}" for n in range(300)]
    store.accept([entry(name) for name in names])
    for name in names:
        store.finish(key(name), bytes(20_000), now=NOW)
    store.mark_delivered([key(name) for name in names])
    for _ in range(10):
        store.purge(now=NOW + 1000, remember_s=600, ttl_s=1e9, max_sessions=1000)
        store.accept([entry("last")])
        store.finish(key("last"), b"", now=NOW)
        store.mark_delivered([key("last")])
    wal = path.with_name(path.name + "-wal").stat().st_size
    assert wal <= statefile.WAL_LIMIT_BYTES + 1024 * 1024
    store.close()
    assert path.stat().st_size < 2_000_000


def test_what_a_person_asked_to_forget_is_not_in_the_file_any_more(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    talk(store, ("default", "other"), text="keep this sentence")
    talk(store, SESSION, text="my password is swordfish")
    store.delete(SESSION)
    store.close()
    content = path.read_bytes()
    assert b"keep this sentence" in content
    assert b"swordfish" not in content


def test_marking_a_large_request_as_streaming_does_not_write_it_again(path: Path) -> None:
    store = SqliteStore(path)
    store.open()
    store.accept([entry(payload=bytes(1_000_000))])
    wal = path.with_name(path.name + "-wal")
    before = wal.stat().st_size
    store.mark_started(key())
    store.mark_streaming(key())
    assert wal.stat().st_size - before < 50_000
    found = store.find(key())
    assert found is not None
    assert len(found.payload) == 1_000_000
    store.close()


def test_the_stored_history_is_plain_json_for_an_operator_with_a_shell(path: Path) -> None:
    filled(path)
    db = sqlite3.connect(path)
    rows = db.execute("SELECT CAST(message AS TEXT) FROM messages ORDER BY id").fetchall()
    db.close()
    assert [orjson.loads(row[0])["role"] for row in rows] == ["user", "assistant"]
