"""Disk, engine and system resources that fail under a running worker: it says so in its status, serves what it can, and comes back."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disk import SmallDisk
from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Event, Watcher, check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.processes import children_of
from tests.support.read_only_disk import ReadOnlyDisk
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]
StartServer = Callable[..., LlamaServer]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.mount()
    if disk.why_not:
        pytest.skip(disk.why_not)
    yield disk
    disk.unmount()


def _status(watcher: Watcher) -> Event:
    """The newest one."""
    return next(seen.event for seen in reversed(watcher.seen()) if seen.topic == "llm/status/w1")


def _problem(watcher: Watcher) -> str:
    return str(_status(watcher).get("problem", ""))


def _answered(watcher: Watcher, request_id: str, **fields: Any) -> Event:
    watcher.ask("kitchen", None if "messages" in fields else "hello", request_id=request_id, max_tokens=5, **fields)
    return watcher.terminal(request_id)


def test_a_full_disk_is_a_problem_in_the_status_until_there_is_room_again(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
    disk: SmallDisk,
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    start_worker(broker.port, llama_server.url, sessions__path=str(disk.folder / "state.db"))
    assert _answered(watcher, "before")["type"] == "done"
    assert not _problem(watcher)
    disk.fill()
    # What there is room for within the write-ahead log is still taken; the reserve of the ends is not for new ones.
    large = "x" * 500_000
    for number in range(20):
        if _answered(watcher, f"large-{number}", metadata={"n": number}, messages=_said(large))["type"] == "error":
            break
    eventually(lambda: "full: free some space" in _problem(watcher))
    disk.empty()
    eventually(lambda: not _problem(watcher))
    assert _answered(watcher, "after")["type"] == "done"


@pytest.fixture
def read_only(tmp_path: Path) -> ReadOnlyDisk:
    return ReadOnlyDisk(tmp_path / "disk")


def test_a_disk_that_becomes_read_only_is_a_problem_in_the_status_until_it_takes_writes_again(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
    read_only: ReadOnlyDisk,
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    settings = {"sessions__path": str(read_only.folder / "state.db"), "environment": read_only.environment}
    worker = start_worker(broker.port, llama_server.url, **settings)
    watcher.ask("kitchen", "go on", request_id="running", max_tokens=4000)
    watcher.first(type="chunk", request_id="running")
    read_only.begin()
    refused = _answered(watcher, "meanwhile")
    assert refused["code"] == "internal"
    assert "cannot write its journal" in refused["message"]
    eventually(lambda: "read-only" in _problem(watcher))
    assert "dmesg" in _problem(watcher)
    assert any("read-only" in line["problem"] for line in worker.log("store.troubled"))
    watcher.control("kitchen", "cancel", request_id="running")
    read_only.end()
    assert watcher.terminal("running")["type"] == "done"
    check_stream(watcher.of("running"))
    eventually(lambda: not _problem(watcher))
    assert _answered(watcher, "after")["type"] == "done"


def test_a_worker_whose_disk_is_read_only_stops_in_an_orderly_way_and_its_next_life_ends_what_it_had_accepted(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
    read_only: ReadOnlyDisk,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    settings: dict[str, Any] = {"sessions__path": str(read_only.folder / "state.db")}
    settings |= {"environment": read_only.environment, "limits__drain_timeout_s": 1}
    worker = start_worker(broker.port, llama_server.url, **settings)
    watcher.ask("kitchen", "go on", request_id="running", max_tokens=8000)
    watcher.first(type="chunk", request_id="running")
    read_only.begin()
    assert worker.stop() == 0
    again = start_worker(broker.port, llama_server.url, ready=False, **settings)
    assert again.wait(20) == 1
    assert "read-only" in again.log("worker.ending")[0]["reason"]
    read_only.end()
    start_worker(broker.port, llama_server.url, **settings)
    assert watcher.terminal("running")["code"] == "interrupted"
    assert [event["type"] for event in watcher.of("running") if event.get("final")] == ["error"]


def test_a_database_that_another_program_holds_is_a_problem_in_the_status_until_it_lets_go(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    assert _answered(watcher, "before")["type"] == "done"
    shell = sqlite3.connect(worker.settings["sessions.path"], isolation_level=None)
    with contextlib.closing(shell):
        shell.execute("BEGIN EXCLUSIVE")
        assert _answered(watcher, "meanwhile")["final"]
        eventually(lambda: "Another program holds" in _problem(watcher))
    eventually(lambda: not _problem(watcher))
    assert _answered(watcher, "after")["type"] == "done"


def test_a_database_that_is_damaged_at_work_is_a_problem_in_the_status_until_the_worker_is_restarted(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    for number in range(3):
        assert _answered(watcher, f"before-{number}")["type"] == "done"
    path = Path(worker.settings["sessions.path"])
    with contextlib.closing(sqlite3.connect(path)) as shell:
        shell.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        # A write of another program's: else the worker would go on with the pages that it remembers.
        shell.execute("CREATE TABLE another (a)")
        shell.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    assert _answered(watcher, "meanwhile")["code"] == "internal"
    eventually(lambda: "damaged: restart the worker" in _problem(watcher))
    assert worker.stop() == 0
    start_worker(broker.port, llama_server.url)
    assert _answered(watcher, "after")["type"] == "done"
    assert not _problem(watcher)


def test_a_state_directory_that_is_removed_at_work_is_written_anew_and_told_and_no_request_is_lost(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch, tmp_path: Path
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    path = tmp_path / "state" / "state.db"
    worker = start_worker(broker.port, llama_server.url, sessions__path=str(path))
    assert _answered(watcher, "before")["type"] == "done"
    watcher.ask("kitchen", "go on", request_id="running", max_tokens=4000)
    watcher.first(type="chunk", request_id="running")
    shutil.rmtree(path.parent)
    path.parent.write_text("in its way")
    eventually(lambda: f"Make the directory {path.parent} again" in _problem(watcher))
    assert _answered(watcher, "refused")["code"] == "internal"
    path.parent.unlink()
    eventually(lambda: "nothing is lost" in _problem(watcher))
    assert [str(path) in line["problem"] for line in worker.log("store.troubled")] == [True, True]
    assert watcher.terminal("running")["type"] == "done"
    check_stream(watcher.of("running"))
    watcher.ask("hall", "and on", request_id="cut-off", max_tokens=4000)
    watcher.first(type="chunk", request_id="cut-off")
    worker.kill()
    start_worker(broker.port, llama_server.url, sessions__path=str(path))
    assert watcher.terminal("cut-off")["code"] == "interrupted"
    assert not _problem(watcher)
    assert _answered(watcher, "after")["type"] == "done"
    with contextlib.closing(sqlite3.connect(path)) as shell:
        kept = shell.execute(
            "SELECT count(*) FROM entries WHERE request_id IN ('before', 'running', 'cut-off')"
        ).fetchone()
    assert kept == (3,)


def test_a_log_that_another_program_makes_grow_is_a_problem_in_the_status_until_it_ends(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    path = Path(worker.settings["sessions.path"])
    log = path.with_name(path.name + "-wal")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM entries").fetchall()
        with contextlib.closing(sqlite3.connect(path)) as shell:
            shell.execute("CREATE TABLE another (a)")
            shell.execute("INSERT INTO another VALUES (zeroblob(70000000))")
            shell.commit()
        eventually(lambda: f"{log} is larger than 64 MiB" in _problem(watcher))
        assert _answered(watcher, "meanwhile")["type"] == "done"
    eventually(lambda: not _problem(watcher))
    assert log.stat().st_size < 8 * 1024 * 1024
    assert len(worker.log("store.troubled")) == 1


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_stream_that_stalls_ends_in_idle_timeout_and_frees_its_slot(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, start_llama_server: StartServer, watch: Watch
) -> None:
    broker, server = start_mosquitto(settings=["max_queued_messages 100000"]), start_llama_server(slots=1)
    watcher = watch(broker.port)
    start_worker(broker.port, server.url, engine__chunk_timeout_s=1)
    watcher.ask("kitchen", "go on", request_id="stalls", max_tokens=8000)
    watcher.first(type="chunk", request_id="stalls")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        end = watcher.terminal("stalls")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (end["code"], end["retryable"]) == ("idle_timeout", True)
    assert end["partial_content"]
    check_stream(watcher.of("stalls"))
    server.idle_within(10)
    assert _answered(watcher, "after")["type"] == "done"


def test_an_engine_that_comes_back_with_another_context_and_model_is_told_and_used_as_it_is(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    start_llama_server: StartServer,
    watch: Watch,
) -> None:
    broker, server = start_mosquitto(), start_llama_server(slots=2, n_ctx=4096)
    watcher = watch(broker.port)
    start_worker(broker.port, server.url)
    long = _said("word " * 900)
    assert _answered(watcher, "before", messages=long)["type"] == "done"
    assert (_status(watcher)["n_ctx"], _status(watcher)["models"]) == (4096, ["tiny"])
    server.kill()
    eventually(lambda: _status(watcher)["engine"]["state"] != "ready", 30)
    server.n_ctx, server.slots, server.alias = 512, 1, "other"
    server.start()
    eventually(lambda: (_status(watcher)["n_ctx"], _status(watcher)["slots"]) == (512, 1), 30)
    assert _status(watcher)["models"] == ["other"]
    refused = _answered(watcher, "too-long", messages=long)
    assert (refused["code"], refused["n_ctx"]) == ("context_overflow", 512)
    assert _answered(watcher, "short")["type"] == "done"


@contextlib.contextmanager
def _without_descriptors(pid: int) -> Iterator[None]:
    """Less than this process has already: it keeps what it has and gets no more."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_without_file_descriptors_says_so_and_goes_on_when_it_has_some(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url, engine__unavailable_after_s=1)
    with _without_descriptors(worker.process.pid):
        refused = _answered(watcher, "without")
        eventually(lambda: "no file descriptors left" in _problem(watcher))
    assert (refused["code"], refused["retryable"]) == ("engine_unavailable", True)
    assert any("LimitNOFILE=" in line["problem"] for line in worker.log("worker.short"))
    eventually(lambda: not _problem(watcher))
    assert _answered(watcher, "with")["type"] == "done"


def test_a_worker_that_loses_its_broker_while_it_has_no_file_descriptors_comes_back_when_it_has_some(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    worker = start_worker(broker.port, llama_server.url, mqtt__reconnect_max_s=0.5)
    pid = worker.process.pid
    with _without_descriptors(pid):
        broker.kill()
        broker.start()
        eventually(lambda: "too many open files" in worker.log_text(), 20)
        worker.send(signal.SIGHUP)  # a reload opens files too
        eventually(lambda: bool(worker.log("configuration.refused")))
    watcher = watch(broker.port)
    watcher.first(_topic="llm/status/w1", state="online")
    assert _answered(watcher, "with")["type"] == "done"
    eventually(lambda: not _problem(watcher))
    assert worker.process.pid == pid


def _own_server(pid: int) -> int:
    """The process id of the server that this worker has started."""
    (child,) = children_of(pid)
    return child


def test_an_engine_that_is_killed_for_lack_of_memory_is_a_problem_in_the_status_and_so_is_one_without_descriptors(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, tiny_gguf: Path, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    own = {"kind": "managed", "model_path": str(tiny_gguf), "slots": 1, "context_tokens": 2048, "threads": 1}
    worker = start_worker(broker.port, "", **{f"engine__{name}": value for name, value in own.items()})
    pid = worker.process.pid
    assert _answered(watcher, "before")["type"] == "done"
    os.kill(_own_server(pid), signal.SIGKILL)
    eventually(lambda: "once for lack of memory" in _problem(watcher))
    assert _answered(watcher, "between")["type"] == "done"
    with _without_descriptors(pid):
        os.kill(_own_server(pid), signal.SIGKILL)
        eventually(lambda: "no file descriptors left" in _problem(watcher))
        eventually(lambda: "cannot be started" in _status(watcher)["engine"].get("detail", ""), 20)
    eventually(lambda: _status(watcher)["engine"]["state"] == "ready", 30)
    assert _answered(watcher, "after")["type"] == "done"
    assert "2 times for lack of memory" in _problem(watcher)
    assert "descriptors" not in _problem(watcher)


def test_sigterm_with_8_running_and_20_queued_ends_the_running_and_keeps_the_queued_for_the_next_life(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, start_llama_server: StartServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    server = start_llama_server(slots=8, n_ctx=2048)
    watcher = watch(broker.port)
    settings = {"limits__queue_size": 100, "limits__drain_timeout_s": 30}
    worker = start_worker(broker.port, server.url, **settings)
    running, queued = [f"running-{n}" for n in range(8)], [f"queued-{n}" for n in range(20)]
    for name in running:
        watcher.ask(f"{name}/s", "go on", request_id=name, max_tokens=1500)
    for name in running:
        watcher.first(type="chunk", request_id=name)
    for name in queued:
        watcher.ask(f"{name}/s", "wait", request_id=name, max_tokens=4)
    for name in queued:
        watcher.first(type="queued", request_id=name)
    worker.send(signal.SIGTERM)
    assert worker.wait(60) == 0
    for name in running:
        assert watcher.terminal(name)["type"] == "done"
        check_stream(watcher.of(name))
    assert not [name for name in queued if any(event.get("final") for event in watcher.of(name))]
    start_worker(broker.port, server.url, **settings)
    for name in queued:
        assert watcher.terminal(name)["type"] == "done"
        check_stream(watcher.of(name))
