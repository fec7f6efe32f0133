"""Sessions, their order and history, and what a client may do to them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import PromptProgress
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.ports import EntryKey, HistoryChange, StoreError
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from llamacpp_mqtt_deploy.worker.jobs import Job
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def _contents(engine: ScriptedEngine) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in engine.calls[-1].messages]


def test_a_prompt_comes_after_the_sessions_history_and_the_system_prompt(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine, generation__system_prompt="Be brief.")
    bus.ask("my name is Ada", request_id="r1")
    bus.ask("what is my name?", request_id="r2")
    bus.listener.terminal("r2")
    assert _contents(engine) == [
        ("system", "Be brief."),
        ("user", "my name is Ada"),
        ("assistant", "my name is Ada"),
        ("user", "what is my name?"),
    ]


def test_new_forgets_the_history_and_a_system_prompt_of_the_request_wins(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine, generation__system_prompt="Be brief.")
    bus.ask("one", request_id="r1")
    bus.ask("two", request_id="r2", new=True, system_prompt="Be long.")
    bus.listener.terminal("r2")
    assert _contents(engine) == [("system", "Be long."), ("user", "two")]
    bus.ask("three", request_id="r3")
    bus.listener.terminal("r3")
    assert _contents(engine)[1:] == [("user", "two"), ("assistant", "two"), ("user", "three")]


def test_messages_are_stateless(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine, generation__system_prompt="Be brief.")
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    bus.ask(None, request_id="r2", messages=[{"role": "user", "content": "alone"}])
    bus.listener.terminal("r2")
    assert _contents(engine) == [("user", "alone")]
    bus.control("history")
    ack = bus.listener.until(type="ack", action="history")
    assert [message["content"] for message in ack["messages"]] == ["one", "one"]


def test_prompts_of_a_session_run_one_at_a_time_in_order_of_arrival(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=4)
    engine.play("first ", gate, "done")
    bus.worker(engine)
    for number in range(4):
        bus.ask(f"prompt {number}", request_id=f"r{number}")
    bus.listener.until(type="chunk", request_id="r0")
    bus.listener.until(type="queued", request_id="r3")
    assert engine.busy == 1
    gate.open()
    bus.listener.terminal("r3")
    ends = [event["request_id"] for event in bus.listener.events if event.get("final")]
    assert ends == ["r0", "r1", "r2", "r3"]


def test_a_fifth_waiting_prompt_of_a_session_is_session_busy(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=2)
    engine.play("first ", gate)
    bus.worker(engine)
    for number in range(6):
        bus.ask(f"prompt {number}", request_id=f"r{number}")
        if number == 0:
            eventually(gate.reached.is_set)
    error = bus.listener.terminal("r5")
    assert (error["code"], error["retryable"]) == ("session_busy", True)
    gate.open()
    assert bus.listener.terminal("r4")["type"] == "done"


def test_history_changes_only_with_done(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play("half", EngineFailed("no"))
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    bus.control("history", transaction="t1")
    ack = bus.listener.until(type="ack", action="history")
    assert ack["messages"] == []
    assert ack["transaction"] == "t1"


def test_cancelling_a_running_request_frees_its_slot_and_keeps_the_partial_text(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play("half an ", "answer", gate, "never said")
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    eventually(gate.reached.is_set)
    bus.control("cancel", request_id="r1", transaction="t")
    done = bus.listener.terminal("r1")
    ack = bus.listener.until(type="ack", action="cancel")
    assert (done["finish_reason"], done["full_content"]) == ("cancelled", "half an answer")
    assert done["timings"]["cancel_ms"] < 500
    assert (ack["state"], ack["request_id"], ack["transaction"]) == ("running", "r1", "t")
    bus.control("history")
    history = bus.listener.until(type="ack", action="history")["messages"]
    assert [message["content"] for message in history] == ["one", "half an answer"]
    bus.ask("next", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


def test_a_cancel_in_the_prompt_leaves_no_trace_in_the_history(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play(PromptProgress(1, 9000, 0), gate)
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    eventually(gate.reached.is_set)
    bus.control("cancel")
    done = bus.listener.terminal("r1")
    assert (done["finish_reason"], done["full_content"], done["seq"]) == ("cancelled", "", 0)
    bus.control("history")
    assert bus.listener.until(type="ack", action="history")["messages"] == []


def test_cancelling_a_queued_request_ends_it_at_once_and_empty(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play(gate)
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    eventually(gate.reached.is_set)
    bus.ask("two", request_id="r2", session="other")
    bus.listener.until(type="queued", request_id="r2")
    bus.control("cancel", session="other", request_id="r2")
    done = bus.listener.terminal("r2")
    assert (done["finish_reason"], done["full_content"]) == ("cancelled", "")
    gate.open()
    assert bus.listener.terminal("r1")["type"] == "done"
    assert len(engine.calls) == 1


def test_a_cancel_that_comes_before_its_request_ends_it_at_once(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine)
    bus.control("cancel", request_id="r1")
    assert bus.listener.until(type="ack", action="cancel")["state"] == "unknown"
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["finish_reason"] == "cancelled"
    assert not engine.calls, "the engine is not asked for what nobody wants"


def test_a_flood_of_cancels_for_nothing_forgets_nobody_elses(bus: Bus) -> None:
    bus.worker()
    bus.control("cancel", session="modest/1", request_id="r1")
    for number in range(1500):
        bus.control("cancel", session="greedy", request_id=f"none{number}")
    bus.listener.until(type="ack", request_id="none1499")
    bus.ask("x", request_id="r1", session="modest/1")
    assert bus.listener.terminal("r1")["finish_reason"] == "cancelled"


def test_a_cancel_of_an_ended_request_says_so(bus: Bus) -> None:
    bus.worker()
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    bus.control("cancel", request_id="r1")
    assert bus.listener.until(type="ack", action="cancel")["state"] == "ended"


def test_cancel_without_an_id_stops_all_of_its_session_and_no_other(bus: Bus) -> None:
    engine = ScriptedEngine(slots=4)
    for _ in range(4):
        engine.play(Silence())
    bus.worker(engine)
    for number in range(2):
        bus.ask(None, request_id=f"a{number}", session="a", messages=[{"role": "user", "content": "x"}])
    bus.ask("y", request_id="b0", session="b")
    bus.listener.until(type="start", request_id="b0")
    bus.control("cancel", session="a")
    assert bus.listener.until(type="ack", action="cancel")["cancelled"] == 2
    assert bus.listener.terminal("a0")["finish_reason"] == bus.listener.terminal("a1")["finish_reason"] == "cancelled"
    assert not any(event.get("final") for event in bus.listener.of("b0"))


def test_reset_cancels_and_forgets_also_what_was_being_said(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine()
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    engine.play("half", gate)
    bus.ask("two", request_id="r2")
    eventually(gate.reached.is_set)
    bus.control("reset")
    assert bus.listener.terminal("r2")["finish_reason"] == "cancelled"
    bus.control("history")
    assert bus.listener.until(type="ack", action="history")["messages"] == []


def test_a_reset_in_the_moment_of_the_end_still_forgets(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bus.worker()
    parts = worker.daemon.parts
    finish = parts.store.finish

    def finish_after_a_reset(key: EntryKey, *args: Any, **more: Any) -> None:
        job = parts.registry.find(key)
        assert job is not None
        job.forgotten = True  # what a reset does, between the making of the history and its writing
        parts.store.reset(("default", "demo"))
        finish(key, *args, **more)

    monkeypatch.setattr(parts.store, "finish", finish_after_a_reset)
    bus.ask("my secret", request_id="r1")
    bus.listener.terminal("r1")
    assert parts.store.history(("default", "demo")) == ()


def test_history_is_shown_only_where_the_settings_allow(bus: Bus) -> None:
    bus.worker(sessions__expose_history=False)
    bus.control("history")
    ack = bus.listener.until(type="ack", action="history")
    assert (ack["status"], ack["code"]) == ("error", "unsupported")


def test_ping_tells_the_workers_state(bus: Bus) -> None:
    bus.worker()
    bus.sender.publish("llm/control/demo", b"ping")
    ack = bus.listener.until(type="ack", action="ping")
    assert (ack["status"], ack["state"], ack["engine"], ack["worker"]) == ("ok", "online", "ready", "w1")


def test_a_bad_control_message_gets_an_ack_that_says_what_was_expected(bus: Bus) -> None:
    bus.worker()
    bus.sender.publish("llm/control/demo", b'{"action":"explode","transaction":"t9"}')
    ack = bus.listener.until(type="ack", status="error")
    assert ack["code"] == "bad_request"
    assert ack["transaction"] == "t9"
    assert "cancel" in ack["fields"]["action"]


def test_control_is_never_stuck_behind_requests(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    for _ in range(40):
        engine.play(Silence())
    bus.worker(engine, limits__queue_size=1000)
    for number in range(40):
        bus.ask("x", request_id=f"r{number}", session=f"s{number}")
    bus.control("cancel", session="s0", request_id="r0")
    assert bus.listener.terminal("r0")["finish_reason"] == "cancelled"


def test_a_history_over_the_context_loses_its_oldest_exchanges_and_says_so(bus: Bus) -> None:
    engine = ScriptedEngine(n_ctx=256)
    bus.worker(engine, generation__max_tokens=32)
    for number in range(12):
        bus.ask(f"{number} " + "word " * 40, request_id=f"r{number}", max_tokens=32)
        bus.listener.terminal(f"r{number}")
    assert bus.listener.terminal("r11")["dropped_messages"] > 0
    assert engine.calls[-1].messages[-1]["content"].startswith("11 ")


@pytest.mark.parametrize("store", ["sqlite", "memory"])
def test_a_request_sent_again_is_told_its_state_and_runs_once(bus: Bus, store: str) -> None:
    gate, release = Gate(), Gate()
    engine = ScriptedEngine(slots=1)
    engine.play("half ", gate, "done")
    engine.play(release, "second")
    bus.worker(engine, sessions__store=store)
    bus.ask("one", request_id="r1")
    bus.ask("two", request_id="r2", session="other")
    eventually(gate.reached.is_set)
    bus.ask("two", request_id="r2", session="other")
    bus.ask("one", request_id="r1", metadata={"changed": True}, timeout_s=99)
    snapshot = bus.listener.until(type="snapshot", request_id="r1")
    assert (snapshot["content"], snapshot["next_seq"]) == ("half ", 1)
    assert len([e for e in bus.listener.of("r2") if e["type"] == "queued"]) >= 2
    gate.open()
    release.open()
    bus.listener.terminal("r1")
    bus.listener.terminal("r2")
    bus.ask("one", request_id="r1")
    eventually(lambda: len([e for e in bus.listener.of("r1") if e["type"] == "done"]) == 2)
    first, second = [e for e in bus.listener.of("r1") if e["type"] == "done"]
    assert first == second
    bus.ask("something else", request_id="r1")
    assert bus.listener.until(type="rejected", request_id="r1")["code"] == "duplicate_request"
    assert len(engine.calls) == 2


def test_a_request_sent_again_while_its_job_is_about_to_leave_is_told_its_end(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()
    registry = worker.daemon.parts.registry
    may_leave, leave = threading.Event(), registry.leave

    def leave_late(job: Job) -> None:
        may_leave.wait(20)
        leave(job)

    monkeypatch.setattr(registry, "leave", leave_late)
    try:
        bus.ask("one", request_id="r1")
        bus.listener.terminal("r1")
        assert registry.find(EntryKey("default", "demo", "r1")) is not None
        bus.control("cancel", request_id="r1", transaction="t")
        assert bus.listener.until(type="ack", transaction="t")["state"] == "ended"
        bus.ask("one", request_id="r1")
        eventually(lambda: len([e for e in bus.listener.of("r1") if e["type"] == "done"]) == 2)
    finally:
        may_leave.set()


def test_the_same_id_in_another_session_is_another_request(bus: Bus) -> None:
    bus.worker()
    bus.ask("one", request_id="r1", session="a")
    bus.ask("two", request_id="r1", session="b")
    bus.listener.until(type="done", session_id="a", full_content="one")
    bus.listener.until(type="done", session_id="b", full_content="two")


@pytest.mark.parametrize("action", ["reset", "delete"])
def test_forgetting_a_session_says_how_many_requests_it_cancelled(bus: Bus, action: str) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("half", gate)
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    bus.ask("two", request_id="r2")
    eventually(gate.reached.is_set)
    bus.listener.until(type="queued", request_id="r2")
    bus.control(action)
    assert bus.listener.until(type="ack", action=action)["cancelled"] == 2


def test_a_reset_forgets_what_a_full_disk_could_not_take_yet(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bus.worker()
    store = worker.daemon.parts.store
    with monkeypatch.context() as full_disk:

        def refuse(*_: Any, **__: Any) -> None:
            raise StoreError("no space left")

        full_disk.setattr(store, "finish", refuse)
        bus.ask("secret", request_id="r1")
        eventually(lambda: worker.daemon.parts.redelivery.unstored(EntryKey("default", "demo", "r1")) is not None)
        bus.control("reset")
        bus.listener.until(type="ack", action="reset", status="ok")
    bus.listener.terminal("r1")
    assert store.unfinished() == []
    assert store.history(("default", "demo")) == ()


@pytest.mark.parametrize("odd", [7, [1], {"a": 1}, None])
def test_a_session_whose_kept_calls_are_of_odd_types_goes_on(bus: Bus, odd: Any) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine)
    call = {"id": odd, "type": "function", "function": {"name": odd, "arguments": odd}}
    worker.daemon.parts.store.finish(
        EntryKey("default", "demo", "earlier"),
        b"{}",
        now=1.0,
        history=HistoryChange(
            session=("default", "demo"),
            append=(
                {"role": "user", "content": "look"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": odd, "content": "a wall"},
            ),
        ),
    )
    bus.ask("go on", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"
    for message in engine.calls[0].messages:
        for told in message.get("tool_calls", ()):
            assert isinstance(told["id"], str)
            assert isinstance(told["function"]["name"], str)
        assert isinstance(message.get("tool_call_id", ""), str)


def test_a_cancel_of_one_request_says_that_it_stopped_one_and_where_it_was(bus: Bus) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play(gate)
    bus.worker(engine)
    bus.ask("x", request_id="r1", session="a")
    assert gate.reached.wait(10)
    bus.ask("y", request_id="r2", session="b")
    bus.listener.until(type="queued", request_id="r2")
    for session, request_id, state in (("b", "r2", "queued"), ("a", "r1", "running")):
        bus.control("cancel", session=session, request_id=request_id)
        ack = bus.listener.until(type="ack", action="cancel", request_id=request_id)
        assert (ack["state"], ack["cancelled"]) == (state, 1)


def test_a_session_that_the_store_cannot_read_is_told_so(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StoreError("disk I/O error")

    worker = bus.worker()
    for name in ("history", "reset", "find"):
        monkeypatch.setattr(worker.daemon.parts.store, name, broken)
    for control in ({"action": "history"}, {"action": "reset"}, {"action": "cancel", "request_id": "r1"}):
        bus.control(**control)
        ack = bus.listener.until(type="ack", action=control["action"])
        assert (ack["status"], ack["code"]) == ("error", "internal")
        assert "disk I/O" not in ack["message"], "what is wrong with the disk is for the operator's log"
