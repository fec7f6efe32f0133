"""Controls of one client, however many they are and however slow the disk is, cost no other client anything."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, Event, WholeWorker


class SlowDisk:
    """Holds a method of the worker's store for one client's sessions, until `open`."""

    def __init__(self, worker: WholeWorker, patch: pytest.MonkeyPatch, method: str, level: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        store = worker.daemon.parts.store
        real = getattr(store, method)

        def slow(key: Any, *args: Any, **more: Any) -> Any:
            session = getattr(key, "session", None) or key[1]
            if session.split("/")[0] == level:
                self.reached.set()
                assert self.open.wait(60)
            return real(key, *args, **more)

        patch.setattr(store, method, slow)


def _ack(bus: Bus, action: str, session: str, **fields: Any) -> Event:
    return bus.listener.until(type="ack", action=action, session_id=session, **fields)


def _remember(bus: Bus, session: str, text: str = "remember me") -> None:
    bus.ask(text, request_id=f"first-{session.replace('/', '-')}", session=session)
    bus.listener.terminal(f"first-{session.replace('/', '-')}")


def _chats(bus: Bus, numbers: Iterable[int]) -> None:
    for number in numbers:
        bus.ask("hello", request_id=f"chat{number}", session="modest/1")
        assert bus.listener.terminal(f"chat{number}")["type"] == "done"


@pytest.mark.parametrize("action", ["history", "reset", "delete"])
def test_a_control_that_waits_for_the_disk_holds_up_no_other_client(
    bus: Bus, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()
    _remember(bus, "greedy/1")
    disk = SlowDisk(worker, monkeypatch, action, "greedy")
    bus.control(action, session="greedy/1")
    eventually(disk.reached.is_set)
    bus.control("ping", session="modest/1")
    assert _ack(bus, "ping", "modest/1")["status"] == "ok"
    _chats(bus, range(3))
    disk.open.set()
    assert _ack(bus, action, "greedy/1")["status"] == "ok"


def test_a_cancel_whose_end_waits_for_the_disk_holds_up_no_other_client(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(slots=2)
    worker = bus.worker(engine)
    gate = Gate()
    engine.play(gate)
    bus.ask("x", request_id="runs", session="greedy/1")
    eventually(gate.reached.is_set)
    for number in range(4):
        bus.ask("x", request_id=f"waits{number}", session="greedy/1")
        bus.listener.until(type="queued", request_id=f"waits{number}")
    disk = SlowDisk(worker, monkeypatch, "finish", "greedy")
    bus.control("cancel", session="greedy/1")
    assert _ack(bus, "cancel", "greedy/1")["cancelled"] == 5
    eventually(disk.reached.is_set)
    bus.control("ping", session="modest/1")
    assert _ack(bus, "ping", "modest/1")["status"] == "ok"
    disk.open.set()
    for request_id in ("runs", *(f"waits{number}" for number in range(4))):
        assert bus.listener.terminal(request_id)["finish_reason"] == "cancelled"


def test_a_prompt_after_a_reset_waits_until_the_history_is_forgotten(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine)
    _remember(bus, "ada/1")
    disk = SlowDisk(worker, monkeypatch, "reset", "ada")
    bus.control("reset", session="ada/1")
    bus.ask("and now?", request_id="after", session="ada/1")
    eventually(disk.reached.is_set)
    assert bus.listener.until(request_id="after")["type"] == "queued"
    assert len(engine.calls) == 1
    disk.open.set()
    assert bus.listener.terminal("after")["type"] == "done"
    assert [message["content"] for message in engine.calls[-1].messages] == ["and now?"]


def test_a_reset_cancels_what_runs_and_waits_before_the_history_goes(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    _remember(bus, "ada/1")
    engine.play("so far", Gate())
    bus.ask("x", request_id="runs", session="ada/1")
    bus.listener.until(type="chunk", request_id="runs")
    bus.ask("x", request_id="waits", session="ada/1")
    bus.listener.until(type="queued", request_id="waits")
    bus.control("reset", session="ada/1")
    assert _ack(bus, "reset", "ada/1")["cancelled"] == 2
    for request_id in ("runs", "waits"):
        assert bus.listener.terminal(request_id)["finish_reason"] == "cancelled"
    bus.ask("next", request_id="next", session="ada/1")
    bus.listener.terminal("next")
    assert len(worker.daemon.parts.store.history(("default", "ada/1"))) == 2


def test_a_session_gets_one_history_at_a_time(bus: Bus) -> None:
    bus.worker()
    _remember(bus, "ada/1")
    bus.broker.hold_pubacks()
    for number in range(3):
        bus.control("history", session="ada/1", transaction=f"t{number}")
    assert len(_ack(bus, "history", "ada/1", transaction="t0")["messages"]) == 2
    for number in (1, 2):
        refused = _ack(bus, "history", "ada/1", transaction=f"t{number}")
        assert (refused["status"], refused["code"]) == ("error", "busy")
        assert refused["retry_after_s"] > 0
    bus.broker.release_pubacks()

    def again() -> bool:
        bus.control("history", session="ada/1", transaction="again")
        return any(
            event.get("transaction") == "again" and event["status"] == "ok" for event in bus.listener.events
        ) or (bus.listener.pull(1.0) is None)

    eventually(again)


def test_a_flood_of_histories_is_bounded_and_ends_nobody_elses_requests(bus: Bus) -> None:
    bus.worker(sessions__max_sessions=1000)
    for number in range(10):
        _remember(bus, f"greedy/{number}", "word " * 2000)
    _remember(bus, "modest/1")
    for number in range(2000):
        bus.control("history", session=f"greedy/{number % 10}")
        if number % 200 == 0:
            _chats(bus, [number])
    bus.control("history", session="modest/1")
    assert _ack(bus, "history", "modest/1")["status"] == "ok"
    bus.control("ping", session="greedy/0")
    _ack(bus, "ping", "greedy/0")
    answers = [e for e in bus.listener.events if e.get("action") == "history" and e["session_id"].startswith("greedy")]
    shown = [event for event in answers if event["status"] == "ok"]
    assert 1 <= len(shown) <= 70
    assert {event["code"] for event in answers if event["status"] == "error"} <= {"busy", "rate_limited"}


def test_a_flood_of_resets_holds_up_another_clients_reset_by_one_at_most(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()
    disk = SlowDisk(worker, monkeypatch, "reset", "greedy")
    for number in range(40):
        bus.control("reset", session=f"greedy/{number}")
    bus.control("reset", session="modest/1")
    bus.control("ping", session="modest/1")
    _ack(bus, "ping", "modest/1")
    refused = _ack(bus, "reset", "greedy/39")
    assert (refused["status"], refused["code"]) == ("error", "busy")
    disk.open.set()
    assert _ack(bus, "reset", "modest/1")["status"] == "ok"
    _ack(bus, "reset", "greedy/10", status="ok")
    done = [e["session_id"] for e in bus.listener.events if e.get("action") == "reset" and e["status"] == "ok"]
    assert done.index("modest/1") <= 2


def test_controls_count_against_the_rate_of_their_own_client(bus: Bus) -> None:
    bus.worker(limits__max_requests_per_minute=10)
    for number in range(30):
        bus.control("ping", session="greedy/1", transaction=f"t{number}")
    bus.sender.publish("llm/control/greedy/1", b'{"action":"explode","transaction":"bad"}')
    assert _ack(bus, "ping", "greedy/1", transaction="t9")["status"] == "ok"
    refused = _ack(bus, "ping", "greedy/1", transaction="t29")
    assert (refused["status"], refused["code"]) == ("error", "rate_limited")
    assert refused["retry_after_s"] > 0
    assert bus.listener.until(type="ack", status="error", action=None)["code"] == "rate_limited"
    bus.ask("x", request_id="r1", session="greedy/1")
    assert bus.listener.terminal("r1")["code"] == "rate_limited"
    bus.control("ping", session="modest/1")
    assert _ack(bus, "ping", "modest/1")["status"] == "ok"
    _chats(bus, range(3))


def test_whoever_has_used_up_his_rate_can_still_cancel_what_he_sent(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__max_requests_per_minute=3)
    engine.play(Gate())
    for number in range(3):
        bus.ask("x", request_id=f"r{number}", session=f"ada/{number}")
    for number in range(3):
        bus.control("cancel", session=f"ada/{number}", request_id=f"r{number}")
    for number in range(3):
        assert bus.listener.terminal(f"r{number}")["finish_reason"] == "cancelled"
    bus.control("cancel", session="ada/0", request_id="r0")
    assert bus.listener.until(type="ack", action="cancel", status="error")["code"] == "rate_limited"


def test_a_flood_of_bad_messages_leaves_a_few_lines_in_the_log(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    worker = bus.worker()
    for number in range(100):
        bus.sender.publish("llm/request/greedy", b'{"prompt": 3}')
        bus.ask("x", request_id=f"forbidden{number}", session="greedy", model="none")
        bus.control("explode", session="greedy")
        bus.sender.publish("llm/request/greedy/too/deep", b"x")
    bus.sender.publish("llm/request/modest", b'{"prompt": 3, "request_id": "mine"}')
    bus.control("ping", session="greedy", transaction="last")
    _ack(bus, "ping", "greedy", transaction="last")
    told = capsys.readouterr().out
    assert told.count("control.answered") == 20
    assert told.count("request.refused") == 21
    assert told.count("llm/request/modest") == 1
    worker.daemon.parts.message_log.tell(time.monotonic() + 10)
    after = capsys.readouterr().out
    assert "81 more suppressed" in after
    assert "180 more suppressed" in after


def test_two_clients_where_one_floods_with_everything(bus: Bus) -> None:
    bus.worker(ScriptedEngine(slots=1), limits__queue_size=16, routes__default__max_priority="interactive")
    actions = ["cancel", "history", "reset", "delete", "ping"]
    for number in range(1000):
        session = f"greedy/{number % 7}"
        bus.ask("x", request_id=f"flood{number}", session=session, priority="interactive")
        bus.control(actions[number % 5], session=session, request_id=f"none{number}")
        bus.sender.publish(f"llm/request/{session}", b'{"prompt": 3')
        if number % 50 == 0:
            _chats(bus, [number])
    _chats(bus, [1000])
    mine = [event for event in bus.listener.events if event.get("session_id") == "modest/1"]
    assert not [event for event in mine if event["type"] == "error"]
    history = json.dumps({"action": "history"}).encode()
    bus.sender.publish("llm/control/modest/1", history)
    assert _ack(bus, "history", "modest/1")["messages"]
