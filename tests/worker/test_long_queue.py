"""A worker before which hundreds of requests wait."""

from __future__ import annotations

from typing import Any

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker

MANY = 200
SETTINGS: dict[str, Any] = {"limits__queue_size": 1000, "limits__queue_share": 1.0}


def _filled(bus: Bus, **settings: Any) -> tuple[WholeWorker, ScriptedEngine, Gate]:
    """A worker of one slot before which `MANY` wait until the gate is opened for the one that runs."""
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play(gate, "done")
    worker = bus.worker(engine, **SETTINGS, **settings)
    bus.ask("go on", request_id="running", session="running")
    eventually(gate.reached.is_set)
    for number in range(MANY):
        _ask(bus, number)
    return worker, engine, gate


def _ask(bus: Bus, number: int) -> None:
    bus.ask(f"question {number}", request_id=f"r{number}", session=f"u{number % 9}/s{number}")


def _places(bus: Bus) -> dict[str, list[int]]:
    return {
        f"r{number}": [event["position"] for event in bus.listener.of(f"r{number}") if event["type"] == "queued"]
        for number in range(MANY)
    }


def test_everybody_is_told_a_place_and_each_is_answered_in_the_end(bus: Bus) -> None:
    _, engine, gate = _filled(bus)
    eventually(lambda: all(_places(bus).values()))
    assert sorted(places[0] for places in _places(bus).values()) == list(range(1, MANY + 1))
    _ask(bus, 7)  # sent again
    eventually(lambda: len(_places(bus)["r7"]) > 1)
    gate.open()
    for number in range(MANY):
        assert bus.listener.terminal(f"r{number}")["full_content"] == f"question {number}"
    assert len(engine.calls) == MANY + 1
    for places in _places(bus).values():
        assert places[0] > 0
        assert places[-1] <= places[0]


def test_a_request_sent_again_before_its_place_was_told_is_told_it_once(bus: Bus) -> None:
    *_, gate = _filled(bus)
    _ask(bus, MANY - 1)
    eventually(lambda: all(_places(bus).values()))
    assert 0 not in _places(bus)[f"r{MANY - 1}"], "which would say that it waits no more"
    gate.open()
    bus.listener.terminal(f"r{MANY - 1}")


def test_a_restart_takes_a_long_queue_up_again(bus: Bus) -> None:
    first, *_ = _filled(bus, limits__drain_timeout_s=0.1)
    eventually(lambda: all(_places(bus).values()))
    first.stop()
    told = {name: len(places) for name, places in _places(bus).items()}
    held = Gate()
    second = ScriptedEngine(slots=1)
    second.play(held, "first")
    bus.worker(second, **SETTINGS)
    eventually(held.reached.is_set)
    eventually(lambda: sum(len(places) > told[name] for name, places in _places(bus).items()) >= MANY - 1)
    held.open()
    for number in range(MANY):
        assert bus.listener.terminal(f"r{number}")["type"] == "done"
    assert len(second.calls) == MANY
