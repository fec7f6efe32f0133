"""The scripted engine does what its script says, and slots are given in turn."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Opened, Reasoning, Text, TokenUsage
from llamacpp_mqtt_deploy.core.errors import EngineLost, EngineUnavailable
from llamacpp_mqtt_deploy.engines.slots import Slots
from llamacpp_mqtt_deploy.stopping import Stopped, StopSignal
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Wait
from tests.support.waiting import eventually

CALL = EngineCall(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": " the water,  good "}])


def ready(**wishes: int) -> ScriptedEngine:
    engine = ScriptedEngine(**wishes)  # type: ignore[arg-type]
    engine.open()
    return engine


def play(engine: ScriptedEngine, call: EngineCall = CALL, waits: list[str] | None = None) -> list[Delta]:
    return list(engine.stream(call, stop=StopSignal(), on_wait=([] if waits is None else waits).append))


def test_without_a_script_the_last_user_message_comes_back() -> None:
    engine = ready()
    deltas = play(engine)
    assert "".join(delta.text for delta in deltas if isinstance(delta, Text)) == " the water,  good "
    assert deltas[-1] == Finished("stop", TokenUsage(prompt_tokens=4, completion_tokens=4))
    assert list(engine.calls) == [CALL]


def test_scripts_are_played_in_turn() -> None:
    engine = ready()
    engine.play(Wait("loading"), Reasoning("hm"), "a", "b")
    engine.play("c", EngineLost("gone"))
    waits: list[str] = []
    assert play(engine, waits=waits)[:-1] == [Opened("scripted"), Reasoning("hm"), Text("a"), Text("b")]
    assert waits == ["loading"]
    with pytest.raises(EngineLost):
        play(engine)
    assert engine.busy == 0


def test_a_gate_holds_a_generation_until_it_is_opened() -> None:
    engine, gate, heard = ready(), Gate(), list[Delta]()
    engine.play("a", gate, "b")
    thread = threading.Thread(target=lambda: heard.extend(engine.stream(CALL, stop=StopSignal(), on_wait=print)))
    thread.start()
    assert gate.reached.wait(5)
    assert Text("b") not in heard
    assert engine.busy == 1
    gate.open()
    thread.join(5)
    assert Text("b") in heard


def test_a_call_waits_while_the_engine_restarts() -> None:
    engine, waits, heard = ready(), list[str](), list[Delta]()
    engine.become("restarting")
    thread = threading.Thread(target=lambda: heard.extend(engine.stream(CALL, stop=StopSignal(), on_wait=waits.append)))
    thread.start()
    eventually(lambda: waits == ["engine_restarting"])
    engine.become("ready")
    thread.join(5)
    assert isinstance(heard[-1], Finished)


def test_an_engine_that_stays_away_is_unavailable() -> None:
    with pytest.raises(EngineUnavailable):
        play(ScriptedEngine(unavailable_after_s=0.05))


def test_a_model_of_the_calls_own_is_named_in_its_answer() -> None:
    assert play(ready(), replace(CALL, model="other"))[0] == Opened("other")


def test_slots_go_to_whoever_waits_longest() -> None:
    slots, order, threads = Slots(1), list[int](), list[threading.Thread]()
    slots.acquire(StopSignal())

    def take(number: int) -> None:
        slots.acquire(StopSignal())
        order.append(number)
        slots.release()

    for number in range(5):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        eventually(lambda number=number: len(slots._waiting) == number + 1)  # type: ignore[misc]
    slots.release()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4]
    assert slots.busy == 0


def test_a_wait_for_a_slot_ends_with_its_time_or_its_stop() -> None:
    slots, stop = Slots(1), StopSignal()
    slots.acquire(StopSignal())
    assert not slots.acquire(StopSignal(), timeout_s=0.02)
    timer = threading.Timer(0.05, stop.set, ("cancelled",))
    timer.start()
    with pytest.raises(Stopped):
        slots.acquire(stop)
    timer.join()
    slots.resize(2)
    assert slots.acquire(StopSignal(), timeout_s=0)
    assert slots.busy == 2
