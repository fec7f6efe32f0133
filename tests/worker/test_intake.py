"""From the broker to the queue: bursts, defects and a journal that fails, and what each request is told of it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.ports import Delivery, EntryKey, StoreError
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.control import Controls
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker
from tests.worker.test_inbox import SlowJournal


def _hold_the_slot(bus: Bus, engine: ScriptedEngine) -> Gate:
    gate = Gate()
    engine.play(gate, "held")
    bus.ask("hold", request_id="holder", session="holder")
    eventually(gate.reached.is_set)
    return gate


def _all_acknowledged(bus: Bus, worker: WholeWorker) -> None:
    eventually(lambda: bus.broker.unacknowledged(worker.client_id) == 0)


# --- before they are read ----------------------------------------------------------------------------------------------


def test_only_requests_are_announced_to_the_engine(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine)
    bus.control("ping", transaction="1")
    bus.admin("ping")
    for topic in ("llm/request/a/too/deep", "llm/other/demo", "llm/request/" + "x" * 300):
        bus.sender.publish(topic, b"{}")
    bus.listener.until(type="ack", transaction="1")
    _all_acknowledged(bus, worker)
    assert engine.expected == 0
    bus.ask("one", request_id="r1")
    bus.ask(temperature="hot", request_id="r2")  # nobody knows yet that it is no good one
    assert bus.listener.terminal("r1")["type"] == "done"
    assert bus.listener.terminal("r2")["type"] == "error"
    assert engine.expected == 2


# --- bursts ------------------------------------------------------------------------------------------------------------


def test_requests_of_a_burst_share_one_write_of_at_most_64(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine, limits__queue_size=200)
    gate = _hold_the_slot(bus, engine)
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("first", request_id="first", session="first")
    assert journal.reached.wait(10)
    accept, writes = worker.daemon.parts.store.accept_soon, list[int]()

    def noted(entries: Any, **how: Any) -> Any:
        writes.append(len(entries))
        return accept(entries, **how)

    monkeypatch.setattr(worker.daemon.parts.store, "accept_soon", noted)
    for number in range(70):
        bus.ask("x", request_id=f"r{number}", session=f"s{number}")
    eventually(lambda: worker.daemon.parts.intake.waiting == 70)
    journal.open.set()
    for number in range(70):
        bus.listener.until(request_id=f"r{number}")
    assert writes == [1, 64, 6]
    gate.open()
    assert bus.listener.terminal("r69")["type"] == "done"


def test_a_control_in_a_burst_sees_the_requests_before_it_and_not_those_after_it(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("first", request_id="first", session="first")
    assert journal.reached.wait(10)
    bus.ask("before", request_id="before")
    bus.control("cancel")
    bus.ask("after", request_id="after")
    eventually(lambda: worker.daemon.parts.intake.waiting == 3)
    journal.open.set()
    assert bus.listener.until(type="ack", action="cancel")["cancelled"] == 1
    gate.open()
    assert bus.listener.terminal("before")["finish_reason"] == "cancelled"
    assert bus.listener.terminal("after")["finish_reason"] == "stop"


def test_a_request_twice_in_one_burst_is_told_of_once(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("first", request_id="first", session="first")
    assert journal.reached.wait(10)
    for _ in range(3):
        bus.ask("x", request_id="r1")
    eventually(lambda: worker.daemon.parts.intake.waiting == 3)
    journal.open.set()
    _all_acknowledged(bus, worker)
    assert [event["type"] for event in bus.listener.of("r1")] == ["queued"]
    gate.open()
    bus.listener.terminal("r1")
    assert len(engine.calls) == 3


# --- time --------------------------------------------------------------------------------------------------------------


def test_the_time_that_a_request_has_left_is_in_the_journal_as_it_is_here(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from its receipt: what it waited to be read is gone."""
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("x", request_id="r1", timeout_s=50)
    assert journal.reached.wait(10)
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began >= 0.3)
    journal.open.set()
    bus.listener.until(type="queued", request_id="r1")
    key = EntryKey("default", "demo", "r1")
    job, entry = worker.daemon.parts.registry.find(key), worker.daemon.parts.store.find(key)
    assert job is not None
    assert entry is not None
    assert entry.expires_at is not None
    assert job.deadline - job.received_at == pytest.approx(50.0)
    assert entry.expires_at - entry.accepted_at <= 49.7
    left_here_s, left_there_s = job.deadline - time.monotonic(), entry.expires_at - time.time()
    assert left_there_s == pytest.approx(left_here_s, abs=0.5)
    gate.open()


@pytest.mark.parametrize("timeout_s, expiry_s, limit_s", [(50, 20.0, 20.0), (20, 50.0, 20.0)])
def test_the_shorter_one_of_two_time_limits_holds(bus: Bus, timeout_s: int, expiry_s: float, limit_s: float) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    payload = b'{"prompt":"x","request_id":"r1","timeout_s":%d}' % timeout_s
    bus.sender.publish("llm/request/demo", payload, expiry_s=expiry_s)
    bus.listener.until(type="queued", request_id="r1")
    job = worker.daemon.parts.registry.find(EntryKey("default", "demo", "r1"))
    assert job is not None
    assert limit_s - 5 < job.deadline - job.received_at <= limit_s
    gate.open()


# --- told again --------------------------------------------------------------------------------------------------------


def test_who_sends_a_waiting_request_again_hears_its_place(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine)
    gate = _hold_the_slot(bus, engine)
    for number in (1, 2):
        bus.ask("x", request_id=f"r{number}", session=f"s{number}")
        bus.listener.until(type="queued", request_id=f"r{number}")
    bus.ask("x", request_id="r2", session="s2")
    eventually(lambda: len(bus.listener.of("r2")) == 2)
    assert [(event["type"], event["position"]) for event in bus.listener.of("r2")] == [("queued", 2)] * 2
    gate.open()


def test_who_loses_his_place_is_told_when_to_come_back(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    bus.worker(engine, limits__queue_size=2)
    gate = _hold_the_slot(bus, engine)
    for number in range(2):
        bus.ask("x", request_id=f"greedy{number}", session=f"greedy/{number}")
        bus.listener.until(type="queued", request_id=f"greedy{number}")
    bus.ask("x", request_id="modest", session="modest")
    error = bus.listener.terminal("greedy1")
    assert (error["code"], error["retry_after_s"]) == ("busy", 10.0)
    gate.open()


def test_correlation_data_of_the_message_goes_with_the_end_that_is_told_again(bus: Bus) -> None:
    bus.worker()
    payload = b'{"prompt":"x","request_id":"r1"}'
    for correlation in (b"one", b"two"):
        bus.sender.publish("llm/request/demo", payload, correlation=correlation)
        eventually(lambda correlation=correlation: _ends(bus, correlation))  # type: ignore[misc]


def _ends(bus: Bus, correlation: bytes) -> bool:
    bus.listener.of("r1")
    return any(b'"done"' in each.payload and each.correlation == correlation for each in bus.listener.deliveries)


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def _broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a defect")


def _refuse(*_: object, **__: object) -> Any:
    raise StoreError("no space left")


@pytest.mark.parametrize("how, message", [(_broken, "its log says why"), (_refuse, "cannot write its journal")])
def test_a_request_that_the_journal_does_not_take_ends_at_once_is_acknowledged_and_forgotten(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, how: Any, message: str
) -> None:
    engine = ScriptedEngine(slots=1)
    worker = bus.worker(engine, limits__queue_size=2)
    gate = _hold_the_slot(bus, engine)
    for number in range(2):
        bus.ask("x", request_id=f"greedy{number}", session=f"greedy/{number}")
        bus.listener.until(type="queued", request_id=f"greedy{number}")
    with monkeypatch.context() as patch:
        patch.setattr(worker.daemon.parts.store, "accept_soon", how)
        bus.ask("x", request_id="r1")
        error = bus.listener.terminal("r1")
        assert error["code"] == "internal"
        assert message in error["message"]
        assert bus.listener.terminal("greedy1")["code"] == "busy", "its place was given away all the same"
    _all_acknowledged(bus, worker)
    assert worker.daemon.parts.store.history(("default", "demo")) == ()
    gate.open()
    bus.ask("x", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"
    assert worker.daemon.parts.counters.snapshot(period_s=1.0)["requests"]["accepted"] == 4  # type: ignore[index]


def test_a_request_is_not_run_twice_where_the_journal_cannot_say_whether_it_ran(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine)
    with monkeypatch.context() as patch:
        patch.setattr(worker.daemon.parts.store, "find", _refuse)
        bus.ask("x", request_id="r1")
        error = bus.listener.terminal("r1")
        assert (error["code"], "nothing was run" in error["message"]) == ("internal", True)
    assert not engine.calls
    _all_acknowledged(bus, worker)


def test_a_defect_with_one_message_costs_no_other_and_the_broker_hears_that_it_came(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()
    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(Controls, "handle", _broken)
        bus.control("ping")
        bus.ask("x", request_id="r1")
        assert bus.listener.terminal("r1")["type"] == "done"
    assert [line["topic"] for line in lines if line["event"] == "intake.failed"] == ["llm/control/demo"]
    _all_acknowledged(bus, worker)


def test_what_is_not_read_is_left_to_the_broker_when_a_worker_stops_before_it_began(bus: Bus) -> None:
    worker = bus.worker()
    intake = worker.daemon.parts.intake
    assert worker.stop() == 0
    assert not intake._thread.is_alive()


def test_ignored_messages_leave_a_line_that_says_why(bus: Bus) -> None:
    worker = bus.worker()
    with capture_logs() as lines:
        bus.sender.publish("llm/request/a b", b"x")
        kept = Delivery(topic="llm/request/kept", payload=b"x", qos=1, retain=True)
        assert worker.daemon.parts.intake.offer(kept)
        bus.ask("x", request_id="r1")
        bus.listener.terminal("r1")
    told = {line["topic"]: line["reason"] for line in lines if line["event"] == "message.ignored"}
    assert told == {
        "llm/request/a b": "no session path of the protocol",
        "llm/request/kept": "retained: requests are not kept",
    }


def test_the_watchdog_sees_the_intake_come_round(bus: Bus) -> None:
    worker = bus.worker()
    intake = worker.daemon.parts.intake
    began = intake.beat_at = time.monotonic() - 100
    bus.ask("x", request_id="r1")
    eventually(lambda: intake.beat_at > began)


def test_a_refusal_never_goes_to_a_session_that_only_the_payload_names(bus: Bus) -> None:
    bus.worker()
    payload = b'{"prompt":"x","request_id":"r1","session_id":"bob","temperature":"hot"}'
    bus.sender.publish("llm/request/ada", payload)
    error = bus.listener.terminal("r1")
    assert (error["_topic"], error["session_id"]) == ("llm/reply/ada", "ada")


def test_a_worker_that_stops_before_it_has_its_place_on_the_bus_reads_nothing(bus: Bus) -> None:
    settings = {"sessions.path": str(bus.state / "state.db"), "mqtt.worker_id": "w1"}
    worker = WholeWorker(broker=bus.broker, engine=ScriptedEngine(), settings=settings)
    intake = worker.daemon.parts.intake
    intake.start()
    assert intake.offer(Delivery(topic="llm/request/demo", payload=b"hi", qos=1))
    intake.close(10)
    assert not intake._thread.is_alive()
    assert intake.waiting == 1
