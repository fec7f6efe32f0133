"""A database that another program locks while the worker is killed: what was published is neither begun nor ended again."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]


def test_a_kill_while_the_database_is_locked_neither_repeats_a_stream_nor_ends_it_twice(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    engine = start_llama_server(slots=2)
    watcher = watch(broker.port)
    first = start_worker(broker.port, engine.url)
    watcher.ask("a", "go on", request_id="blocker", max_tokens=4000)
    watcher.ask("b", "go on", request_id="blocker2", max_tokens=4000)
    watcher.first(type="chunk", request_id="blocker2")
    watcher.ask("c", "go on", request_id="r1", max_tokens=60)
    watcher.first(type="queued", request_id="r1")
    lock = sqlite3.connect(first.settings["sessions.path"], timeout=5, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    watcher.control("a", "cancel")  # now r1 gets a slot, and its mark meets the lock
    with contextlib.suppress(Exception):  # nothing goes out before the journal has it: just as well
        watcher.first(15, type="chunk", request_id="r1")
    first.kill()
    lock.close()
    start_worker(broker.port, engine.url)
    watcher.terminal("r1")
    start_again = [e for e in watcher.of("r1") if e["type"] == "chunk" and e["seq"] == 0]
    assert len(start_again) <= 1, "an answer whose first chunk was published was begun again"
    ends = {s.payload for s in watcher.seen() if s.event.get("final") and s.event["request_id"] == "r1"}
    eventually(lambda: ends, 1)
    assert len(ends) == 1, ends


def test_a_kill_after_an_end_that_met_a_locked_database_brings_no_other_end(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    first = start_worker(broker.port, llama_server.url)
    watcher.ask("c", "go on", request_id="r1", max_tokens=4000)
    watcher.first(type="chunk", request_id="r1")
    lock = sqlite3.connect(first.settings["sessions.path"], timeout=5, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    told = watcher.first(40, final=True, request_id="r1")  # after 20 s it is told all the same
    assert first.log("journal.end_told_unstored")
    first.kill()
    lock.close()
    second = start_worker(broker.port, llama_server.url)
    eventually(lambda: second.log("store.told_ends_taken_in"))
    assert second.log("store.told_ends_taken_in")[0]["missing"] == 1
    assert told.event["type"] == "done"
    eventually(lambda: any(s.event.get("final") for s in watcher.seen() if s.event.get("request_id") == "r1"), 20)
    watcher.publish("llm/request/c", b'{"request_id":"later","prompt":"hi","max_tokens":3}')
    watcher.terminal("later")
    ends = {s.payload for s in watcher.seen() if s.event.get("final") and s.event["request_id"] == "r1"}
    assert len(ends) == 1, ends
