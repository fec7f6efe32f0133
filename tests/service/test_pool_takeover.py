"""Workers of a pool as real processes: one dies, stands still, or loses its database or its broker, and nothing is lost or told twice."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Watcher
from tests.support.bus_client import BusClient
from tests.support.daemon_process import DaemonProcess
from tests.support.mosquitto import Mosquitto
from tests.support.paced_server import PacedServer
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually

LEASE_S = 2
TAKEN_OVER_WITHIN_S = LEASE_S + 2.0
TOKENS_PER_S = 20


FORMATS = ("tokens", "content")
"""Routes whose names are those of their formats."""


def _route(name: str) -> dict[str, str]:
    return {"request": f"{name}/ask/{{session}}", "reply": f"{name}/answer/{{session}}", "format": name}


@dataclass
class Pool:
    """Two workers with one slot each, and who watches them."""

    watcher: Watcher
    broker: Mosquitto
    database: PostgresServer
    start: Callable[[str], DaemonProcess]
    workers: dict[str, DaemonProcess] = field(default_factory=dict)

    def streams(self, request_id: str, *, tokens: int = 400) -> str:
        """Ask for a long answer; which worker writes it."""
        self.watcher.ask(f"u-{request_id}", "go on", request_id=request_id, max_tokens=tokens)
        self.watcher.first(type="chunk", request_id=request_id)
        return str(self.watcher.first(type="start", request_id=request_id).event["worker"])

    def ends(self, request_id: str) -> list[dict[str, Any]]:
        return [event for event in self.watcher.of(request_id) if event.get("final")]


@pytest.fixture
def pool(
    start_mosquitto: Callable[..., Mosquitto],
    start_postgres: Callable[..., PostgresServer],
    start_worker: StartWorker,
    watch: Watch,
    tmp_path: Path,
) -> Iterator[Pool]:
    broker, database = start_mosquitto(persistence=True), start_postgres()
    engines: list[PacedServer] = []

    def start(name: str) -> DaemonProcess:
        engines.append(PacedServer(TOKENS_PER_S))
        return start_worker(
            broker.port,
            engines[-1].url,
            folder=name,
            mqtt__worker_id=name,
            sessions__store="postgres",
            sessions__url=database.url,
            pool__name="fleet",
            pool__lease_s=LEASE_S,
            limits__drain_timeout_s=3,
            streaming__heartbeat_s=5,
            **{f"routes__{name}__{key}": value for name in FORMATS for key, value in _route(name).items()},
        )

    made = Pool(watch(broker.port), broker, database, start)
    made.workers |= {name: start(name) for name in ("w1", "w2")}
    yield made
    for worker in made.workers.values():
        if worker.process.poll() is None:
            worker.send(signal.SIGCONT)
    for engine in engines:
        engine.close()


def test_what_a_killed_worker_had_is_ended_or_run_by_another_within_its_lease(pool: Pool) -> None:
    places = {pool.streams("a"): "a", pool.streams("b"): "b"}
    for number in range(4):
        pool.watcher.ask(f"v{number}", "hello", request_id=f"later{number}", max_tokens=5)
        pool.watcher.first(type="queued", request_id=f"later{number}")
    killed_at = time.monotonic()
    pool.workers["w1"].kill()
    end = pool.watcher.first(request_id=places["w1"], final=True)
    assert (end.event["type"], end.event["code"], end.event["retryable"]) == ("error", "interrupted", True)
    assert end.at - killed_at < TAKEN_OVER_WITHIN_S
    pool.watcher.control(f"u-{places['w2']}", "cancel")
    for number in range(4):
        assert pool.watcher.terminal(f"later{number}")["finish_reason"] == "length"
    pool.workers["w1"] = pool.start("w1")
    pool.watcher.ask("again", "hello", request_id="again", max_tokens=5)
    assert pool.watcher.terminal("again")["finish_reason"] == "length"
    for request_id in ("a", "b", "again", *(f"later{number}" for number in range(4))):
        assert len(pool.ends(request_id)) == 1, request_id


def test_a_killed_workers_answer_ends_in_the_format_of_its_route(pool: Pool) -> None:
    client = BusClient(pool.broker.port)
    try:
        client.subscribe("+/answer/#")
        for name in FORMATS:
            client.publish(f"{name}/ask/ada", b'{"prompt":"go on","max_tokens":100}')
        heard: dict[str, list[dict[str, Any]]] = {f"{name}/answer/ada": [] for name in FORMATS}

        def hear() -> None:
            message = client.receive(20)
            heard[message.topic].append(json.loads(message.payload))

        while not all(heard.values()):
            hear()
        pool.workers["w1"].kill()
        killed_at = time.monotonic()
        errors: list[dict[str, Any]] = []
        while not errors:
            hear()
            errors = [parts[-1] for parts in heard.values() if "error" in parts[-1]]
        assert time.monotonic() - killed_at < TAKEN_OVER_WITHIN_S
        assert "is gone" in errors[0]["error"]
        ends = [{"token": "", "type": "complete"}, {"done": True, "session_id": "ada"}]
        while sum(parts[-1] in (*ends, *errors) for parts in heard.values()) < len(FORMATS):
            hear()
        pieces = [part.get("token", part.get("content")) for parts in heard.values() for part in parts[:-1]]
        assert set(pieces) <= {" word" * number for number in range(1, 20)}
    finally:
        client.close()


def test_a_worker_that_stood_still_for_longer_than_its_lease_ends_nothing_a_second_time(pool: Pool) -> None:
    places = {pool.streams("a", tokens=60): "a", pool.streams("b", tokens=60): "b"}
    stopped = pool.workers["w1"]
    stopped.send(signal.SIGSTOP)
    stopped_at = time.monotonic()
    end = pool.watcher.first(request_id=places["w1"], final=True)
    assert end.event["code"] == "interrupted"
    assert end.at - stopped_at < TAKEN_OVER_WITHIN_S
    stopped.send(signal.SIGCONT)
    stopped.until(lambda: stopped.log("pool.lease_lost"), 20, "a lost lease")
    stopped.until(lambda: len(stopped.log("pool.joined")) == 2, 20, "a new membership")
    assert pool.watcher.terminal(places["w2"])["finish_reason"] == "length"
    # Both of them serve: each has one slot, and these take longer than the next one is asked for.
    served = {pool.streams("c", tokens=40), pool.streams("d", tokens=40)}
    assert served == {"w1", "w2"}
    for request_id in ("c", "d"):
        assert pool.watcher.terminal(request_id)["finish_reason"] == "length"
    for request_id in "abcd":
        assert len(pool.ends(request_id)) == 1
    # The interrupted answer has left no trace in the conversation.
    pool.watcher.control(f"u-{places['w1']}", "history")
    assert pool.watcher.first(type="ack", action="history").event["messages"] == []


def test_answers_under_way_outlive_a_crash_of_the_database(pool: Pool) -> None:
    for request_id in ("a", "b"):
        pool.streams(request_id, tokens=80)
    pool.database.stop("immediate")
    pool.watcher.ask("late", "hello", request_id="meanwhile", max_tokens=5)
    worker = pool.workers["w1"]
    eventually(lambda: any(each.log("pool.enqueue_waits") for each in pool.workers.values()), 20)
    pool.database.start()
    for request_id in ("a", "b", "meanwhile"):
        assert pool.watcher.terminal(request_id)["finish_reason"] == "length", worker.log_text()[-3000:]
        assert len(pool.ends(request_id)) == 1


def test_answers_under_way_outlive_a_restart_of_the_broker(pool: Pool) -> None:
    for request_id in ("a", "b"):
        pool.streams(request_id, tokens=80)
    pool.broker.restart()
    pool.watcher.wait_back()
    for request_id in ("a", "b"):
        assert pool.watcher.terminal(request_id)["finish_reason"] == "length"
    pool.watcher.ask("next", "hello", request_id="next", max_tokens=5)
    assert pool.watcher.terminal("next")["finish_reason"] == "length"
    for request_id in ("a", "b", "next"):
        assert len(pool.ends(request_id)) == 1


def test_a_worker_that_is_drained_loses_no_request(pool: Pool) -> None:
    asked = [f"r{number}" for number in range(20)]
    for number, request_id in enumerate(asked):
        pool.watcher.ask(f"u{number}", "hello", request_id=request_id, max_tokens=4)
        if number == 8:
            pool.workers["w1"].send(signal.SIGTERM)
    assert pool.workers["w1"].wait() == 0
    for request_id in asked:
        assert pool.watcher.terminal(request_id)["finish_reason"] == "length"
        assert len(pool.ends(request_id)) == 1
