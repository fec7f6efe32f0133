"""Controls of one client, however many they are and however slow the disk is, cost no other client anything."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange, Published
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.client_work import ClientWork
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, Event, WholeWorker
from tests.worker.test_background import HeldStore


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


def test_a_reset_that_finds_no_place_in_the_end_stops_nothing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    _remember(bus, "ada/1")
    gate = Gate()
    engine.play("so far", gate, " and on")
    bus.ask("x", request_id="runs", session="ada/1")
    bus.listener.until(type="chunk", request_id="runs")
    bus.ask("x", request_id="waits", session="ada/1")
    bus.listener.until(type="queued", request_id="waits")
    # It is closed after it was asked whether it has a place.
    monkeypatch.setattr(worker.daemon.parts.client_work, "run", lambda *_: False)
    bus.control("reset", session="ada/1")
    assert _ack(bus, "reset", "ada/1")["code"] == "busy"
    monkeypatch.undo()
    gate.open()
    assert bus.listener.terminal("runs")["full_content"] == "so far and on"
    assert bus.listener.terminal("waits")["finish_reason"] == "stop"
    bus.control("history", session="ada/1")
    assert len(_ack(bus, "history", "ada/1")["messages"]) == 6


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


def test_a_history_that_does_not_fit_into_an_event_loses_its_oldest_messages_and_says_so(bus: Bus) -> None:
    worker = bus.worker(limits__max_event_bytes=1024)
    for number in range(5):
        change = HistoryChange(
            session=("default", "demo"),
            append=tuple({"role": role, "content": f"{number} " + "w" * 90} for role in ("user", "assistant")),
        )
        worker.daemon.parts.store.finish(EntryKey("default", "demo", f"before{number}"), b"{}", now=1.0, history=change)
    bus.control("history", transaction="t")
    ack = bus.listener.until(type="ack", action="history")
    assert (ack["status"], ack["transaction"]) == ("ok", "t")
    assert "oldest messages are left out" in ack["message"]
    numbers = [int(message["content"][0]) for message in ack["messages"]]
    assert numbers == [2, 2, 3, 3, 4, 4], "a quarter at a time: ten, eight, six"
    assert len(bus.listener.deliveries[-1].payload) <= 1024
    bus.control("history", session="short")
    assert "message" not in bus.listener.until(type="ack", session_id="short")


def test_no_more_messages_are_left_out_of_a_short_history_than_have_to_be(bus: Bus) -> None:
    worker = bus.worker(limits__max_event_bytes=1024)
    append = tuple({"role": "user", "content": letter * size} for letter, size in (("a", 600), ("b", 300), ("c", 300)))
    change = HistoryChange(session=("default", "demo"), append=append)
    worker.daemon.parts.store.finish(EntryKey("default", "demo", "before"), b"{}", now=1.0, history=change)
    bus.control("history")
    ack = bus.listener.until(type="ack", action="history")
    assert [message["content"][0] for message in ack["messages"]] == ["b", "c"]


def test_a_history_of_one_message_that_does_not_fit_is_left_out_altogether(bus: Bus) -> None:
    worker = bus.worker(limits__max_event_bytes=1024)
    change = HistoryChange(session=("default", "demo"), append=({"role": "user", "content": "w" * 2000},))
    worker.daemon.parts.store.finish(EntryKey("default", "demo", "before"), b"{}", now=1.0, history=change)
    bus.control("history")
    ack = bus.listener.until(type="ack", action="history")
    assert ack["messages"] == []
    assert "oldest messages are left out" in ack["message"]


def _ack_again(bus: Bus, action: str, transaction: str) -> Event:
    """Ask until it is not too early any more."""

    def answered() -> bool:
        bus.control(action, transaction=transaction)
        eventually(lambda: bus.listener.of("") == [] and any(_is(event) for event in bus.listener.events))
        return any(_is(event) and event["status"] == "ok" for event in bus.listener.events)

    def _is(event: Event) -> bool:
        return event.get("transaction") == transaction

    eventually(answered)
    return bus.listener.until(transaction=transaction, status="ok")


@pytest.mark.parametrize("how", ["no room", "full"])
def test_an_answer_that_finds_no_room_is_given_up_and_the_next_one_comes(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    worker = bus.worker()
    link = worker.daemon.parts.link
    waits_s: list[float] = []
    room, publish = link.room_for_answers, link.publish

    def no_room(largest: int, *, timeout_s: float = 0.0) -> int:
        if threading.current_thread().name != "client-work":
            return room(largest, timeout_s=timeout_s)
        waits_s.append(timeout_s)
        return 0 if how == "no room" else 1

    def full(topic: str, payload: bytes, **more: Any) -> Published:
        return "full" if threading.current_thread().name == "client-work" else publish(topic, payload, **more)

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(link, "room_for_answers", no_room)
        patch.setattr(link, "publish", full)
        bus.control("history", transaction="lost")
        bus.control("reset")
        eventually(lambda: sum(line["event"] == "control.unanswered" for line in lines) == 2)
    assert waits_s == [10.0, 10.0], "longer its client does not wait"
    assert _ack_again(bus, "history", "again")["messages"] == []
    assert not [event for event in bus.listener.events if event.get("transaction") == "lost"]


def test_a_history_that_cannot_be_read_for_a_defect_may_be_asked_for_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()

    def broken(*_: object) -> Any:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(worker.daemon.parts.store, "history", broken)
        bus.control("history", transaction="lost")
        eventually(lambda: any(line["event"] == "client_work.failed" for line in lines))
    assert _ack_again(bus, "history", "again")["messages"] == []


@pytest.mark.parametrize("action", ["history", "reset"])
def test_a_control_that_finds_no_place_leaves_nothing_behind(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    bus.worker()
    with monkeypatch.context() as patch:
        patch.setattr(ClientWork, "run", lambda *_: False)
        bus.control(action, transaction="refused")
        refused = bus.listener.until(transaction="refused")
        assert (refused["status"], refused["code"], refused["retry_after_s"]) == ("error", "busy", 1.0)
    bus.ask("hi", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done", "its session is free"
    assert _ack_again(bus, action, "again")["status"] == "ok"


def test_a_ping_names_no_request_and_an_answer_only_what_was_asked(bus: Bus) -> None:
    bus.worker()
    bus.control("ping")
    ack = bus.listener.until(type="ack", action="ping")
    assert not {"request_id", "transaction"} & set(ack)
    bus.control("ping", session="ada/1", transaction="")
    assert bus.listener.until(type="ack", session_id="ada/1")["transaction"] == ""


def test_what_was_cancelled_before_is_not_counted_again(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    disk_full = threading.Event()
    finish = worker.daemon.parts.store.finish

    def slow(*given: Any, **more: Any) -> None:
        assert disk_full.wait(30)
        finish(*given, **more)

    worker.daemon.parts.store.finish = slow  # type: ignore[method-assign]
    engine.play(Gate())
    bus.ask("x", request_id="r1")
    eventually(lambda: engine.busy == 1)
    for transaction, cancelled in (("one", 1), ("two", 0)):
        bus.control("cancel", transaction=transaction)
        assert bus.listener.until(transaction=transaction)["cancelled"] == cancelled
    disk_full.set()
    assert bus.listener.terminal("r1")["finish_reason"] == "cancelled"


@pytest.mark.parametrize("action", ["cancel", "reset"])
def test_what_waits_in_the_queue_ends_at_once_when_it_is_cancelled(bus: Bus, action: str) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    gate = Gate()
    engine.play(gate)
    bus.ask("x", request_id="runs", session="other")
    eventually(gate.reached.is_set)
    bus.ask("x", request_id="waits")
    bus.listener.until(type="queued", request_id="waits")
    worker.daemon.parts.loop.close()  # nobody looks whether something has to end
    bus.control(action)
    assert bus.listener.terminal("waits")["finish_reason"] == "cancelled"
    gate.open()


def test_a_reset_that_is_refused_for_want_of_a_place_changes_nothing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = ScriptedEngine(), Gate()
    worker = bus.worker(engine)
    engine.play("one ", gate, "two")
    bus.ask("x", request_id="r1")
    assert gate.reached.wait(10)
    with monkeypatch.context() as patch:
        patch.setattr(ClientWork, "has_place", lambda *_: False)
        bus.control("reset", transaction="refused")
        assert bus.listener.until(transaction="refused")["code"] == "busy"
    gate.open()
    done = bus.listener.terminal("r1")
    assert (done["finish_reason"], done["full_content"]) == ("stop", "one two")
    assert len(worker.daemon.parts.store.history(("default", "demo"))) == 2


def test_what_is_cancelled_by_a_reset_is_forgotten_also_when_its_end_is_written_after_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine)
    engine.play("a secret", Gate())
    bus.ask("x", request_id="r1")
    bus.listener.until(type="chunk", request_id="r1")
    held = HeldStore(worker, monkeypatch, "finish", matches="r1")
    bus.control("reset")
    assert held.reached.wait(10)
    bus.listener.until(type="ack", action="reset", status="ok")
    held.open.set()
    assert bus.listener.terminal("r1")["full_content"] == "a secret"
    assert worker.daemon.parts.store.history(("default", "demo")) == ()
