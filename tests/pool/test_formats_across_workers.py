"""Routes with a format in a pool: whichever worker receives, runs, takes over or repeats a request, its client hears its own format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from threading import Event
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Reasoning
from llamacpp_mqtt_deploy.core.formats.seeds import message_numbers
from llamacpp_mqtt_deploy.ports import Delivery, Link, StoreError
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Step
from tests.pool.fleet import SHORT_LEASE_S, Fleet, PooledWorker, fleet_on
from tests.pool.route_clients import RouteClients
from tests.support.mosquitto import Mosquitto
from tests.support.postgres_server import PostgresServer
from tests.support.waiting import eventually

NAMES = {"content": "response", "error": "problem", "request_id": "requestId"}
_USER, _ASSISTANT = message_numbers("r1")

FIRST: Mapping[str, list[Any]] = {
    "text": [],
    "json": [],
    "text-chunks": ["It is "],
    "tokens": [{"token": "It is "}],
    "content": [{"content": "It is ", "session_id": "s1"}],
    "chatbot": [
        {"type": "metadata", "session_id": "s1", "user_message_id": _USER, "session_key": "s1"},
        {"type": "chunk", "content": "It is "},
    ],
    "typed-chunks": [{"chunk": "It is ", "type": "content"}],
    "typed-events": [
        {"type": "message_start"},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "It is "}},
    ],
}
"""What each format tells of the first words of the answer."""

REST: Mapping[str, list[Any]] = {
    "text": ["It is noon."],
    "json": [{"response": "It is noon.", "requestId": "r1"}],
    "text-chunks": ["noon."],
    "tokens": [{"token": "noon."}, {"token": "", "type": "complete"}],
    "content": [{"content": "noon.", "session_id": "s1"}, {"done": True, "session_id": "s1"}],
    "chatbot": [
        {"type": "chunk", "content": "noon."},
        {"type": "done", "assistant_message_id": _ASSISTANT, "full_content": "It is noon."},
    ],
    "typed-chunks": [{"chunk": "noon.", "type": "content"}, {"type": "done"}],
    "typed-events": [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "noon."}},
        {"type": "message_stop"},
    ],
}

_GONE = "the worker that wrote this answer is gone; send a new request for it"
GONE: Mapping[str, list[Any]] = {
    "text-chunks": [f"\n[interrupted: {_GONE}]\n"],
    "tokens": [{"token": "", "type": "error", "error": _GONE}],
    "content": [{"error": _GONE, "session_id": "s1"}],
    "chatbot": [{"type": "error", "message": _GONE}],
    "typed-chunks": [{"type": "error", "message": _GONE}],
    "typed-events": [{"type": "error", "error": {"type": "interrupted", "message": _GONE}}],
}
"""The end of an answer whose worker died in the middle. What is told whole is written anew by another worker."""


@pytest.fixture
def fleet(mosquitto: Mosquitto, postgres: PostgresServer) -> Iterator[Fleet]:
    with fleet_on(mosquitto, postgres.url, lease_s=SHORT_LEASE_S) as made:
        yield made


@pytest.fixture
def clients(mosquitto: Mosquitto, fleet: Fleet) -> Iterator[RouteClients]:
    made = RouteClients(mosquitto, fleet)
    yield made
    made.close()


def routes(clients: RouteClients) -> dict[str, Any]:
    """One of each format. Replies go where the payload's ids say."""
    found: dict[str, Any] = {}
    for name in FIRST:
        found |= clients.route(
            name.replace("-", "_"),
            request=f"{{base}}/{name}/in",
            reply=f"{{base}}/{name}/out/{{session}}/{{client_id}}/{{request_id}}",
            trust_payload_session=True,
            fields={"prompt": "message", "session_id": "sessionId", "request_id": "requestId", "client_id": "clientId"},
            format=name,
            **({"answer_fields": NAMES} if name == "json" else {}),
        )
    return found


def say(clients: RouteClients, name: str, message: str = "What time is it?", **more: Any) -> None:
    body = {"sessionId": "s1", "requestId": "r1", "clientId": "web", "message": message} | more
    clients.say(f"{name}/in", body)


def told(clients: RouteClients, name: str, count: int, request_id: str = "r1") -> list[Any]:
    """What this client heard, once there is so much of it."""
    parts = clients.wait_for(count, f"{name}/out/s1/web/{request_id}")
    return [part.decode() if name.startswith("text") else json.loads(part) for part in parts]


def clock(gate: Gate) -> ScriptedEngine:
    """Tells the time, and stands at the gate in the middle of it."""

    def script(_call: EngineCall) -> list[Step]:
        return [Reasoning("hm"), "It is ", gate, "noon."]

    return ScriptedEngine(script, slots=len(FIRST))


def opened() -> Gate:
    gate = Gate()
    gate.open()
    return gate


def waits_for_all(fleet: Fleet, worker: PooledWorker, number: int) -> None:
    eventually(lambda: worker.daemon.parts.store.load().queued["normal"] == number)  # type: ignore[attr-defined]


def handled(*workers: PooledWorker) -> list[Delivery]:
    """The messages that these workers have dealt with from now on; grows."""
    seen: list[Delivery] = []

    def count(link: Link) -> None:
        acknowledge = link.acknowledge

        def counted(delivery: Delivery) -> None:
            acknowledge(delivery)
            seen.append(delivery)

        link.acknowledge = counted  # type: ignore[method-assign]

    for worker in workers:
        count(worker.daemon.parts.link)
    return seen


# --- received by one, run by another -------------------------------------------------------------------------------------


def test_what_another_worker_runs_is_told_in_the_format_of_its_route_on_the_topic_of_its_client(
    fleet: Fleet, clients: RouteClients
) -> None:
    full, gate = Gate(), Gate()
    receiver = fleet.worker(**routes(clients))
    receiver.engine.play("busy ", full, "with another")
    held = fleet.ask("hold the only slot")
    assert full.reached.wait(10)
    for name in FIRST:
        say(clients, name)
    say(clients, "tokens")  # sent again while it waits
    waits_for_all(fleet, receiver, len(FIRST))
    # A client of the protocol hears that it waits, and so would all others have by now.
    fleet.until(type="queued", request_id=fleet.ask("wait, too", session="bob"))
    assert clients.topics() == {f"{name}/in" for name in FIRST}
    runner = fleet.worker(engine=clock(gate), **routes(clients))
    for name, first in FIRST.items():
        assert told(clients, name, len(first)) == first
    eventually(lambda: len(runner.engine.calls) == len(FIRST))
    again = handled(receiver, runner)
    for name in FIRST:
        say(clients, name)  # sent again while it runs, and dealt to either of them
    # Dealt with after the end it would be answered with all of it.
    eventually(lambda: len(again) == len(FIRST))
    gate.open()
    for name, first in FIRST.items():
        assert told(clients, name, len(first) + len(REST[name])) == [*first, *REST[name]]
    full.open()
    fleet.end(held)
    assert len(receiver.engine.calls) <= 2  # its own, and perhaps the one of the protocol
    assert clients.topics() == {f"{name}/{way}" for name in FIRST for way in ("in", "out/s1/web/r1")}


def test_a_text_that_is_asked_for_again_comes_whole_whichever_worker_is_asked(
    fleet: Fleet, clients: RouteClients
) -> None:
    workers = [fleet.worker(engine=clock(opened()), **routes(clients)) for _ in range(2)]
    for name in ("text", "json"):
        for count in range(1, 5):
            say(clients, name)
            assert told(clients, name, count) == REST[name] * count
    assert sum(len(worker.engine.calls) for worker in workers) == 2


def test_a_model_that_only_another_worker_has_answers_in_the_format_and_one_that_nobody_has_is_refused_in_it(
    fleet: Fleet, clients: RouteClients
) -> None:
    small = fleet.worker(engine=ScriptedEngine(slots=1, model="small"), **routes(clients))
    large = fleet.worker(engine=ScriptedEngine(slots=1, model="large"), **routes(clients))
    eventually(lambda: all(_knows(worker, "large", "json") for worker in (small, large)))
    for number in range(4):
        say(clients, "json", f"{number}", requestId=f"l{number}", model="large")
        say(clients, "json", f"{number}", requestId=f"x{number}", model="huge")
    for number in range(4):
        assert told(clients, "json", 1, f"l{number}") == [{"response": f"{number}", "requestId": f"l{number}"}]
        (refusal,) = told(clients, "json", 1, f"x{number}")
        assert set(refusal) == {"problem", "requestId"}
        assert "huge" in refusal["problem"]
    assert (len(small.engine.calls), len(large.engine.calls)) == (0, 4)


def _knows(worker: PooledWorker, model: str, route: str) -> bool:
    return model in (worker.daemon.parts.in_force.policies().routes[route].parse.models or ())


# --- after a worker's death ----------------------------------------------------------------------------------------------


def _away() -> None:
    raise StoreError("The database is away for a moment.")


def test_what_a_worker_leaves_behind_is_ended_in_the_format_of_its_route_and_what_is_told_whole_is_written_anew(
    fleet: Fleet, clients: RouteClients, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    gone = fleet.worker(engine=clock(gate), **routes(clients))
    for name, first in FIRST.items():
        say(clients, name)
        assert told(clients, name, len(first)) == first
    eventually(lambda: len(gone.engine.calls) == len(FIRST))
    heir = fleet.worker(engine=clock(opened()), **routes(clients))
    with monkeypatch.context() as patch:
        patch.setattr(gone.daemon.parts.store, "renew", _away)
        for name, first in FIRST.items():
            rest = GONE.get(name, REST[name])
            assert told(clients, name, len(first) + len(rest)) == [*first, *rest]
    assert [len(call.messages) for call in heir.engine.calls] == [1, 1]
    # It sees that it has lost all of this, and says no more of it.
    eventually(lambda: len(gone.daemon.parts.registry) == 0)
    gate.open()
    say(clients, "text", requestId="after")
    assert told(clients, "text", 1, "after") == ["It is noon."]
    for name, first in FIRST.items():
        assert told(clients, name, 0) == [*first, *GONE.get(name, REST[name])]


def test_an_end_that_a_dead_worker_may_not_have_told_is_told_in_the_format_of_its_route(
    fleet: Fleet, clients: RouteClients, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = fleet.worker(engine=clock(opened()), **routes(clients))
    monkeypatch.setattr(gone.daemon.parts.store, "mark_delivered", lambda _keys: _away())
    for name in ("text", "json", "tokens"):
        say(clients, name)
    assert told(clients, "text", 1) == REST["text"]
    assert told(clients, "json", 1) == REST["json"]
    eventually(lambda: told(clients, "tokens", 1)[-1] == {"token": "", "type": "complete"})
    once = told(clients, "tokens", 1)
    monkeypatch.setattr(gone.daemon.parts.store, "renew", _away)
    fleet.worker(engine=clock(opened()), **routes(clients))
    for name in ("text", "json"):
        assert told(clients, name, 2) == REST[name] * 2
    assert told(clients, "tokens", 2 * len(once)) == once * 2


def test_an_answer_that_ends_while_its_worker_takes_over_from_another_is_told_once(
    fleet: Fleet, clients: RouteClients, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = Gate()
    gone = fleet.worker(engine=clock(never), **routes(clients))
    say(clients, "text")
    eventually(lambda: gone.engine.calls)
    heir = fleet.worker(engine=clock(opened()), **routes(clients))
    journal: Any = heir.daemon.parts.store
    take_over, undelivered = journal.take_over, journal.undelivered
    over = Event()

    def taken_over(fence: int) -> Any:
        found = take_over(fence)
        over.set()
        return found

    def after_its_own_end() -> Any:
        if over.is_set():
            told(clients, "text", 1)
        return undelivered()

    monkeypatch.setattr(journal, "take_over", taken_over)
    monkeypatch.setattr(journal, "undelivered", after_its_own_end)
    with monkeypatch.context() as patch:
        patch.setattr(gone.daemon.parts.store, "renew", _away)
        assert told(clients, "text", 1) == REST["text"]
        eventually(lambda: undelivered() == [])
    eventually(lambda: len(gone.daemon.parts.registry) == 0)
    never.open()
    say(clients, "text", requestId="after")
    told(clients, "text", 1, "after")
    assert told(clients, "text", 1) == REST["text"]
