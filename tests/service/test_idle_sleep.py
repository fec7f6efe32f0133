"""The real worker with a real server of its own that sleeps: what the bus sees, and the memory that the machine gets back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy import demo_model
from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Watcher
from tests.support.mosquitto import Mosquitto
from tests.support.processes import children_of
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]


def rss_of_tree(pid: int) -> int:
    """Bytes of this process and all below it."""
    own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return own + sum(rss_of_tree(child) for child in children_of(pid))


def engine_state(watcher: Watcher, kind: str) -> object:
    told = [seen.event for seen in watcher.seen() if seen.topic == f"llm/{kind}/w1"]
    engine = told[-1].get("engine") if told else None
    return engine.get("state") if isinstance(engine, dict) else engine


def test_memory_comes_back_while_nobody_asks_and_the_next_request_is_told_that_the_model_loads(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(
        broker.port,
        "",
        status__health_every_s=1,
        engine__kind="managed",
        engine__model_path=str(demo_model.path()),
        engine__slots=1,
        engine__context_tokens=2048,
        engine__threads=1,
        engine__managed__sleep_after_s=2,
    )
    pid = worker.process.pid
    watcher.ask("demo", "one", request_id="r1", max_tokens=4)
    assert watcher.terminal("r1")["type"] == "done"
    awake = rss_of_tree(pid)
    eventually(lambda: engine_state(watcher, "status") == "asleep", 20)
    eventually(lambda: engine_state(watcher, "health") == "asleep", 20)
    eventually(lambda: not children_of(pid))
    asleep = rss_of_tree(pid)
    assert asleep < awake - 20 * 1024 * 1024, (awake, asleep)
    watcher.ask("demo", "two", request_id="r2", max_tokens=4)
    assert watcher.terminal("r2")["type"] == "done"
    kinds = [(event["type"], event.get("reason")) for event in watcher.of("r2")]
    assert kinds[:2] == [("queued", "loading"), ("start", None)]
    assert worker.stop() == 0


def test_a_worker_is_stopped_while_its_engine_wakes_and_the_request_is_answered_in_the_next_life(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    settings = {
        "engine__kind": "managed",
        "engine__model_path": str(demo_model.path()),
        "engine__slots": 1,
        "engine__context_tokens": 2048,
        "engine__threads": 1,
    }
    worker = start_worker(broker.port, "", **settings)
    watcher.admin("w1", "unload")
    eventually(lambda: engine_state(watcher, "status") == "asleep", 20)
    watcher.ask("demo", "one", request_id="r1", max_tokens=4)
    watcher.first(type="queued", request_id="r1", reason="loading")
    worker.stop()
    start_worker(broker.port, "", **settings)
    assert watcher.terminal("r1")["type"] == "done"
