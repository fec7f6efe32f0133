"""Who may wait, who goes first, and who is told to come back."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def _hold_the_slot(bus: Bus, engine: ScriptedEngine) -> Gate:
    gate = Gate()
    engine.play(gate, "held")
    bus.ask("hold", request_id="holder", session="holder")
    eventually(gate.reached.is_set)
    return gate


def _ends(bus: Bus) -> list[str]:
    return [event["request_id"] for event in bus.listener.events if event.get("final")]


def _starts(bus: Bus) -> list[str]:
    return [event["request_id"] for event in bus.listener.events if event.get("type") == "start"]


def test_a_full_queue_refuses_with_busy_and_says_when_to_try_again(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=2)
    gate = _hold_the_slot(bus, engine)
    for number in range(3):
        bus.ask("x", request_id=f"r{number}", session=f"s{number}")
    error = bus.listener.terminal("r2")
    assert (error["code"], error["retryable"]) == ("busy", True)
    assert error["retry_after_s"] >= 1
    gate.open()
    assert bus.listener.terminal("r1")["type"] == "done"


def test_the_lowest_lane_is_refused_first_and_the_highest_runs_first(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=2, routes__default__max_priority="interactive")
    gate = _hold_the_slot(bus, engine)
    bus.ask("x", request_id="batch", session="ada/1", priority="batch")
    bus.ask("x", request_id="normal", session="ada/2")
    bus.ask("x", request_id="interactive", session="ada/3", priority="interactive")
    assert bus.listener.terminal("batch")["code"] == "busy"
    gate.open()
    bus.listener.terminal("normal")
    # A slot is free before the end of its request is in the journal, so that one's end may come after the next one's.
    assert _starts(bus) == ["holder", "interactive", "normal"]


def _chat(bus: Bus, number: int, **fields: Any) -> str:
    request_id = f"chat{number}"
    bus.ask("hello", request_id=request_id, session=f"modest/{number}", **fields)
    bus.listener.until(request_id=request_id)
    return request_id


def _flood(bus: Bus, requests: Iterable[int], **fields: Any) -> list[str]:
    ids = [f"flood{number}" for number in requests]
    for number, request_id in enumerate(ids):
        bus.ask("x", request_id=request_id, session=f"greedy/{request_id}-{number}", **fields)
    for request_id in ids:
        bus.listener.until(request_id=request_id)
    return ids


def _codes(bus: Bus, ids: Iterable[str]) -> list[str]:
    return [str(event.get("code", event["type"])) for event in map(bus.listener.terminal, ids)]


def test_a_client_that_floods_the_queue_shuts_nobody_else_out(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=8)
    gate = _hold_the_slot(bus, engine)
    flood = _flood(bus, range(10))
    assert _codes(bus, flood[8:]) == ["busy", "busy"]
    chat = []
    for number in range(4):
        chat.append(_chat(bus, number))
        flood += _flood(bus, range(100 + 50 * number, 150 + 50 * number))
    gate.open()
    assert _codes(bus, chat) == ["done"] * 4
    ends = _codes(bus, flood)
    assert set(ends) == {"busy", "done"}
    assert ends.count("done") == 4
    assert "holds fewer" in bus.listener.terminal("flood7")["message"]


def test_a_flood_of_urgent_requests_ends_nobody_elses(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=8, routes__default__max_priority="interactive")
    gate = _hold_the_slot(bus, engine)
    chat = [_chat(bus, number, priority="batch") for number in range(4)]
    flood = _flood(bus, range(100), priority="interactive")
    gate.open()
    assert _codes(bus, chat) == ["done"] * 4
    assert _codes(bus, flood).count("done") == 4


def test_an_urgent_request_that_finds_the_queue_full_takes_an_own_place(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=4, routes__default__max_priority="interactive")
    gate = _hold_the_slot(bus, engine)
    flood = _flood(bus, range(2))
    chat = [_chat(bus, number, priority="batch") for number in range(2)]
    urgent = _chat(bus, 2, priority="interactive")
    gate.open()
    assert _codes(bus, [*flood, chat[0], urgent]) == ["done"] * 4
    error = bus.listener.terminal(chat[1])
    assert (error["code"], error["retryable"]) == ("busy", True)
    assert "more urgent request of yours" in error["message"]


def test_large_requests_of_one_client_leave_room_for_those_of_others(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1, n_ctx=None)
    bus.worker(engine, limits__max_queue_mib=1)
    gate = _hold_the_slot(bus, engine)
    large = "word " * 60_000
    for number in range(4):
        bus.ask(large, request_id=f"flood{number}", session=f"greedy/{number}", max_tokens=1)
    assert bus.listener.terminal("flood3")["code"] == "busy"
    bus.ask(large, request_id="chat0", session="modest", max_tokens=1)
    assert bus.listener.terminal("flood2")["code"] == "busy"
    gate.open()
    assert _codes(bus, ["flood0", "flood1", "chat0"]) == ["done"] * 3


def test_a_request_that_lost_its_place_is_not_run_after_a_restart(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine, limits__queue_size=2, limits__drain_timeout_s=0)
    _hold_the_slot(bus, engine)
    _flood(bus, range(2))
    chat = _chat(bus, 0)
    assert bus.listener.terminal("flood1")["code"] == "busy"
    worker.stop()
    bus.worker(ScriptedEngine())
    assert _codes(bus, [chat, "flood0"]) == ["done", "done"]
    assert [event["code"] for event in bus.listener.of("flood1") if event.get("final")] == ["busy"]


def test_slots_are_shared_in_turn_between_first_topic_levels(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    for number in range(3):
        bus.ask("x", request_id=f"greedy{number}", session=f"greedy/s{number}")
    bus.ask("x", request_id="modest", session="modest/s")
    gate.open()
    bus.listener.terminal("greedy2")
    assert _ends(bus).index("modest") <= 2


def test_positions_are_told_as_they_change(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    second = Gate()
    engine.play(second)
    bus.ask("x", request_id="r1", session="a")
    bus.ask("x", request_id="r2", session="b")
    assert bus.listener.until(type="queued", request_id="r2")["position"] == 2
    gate.open()
    assert bus.listener.until(type="queued", request_id="r2", position=1)
    second.open()
    bus.listener.terminal("r2")


def test_answers_that_are_being_paced_count_among_those_that_wait(bus: Bus) -> None:
    bus.worker(
        ScriptedEngine(slots=1), limits__queue_size=3, streaming__mode="simulated", streaming__chunk_interval_s=5
    )
    for number in range(3):
        bus.ask("a long answer to be paced out", request_id=f"r{number}", session=f"ada/{number}")
        bus.listener.until(type="chunk", request_id=f"r{number}")
    bus.ask("x", request_id="late", session="ada/late")
    assert bus.listener.terminal("late")["code"] == "busy"
    bus.ask("x", request_id="other", session="bob")
    assert bus.listener.until(type="start", request_id="other")


def test_the_whole_queue_is_told_that_the_engine_is_away(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    engine.become("loading", "the model is being loaded")
    eventually(lambda: worker.daemon.parts.registry.wait_reason == "loading")
    bus.ask("x", request_id="r1", session="a")
    bus.ask("x", request_id="r2", session="b")
    assert bus.listener.until(type="queued", request_id="r2")["reason"] == "loading"
    engine.become("ready")
    assert bus.listener.terminal("r2")["type"] == "done"


def test_queued_requests_wait_for_an_unreachable_engine_all_at_once(bus: Bus) -> None:
    settings = EngineSettings(url=f"http://127.0.0.1:{free_port()}", unavailable_after_s=1.0)
    bus.worker(ServerEngine(settings), engine__unavailable_after_s=1)
    began = time.monotonic()
    for number in range(8):
        bus.ask("x", request_id=f"r{number}", session=f"s{number}")
    assert _codes(bus, [f"r{number}" for number in range(8)]) == ["engine_unavailable"] * 8
    assert time.monotonic() - began < 4


def test_queued_requests_run_when_the_engine_comes_back_in_time(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine, engine__unavailable_after_s=30)
    engine.become("unreachable", "nobody listens there")
    eventually(lambda: worker.daemon.parts.registry.engine_away_since)
    for number in range(3):
        bus.ask("x", request_id=f"r{number}", session=f"s{number}")
        assert bus.listener.until(request_id=f"r{number}")["reason"] == "engine_restarting"
    engine.become("ready")
    assert _codes(bus, [f"r{number}" for number in range(3)]) == ["done"] * 3
    eventually(lambda: worker.daemon.parts.registry.engine_away_since is None)


def test_a_refusal_for_want_of_a_place_does_not_count_against_the_rate(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=1, limits__max_requests_per_minute=3)
    gate = _hold_the_slot(bus, engine)
    bus.ask("x", request_id="waits", session="ada/0")
    for number in range(5):
        bus.ask("x", request_id=f"r{number}", session=f"ada/{number + 1}")
        assert bus.listener.terminal(f"r{number}")["code"] == "busy"
    gate.open()
    bus.listener.terminal("waits")
    bus.ask("x", request_id="again", session="ada/1")
    assert bus.listener.terminal("again")["type"] == "done"


def test_rate_limits_count_per_first_topic_level(bus: Bus) -> None:
    bus.worker(limits__max_requests_per_minute=2)
    for number in range(3):
        bus.ask("x", request_id=f"r{number}", session=f"ada/s{number}")
    error = bus.listener.terminal("r2")
    assert error["code"] == "rate_limited"
    assert 0 < error["retry_after_s"] <= 60
    bus.ask("x", request_id="other", session="bob/s")
    assert bus.listener.terminal("other")["type"] == "done"


def test_time_limits_count_the_waiting(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    bus.ask("x", request_id="r1", session="a", timeout_s=0.3)
    error = bus.listener.terminal("r1", timeout_s=3)
    assert error["code"] == "timeout"
    assert "waited" in error["message"]
    gate.open()


def test_a_running_request_over_its_limit_ends_with_timeout_and_its_text(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play("so far", Silence())
    bus.worker(engine)
    bus.ask("x", request_id="r1", timeout_s=0.5)
    error = bus.listener.terminal("r1", timeout_s=3)
    assert (error["code"], error["partial_content"]) == ("timeout", "so far")


def test_the_remaining_message_expiry_is_a_time_limit_too(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play(Silence())
    bus.worker(engine)
    bus.sender.publish("llm/request/demo", b'{"prompt":"x","request_id":"r1"}', expiry_s=0.5)
    assert bus.listener.terminal("r1", timeout_s=3)["code"] == "timeout"


def test_an_engine_that_falls_silent_ends_in_idle_timeout(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play("so far", Silence())
    bus.worker(engine, engine__chunk_timeout_s=0.3)
    bus.ask("x", request_id="r1")
    error = bus.listener.terminal("r1", timeout_s=3)
    assert (error["code"], error["retryable"], error["partial_content"]) == ("idle_timeout", True, "so far")


def test_a_change_of_place_is_told_at_most_once_a_second(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play(Silence())
    worker = bus.worker(engine)
    worker.daemon.parts.loop.close()  # the deadlines go when this test says so
    bus.ask("running", request_id="r0", session="s0")
    for number in range(1, 6):
        eventually(lambda: len(engine.calls) == 1)
        bus.ask("waits", request_id=f"r{number}", session=f"s{number}")
        bus.listener.until(type="queued", request_id=f"r{number}")
    deadlines = worker.daemon.parts.deadlines
    deadlines._positions_at = 0.0
    for number in range(1, 5):
        bus.control("cancel", session=f"s{number}", request_id=f"r{number}")
        bus.listener.terminal(f"r{number}")
        deadlines.check()
    places = [event["position"] for event in bus.listener.of("r5") if event["type"] == "queued"]
    assert places == [5, 4]
    deadlines._positions_at = 0.0  # a second later
    deadlines.check()
    bus.listener.until(type="queued", request_id="r5", position=1)


def test_a_defect_with_one_request_does_not_cost_the_others_their_time_limit(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(slots=2)
    engine.play(Silence())
    engine.play(Silence())
    worker = bus.worker(engine)
    bus.ask("one", request_id="r1", session="a")
    bus.listener.until(type="start", request_id="r1")
    job = worker.daemon.parts.registry.all()[0]

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(job.stop, "is_set", broken)
    bus.ask("two", request_id="r2", session="b", timeout_s=0.3)
    assert bus.listener.terminal("r2")["code"] == "timeout"
    monkeypatch.undo()


def test_the_timings_tell_the_waiting_the_first_token_and_the_whole(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    first, rest = Gate(), Gate()
    engine.play(first, "one ", rest, "two")
    asked_at = time.monotonic()
    bus.ask("x", request_id="r1", session="a")
    bus.listener.until(type="queued", request_id="r1")

    def pass_ms(ms: float) -> None:
        began = time.monotonic()
        eventually(lambda: time.monotonic() - began >= ms / 1000)

    pass_ms(60)
    gate.open()
    assert bus.listener.until(type="start", request_id="r1")["model"] == "scripted"
    pass_ms(60)
    first.open()
    bus.listener.until(type="chunk", request_id="r1")
    pass_ms(60)
    rest.open()
    timings = bus.listener.terminal("r1")["timings"]
    whole_ms = (time.monotonic() - asked_at) * 1000
    assert timings["queue_ms"] >= 60
    assert timings["first_token_ms"] >= timings["queue_ms"] + 60
    assert timings["total_ms"] >= timings["first_token_ms"] + 60
    assert timings["total_ms"] <= whole_ms
