"""Many conversations over four workers at once: each turn sees exactly what was said before it, in order.

`make fleet` runs it with 200 conversations of 10 turns.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import uuid
from collections.abc import Iterator

import pytest

from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine, Step, text_of
from tests.pool.fleet import Fleet, PooledWorker, fleet_on
from tests.support.mosquitto import Mosquitto
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually

CONVERSATIONS = int(os.environ.get("FLEET_CONVERSATIONS", "40"))
TURNS = int(os.environ.get("FLEET_TURNS", "5"))
AT_ONCE = 16


def _told(said: list[str]) -> str:
    """The answer to what was said so far: another one for every other past."""
    return f"{len(said)}-" + hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _answer(call: EngineCall) -> Iterator[Step]:
    answer = _told([text_of(message.get("content")) for message in call.messages])
    yield from (answer[:5], answer[5:])


@pytest.fixture
def fleet(mosquitto: Mosquitto, postgres: PostgresServer) -> Iterator[Fleet]:
    with fleet_on(mosquitto, postgres.url) as made:
        yield made


def test_each_turn_sees_exactly_the_history_before_it(fleet: Fleet) -> None:
    workers = [
        fleet.worker(engine=ScriptedEngine(_answer, slots=1), limits__queue_size=CONVERSATIONS + AT_ONCE)
        for _ in range(4)
    ]
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    said: dict[str, list[str]] = {}
    wrong: list[tuple[str, str, str]] = []
    under_way: dict[str, str] = {}

    def next_turn(session: str) -> None:
        request_id = uuid.uuid4().hex[:12]
        prompt = f"{session} says {len(said[session]) // 2}"
        said[session].append(prompt)
        under_way[request_id] = session
        body = {"prompt": prompt, "request_id": request_id}
        fleet.client.publish(f"{fleet.root}/request/{session}", json.dumps(body).encode())

    for number in range(CONVERSATIONS):
        left.put(f"user{number % 7}/talk{number}")
    for _ in range(min(AT_ONCE, CONVERSATIONS)):
        session = left.get()
        said[session] = []
        next_turn(session)
    while under_way:
        event = fleet.next_event(60.0)
        assert event is not None, f"nothing came for 60 s; {len(under_way)} requests wait"
        if not event.get("final") or event["request_id"] not in under_way:
            continue
        session = under_way.pop(event["request_id"])
        assert event["type"] == "done", event
        expected = _told(said[session])
        if event["full_content"] != expected:
            wrong.append((session, event["full_content"], expected))
        said[session].append(event["full_content"])
        if len(said[session]) < 2 * TURNS:
            next_turn(session)
        elif not left.empty():
            fresh = left.get()
            said[fresh] = []
            next_turn(fresh)
    assert wrong == []
    assert len(said) == CONVERSATIONS
    # What ended is counted after its event is on its way.
    eventually(lambda: sum(map(_ran, workers)) >= CONVERSATIONS * TURNS)
    assert sum(map(_ran, workers)) == CONVERSATIONS * TURNS
    assert min(map(_ran, workers)) > 0


def _ran(worker: PooledWorker) -> int:
    return sum(worker.daemon.parts.counters.tally().ended.values())
