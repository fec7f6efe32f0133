"""A client asks how many tokens its prompt has, and whoever counts slowly delays nobody else."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker import token_counts
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, Event

HELLO = [{"role": "user", "content": "hello there you"}]


class SlowCount:
    """Counts one client's prompts only when it is told to."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, call: EngineCall) -> int:
        if "slow" in str(call.messages):
            self.reached.set()
            assert self.open.wait(60)
        return 7


def count(bus: Bus, session: str = "demo", **fields: Any) -> Event:
    bus.control("count_tokens", session=session, **fields)
    return bus.listener.until(type="ack", action="count_tokens", session_id=session)


def test_a_prompt_is_counted_as_the_engine_would_get_it(bus: Bus) -> None:
    calls: list[EngineCall] = []

    def counting(call: EngineCall) -> int:
        calls.append(call)
        return 41

    engine = ScriptedEngine(count=counting)
    bus.worker(engine, generation__system_prompt="Be brief.")
    ack = count(bus, prompt="hello", transaction="t1")
    assert (ack["status"], ack["prompt_tokens"], ack["transaction"]) == ("ok", 41, "t1")
    assert [message["content"] for message in calls[-1].messages] == ["Be brief.", "hello"]
    assert not engine.calls, "nothing was generated"
    bus.control("history")
    assert bus.listener.until(type="ack", action="history")["messages"] == []


def test_messages_and_tools_are_counted_and_the_prompts_own_system_prompt_wins(bus: Bus) -> None:
    calls: list[EngineCall] = []

    def counting(call: EngineCall) -> int:
        calls.append(call)
        return len(calls)

    engine = ScriptedEngine(count=counting)
    bus.worker(engine, generation__system_prompt="Be brief.")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    bus.control("count_tokens", messages=HELLO, tools=[tool], transaction="t1")
    assert bus.listener.until(type="ack", transaction="t1")["prompt_tokens"] == 1
    bus.control("count_tokens", prompt="hello", system_prompt="Be long.", transaction="t2")
    assert bus.listener.until(type="ack", transaction="t2")["prompt_tokens"] == 2
    assert [message["content"] for message in calls[0].messages] == ["hello there you"]
    assert calls[0].tools is not None
    assert calls[0].tools[0]["function"]["name"] == "look"
    assert calls[1].messages[0] == {"role": "system", "content": "Be long."}


@pytest.mark.parametrize(
    "fields, at_fault",
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": HELLO}, "messages"),
        ({"prompt": 5}, "prompt"),
        ({"tool_results": [{"tool_call_id": "c", "content": "x"}]}, "prompt"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
    ],
)
def test_a_fault_in_what_is_to_be_counted_names_its_field(bus: Bus, fields: dict[str, Any], at_fault: str) -> None:
    bus.worker()
    ack = count(bus, **fields)
    assert (ack["status"], ack["code"]) == ("error", "bad_request")
    assert at_fault in ack["fields"]


def test_a_model_that_is_not_served_is_told_so(bus: Bus) -> None:
    bus.worker(engine__model="qwen")
    assert count(bus, prompt="x", model="no-such")["code"] == "model_not_found"


def test_what_is_counted_may_be_as_long_as_a_request_and_other_controls_may_not(bus: Bus) -> None:
    bus.worker(limits__max_request_bytes=20_000)
    assert count(bus, prompt="word " * 3000, session="demo")["status"] == "ok"
    bus.control("count_tokens", session="other", transaction="t9", prompt="word " * 5000)
    refused = bus.listener.until(type="ack", session_id="other")
    assert (refused["code"], refused["action"], refused["transaction"]) == ("payload_too_large", "count_tokens", "t9")
    bus.control("ping", session="third", prompt="count_tokens" * 500, count_tokens="count_tokens")
    assert bus.listener.until(type="ack", session_id="third")["code"] == "payload_too_large"


def test_an_engine_that_cannot_tell_is_unsupported(bus: Bus) -> None:
    bus.worker(ScriptedEngine(count=lambda _call: None))
    ack = count(bus, prompt="x")
    assert (ack["status"], ack["code"]) == ("error", "unsupported")


@pytest.mark.parametrize("state", ["asleep", "restarting", "unreachable"])
def test_an_engine_that_sleeps_or_is_away_is_neither_waited_for_nor_woken(bus: Bus, state: Any) -> None:
    engine = ScriptedEngine()
    bus.worker(engine)
    engine.become(state)
    ack = count(bus, prompt="x")
    assert (ack["status"], ack["code"]) == ("error", "engine_unavailable")
    assert ack["retry_after_s"] > 0
    assert engine.wakes == 0


def test_a_slow_count_delays_no_other_clients_ping_cancel_history_or_answer(bus: Bus) -> None:
    slow = SlowCount()
    engine = ScriptedEngine(slots=2, count=slow)
    bus.worker(engine)
    gate = Gate()
    engine.play("so far", gate)
    bus.ask("x", request_id="runs", session="modest/1")
    eventually(gate.reached.is_set)
    bus.control("count_tokens", session="greedy/1", prompt="slow")
    eventually(slow.reached.is_set)
    for action in ("ping", "history", "cancel"):
        bus.control(action, session="modest/1")
        assert bus.listener.until(type="ack", action=action, session_id="modest/1")["status"] == "ok"
    assert bus.listener.terminal("runs")["finish_reason"] == "cancelled"
    bus.ask("hello", request_id="next", session="modest/1")
    assert bus.listener.terminal("next")["type"] == "done"
    slow.open.set()
    assert bus.listener.until(type="ack", action="count_tokens")["prompt_tokens"] == 7


def test_a_count_that_takes_too_long_is_given_up(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "WITHIN_S", 0.2)

    class Patient(ScriptedEngine):
        def count_tokens(self, call: EngineCall, *, stop: Any) -> int | None:
            assert stop.wait(60)
            stop.raise_if_set()
            return None

    bus.worker(Patient())
    ack = count(bus, prompt="x")
    assert (ack["status"], ack["code"]) == ("error", "timeout")


def test_more_counts_of_one_client_than_can_wait_are_busy_and_another_client_is_counted_in_its_turn(bus: Bus) -> None:
    slow = SlowCount()
    bus.worker(ScriptedEngine(count=slow))
    bus.control("count_tokens", session="greedy/1", prompt="slow")
    eventually(slow.reached.is_set)
    for number in range(30):
        bus.control("count_tokens", session="greedy/1", prompt="x", transaction=f"g{number}")
    refused = bus.listener.until(type="ack", transaction="g29")
    assert (refused["status"], refused["code"]) == ("error", "busy")
    bus.control("count_tokens", session="modest/1", prompt="x", transaction="m")
    bus.control("ping", session="modest/1")
    bus.listener.until(type="ack", action="ping")  # by now the worker has read what came before
    slow.open.set()
    assert bus.listener.until(type="ack", transaction="m")["prompt_tokens"] == 7
    counted = [event.get("transaction") for event in bus.listener.events if event.get("prompt_tokens") == 7]
    assert counted.index("m") <= 2, "it did not wait for all of the other client's"


def test_counts_are_limited_like_other_controls(bus: Bus) -> None:
    bus.worker(limits__max_requests_per_minute=3)
    for number in range(4):
        bus.control("count_tokens", prompt="x", transaction=f"t{number}")
    assert bus.listener.until(type="ack", transaction="t2")["status"] == "ok"
    assert bus.listener.until(type="ack", transaction="t3")["code"] == "rate_limited"


def test_a_worker_that_ends_does_not_wait_for_counts(bus: Bus) -> None:
    class Patient(ScriptedEngine):
        counting = threading.Event()

        def count_tokens(self, call: EngineCall, *, stop: Any) -> int | None:
            self.counting.set()
            assert stop.wait(60)
            stop.raise_if_set()
            return None

    engine = Patient()
    worker = bus.worker(engine)
    bus.control("count_tokens", prompt="x", transaction="runs")
    eventually(engine.counting.is_set)
    bus.control("count_tokens", prompt="x", transaction="waits")
    bus.control("ping")
    bus.listener.until(type="ack", action="ping")
    worker.daemon.stop()
    for transaction in ("runs", "waits"):
        assert bus.listener.until(type="ack", transaction=transaction)["code"] == "shutting_down"
