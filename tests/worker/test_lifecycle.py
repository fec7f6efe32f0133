"""Start, restart, drain and stop; other workers; what operators do."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy import logs
from llamacpp_mqtt_deploy.core.events import EventReader, encode
from llamacpp_mqtt_deploy.ports import Delivery, Entry, EntryKey, Published, StoreAway, StoreFull
from llamacpp_mqtt_deploy.service import daemon
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def _left_behind(
    bus: Bus,
    *,
    request_id: str,
    streaming: bool = False,
    starts: int = 0,
    correlation: bytes | None = None,
    accepted_at: float | None = None,
    **fields: Any,
) -> None:
    """A journal entry as a worker that was killed leaves it."""
    store = SqliteStore(bus.state / "state.db")
    store.open()
    body = {"prompt": "left behind", "request_id": request_id} | fields
    accepted_at = time.time() - 5 if accepted_at is None else accepted_at
    entry = Entry(
        key=EntryKey("default", "demo", request_id),
        topic="llm/request/demo",
        payload=json.dumps(body).encode(),
        digest="d",
        correlation=correlation,
        accepted_at=accepted_at,
        expires_at=accepted_at + 65,
        reply_topic="llm/reply/demo",
    )
    store.accept([entry])
    for _ in range(starts):
        store.mark_started(entry.key)
    if streaming:
        store.mark_streaming(entry.key)
    store.close()


def test_the_status_tells_what_the_worker_is_and_goes_offline_with_it(bus: Bus) -> None:
    worker = bus.worker()
    status = bus.listener.until(state="online", _topic="llm/status/w1", slots=2)
    assert status["routes"]["default"]["request"] == "llm/request/{session}"
    assert (status["models"], status["slots"], status["engine"]["state"]) == (["scripted"], 2, "ready")
    bus.listener.until(_topic="llm/health/w1")
    assert worker.stop() == 0
    retained = bus.broker.retained("llm/status/w1")
    assert retained is not None
    assert json.loads(retained)["state"] == "offline"


def test_status_and_health_expire_and_are_renewed_before(bus: Bus) -> None:
    bus.worker(status__every_s=1, status__health_every_s=1)
    for topic in ("llm/status/w1", "llm/health/w1"):
        bus.listener.until(_topic=topic)
        kept = [delivery for delivery in bus.listener.deliveries if delivery.topic == topic]
        assert kept[0].expiry_s is not None
        assert 3 <= kept[0].expiry_s <= 4
        bus.listener.events.clear()
        bus.listener.until(_topic=topic, timeout_s=3.0)


def test_the_will_says_offline_when_the_connection_dies_and_online_comes_back_with_it(bus: Bus) -> None:
    worker = bus.worker()
    bus.broker.drop_connection(worker.client_id)
    bus.listener.until(_topic="llm/status/w1", state="offline", reason="lost")
    eventually(lambda: b'"online"' in (bus.broker.retained("llm/status/w1") or b""))


def test_accepted_requests_run_after_a_restart_and_begun_ones_end_in_interrupted(bus: Bus) -> None:
    _left_behind(bus, request_id="begun", streaming=True, metadata={"k": 1})
    _left_behind(bus, request_id="waiting")
    _left_behind(bus, request_id="poison", starts=3)
    bus.worker()
    begun = bus.listener.terminal("begun")
    assert (begun["code"], begun["retryable"], begun["metadata"]) == ("interrupted", True, {"k": 1})
    assert "seq" not in begun
    assert bus.listener.terminal("poison")["code"] == "engine_lost"
    assert bus.listener.terminal("waiting")["full_content"] == "left behind"
    assert bus.listener.until(type="queued", request_id="waiting")


def test_correlation_data_is_on_every_event_also_after_a_restart(bus: Bus) -> None:
    _left_behind(bus, request_id="again", correlation=b"c1")
    _left_behind(bus, request_id="begun", correlation=b"c2", streaming=True)
    bus.worker()
    bus.listener.terminal("again")
    bus.listener.terminal("begun")
    told = {(json.loads(d.payload)["request_id"], d.correlation) for d in bus.listener.deliveries if "reply" in d.topic}
    assert told == {("again", b"c1"), ("begun", b"c2")}


def test_a_request_is_acknowledged_before_its_first_event(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bus.worker(ScriptedEngine(slots=8))
    link = worker.daemon.parts.link
    acknowledge, publish = link.acknowledge, link.publish
    told: list[str] = []

    def noted_acknowledge(delivery: Delivery) -> None:
        told.append("ack")
        acknowledge(delivery)

    def noted_publish(topic: str, *args: Any, **more: Any) -> Published:
        told.append(topic)
        return publish(topic, *args, **more)

    monkeypatch.setattr(link, "acknowledge", noted_acknowledge)
    monkeypatch.setattr(link, "publish", noted_publish)
    for number in range(20):
        told.clear()
        bus.ask("one", request_id=f"r{number}", session=f"s{number}")
        bus.listener.terminal(f"r{number}")
        assert next(word for word in told if word == "ack" or "/reply/" in word) == "ack"


def test_what_was_left_behind_runs_whatever_the_limits_are_now(bus: Bus) -> None:
    for number in range(4):
        _left_behind(bus, request_id=f"r{number}")
    bus.worker(limits__queue_size=1, limits__session_queue=1, limits__max_requests_per_minute=1)
    for number in range(4):
        assert bus.listener.terminal(f"r{number}")["type"] == "done"


def test_a_clock_that_is_set_forward_by_a_year_while_the_worker_runs_costs_no_memory(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_PURGE_EVERY_S", 0.05)
    worker = bus.worker()
    bus.ask("hello", request_id="r1")
    first = bus.listener.terminal("r1")
    purged = threading.Event()
    purge, real = worker.daemon.parts.store.purge, time.time

    def counted(**limits: Any) -> Any:
        found = purge(**limits)
        if limits["now"] > real() + 86400:
            purged.set()
        return found

    monkeypatch.setattr(worker.daemon.parts.store, "purge", counted)
    monkeypatch.setattr(time, "time", lambda: real() + 365 * 86400)
    assert purged.wait(10)
    monkeypatch.setattr(time, "time", real)
    bus.ask("hello", request_id="r1")
    bus.control("history", transaction="t")
    messages = bus.listener.until(type="ack", transaction="t")["messages"]
    assert [message["content"] for message in messages] == ["hello", "hello"]
    assert [event for event in bus.listener.of("r1") if event.get("final")] == [first, first]


def test_what_is_written_while_the_clock_is_wrong_for_a_moment_is_not_forgotten_when_it_is_right_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker()
    parts = worker.daemon.parts
    parts.clock._began_at -= 3600.0
    real = time.time
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time", lambda: real() - 365 * 86400)
        bus.ask("hello", request_id="r1")
        first = bus.listener.terminal("r1")
        eventually(lambda: parts.redelivery._taken == [])
    worker.daemon.upkeep.purge()
    bus.ask("hello", request_id="r1")
    bus.control("history", transaction="t")
    messages = bus.listener.until(type="ack", transaction="t")["messages"]
    assert [message["content"] for message in messages] == ["hello", "hello"]
    assert [event for event in bus.listener.of("r1") if event.get("final")] == [first, first]


def test_a_clock_that_was_set_while_the_worker_was_down_ends_no_request(bus: Bus) -> None:
    _left_behind(bus, request_id="r1", accepted_at=60.0)  # a board without a battery clock
    _left_behind(bus, request_id="r2", accepted_at=time.time() + 10 * 365 * 86400)
    _left_behind(bus, request_id="r3", accepted_at=time.time() - 70)
    gate = Gate()
    worker = bus.worker(ScriptedEngine(lambda _: [gate, "hi"]))
    assert bus.listener.terminal("r3")["code"] == "timeout"
    eventually(lambda: len(worker.daemon.parts.registry) == 2)
    left_s = [job.deadline - time.monotonic() for job in worker.daemon.parts.registry.all()]
    assert all(55 < left <= 65 for left in left_s)
    gate.open()
    assert [bus.listener.terminal(name)["type"] for name in ("r1", "r2")] == ["done", "done"]


def test_a_disk_that_is_too_full_to_start_is_waited_for(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    opens: list[None] = []
    space = threading.Event()
    open_store = SqliteStore.open

    def open_if_room(store: SqliteStore) -> None:
        opens.append(None)
        if not space.is_set():
            raise StoreFull("no space left")
        open_store(store)

    monkeypatch.setattr(SqliteStore, "open", open_if_room)
    stopped = bus.worker(wait=False)
    eventually(lambda: len(opens) >= 3)
    assert stopped.stop() == 0
    worker = bus.worker(wait=False)
    eventually(lambda: len(opens) >= 6)
    assert worker.exit_code is None
    space.set()
    bus.listener.until(state="online")
    bus.ask("hi", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"


def test_a_journal_that_cannot_be_read_at_the_first_connection_is_recovered_a_moment_later(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_RECOVER_AGAIN_S", 0.05)
    reads: list[None] = []
    undelivered = SqliteStore.undelivered

    def away_at_first(store: SqliteStore) -> list[Entry]:
        reads.append(None)
        if len(reads) < 3:
            raise StoreAway("the database was restarted")
        return undelivered(store)

    monkeypatch.setattr(SqliteStore, "undelivered", away_at_first)
    worker = bus.worker()
    assert len(reads) >= 3
    bus.ask("hi", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert worker.stop() == 0


def test_what_a_flood_left_is_forgotten_as_fast_as_it_came(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_PURGE_EVERY_S", 2.0)
    store = SqliteStore(bus.state / "state.db")
    store.open()
    keys = [EntryKey("default", "demo", f"r{n}") for n in range(5000)]
    store.accept([Entry(key=key, topic="t", payload=b"x", digest="d", reply_topic="llm/reply/demo") for key in keys])
    for some in (keys[:2500], keys[2500:]):
        for pending in [store.finish_soon(key, b"end", now=time.time() - 3600) for key in some]:
            pending.wait(30)
    store.mark_delivered(keys)
    store.close()
    worker = bus.worker()
    eventually(lambda: worker.daemon.parts.store.find(keys[-1]) is None)  # at one piece in 2 s: after 20 s


def test_a_terminal_event_that_no_broker_took_is_delivered_by_the_next_life(bus: Bus) -> None:
    worker = bus.worker()
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    worker.stop()
    store = SqliteStore(bus.state / "state.db")
    store.open()
    assert store.undelivered() == []
    key = EntryKey("default", "demo", "r9")
    store.accept([Entry(key=key, topic="t", payload=b"x", digest="d", reply_topic="llm/reply/demo")])
    store.finish(
        key,
        encode(
            {
                "type": "error",
                "request_id": "r9",
                "session_id": "demo",
                "seq": 0,
                "final": True,
                "code": "timeout",
                "message": "late",
                "retryable": False,
            }
        ),
        now=time.time(),
    )
    store.close()
    bus.worker()
    assert bus.listener.terminal("r9")["code"] == "timeout"


def test_draining_lets_running_requests_finish_and_keeps_queued_ones_for_the_next_life(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play("running", gate)
    worker = bus.worker(engine)
    bus.ask("one", request_id="r1", session="a")
    eventually(gate.reached.is_set)
    bus.ask("two", request_id="r2", session="b")
    bus.listener.until(type="queued", request_id="r2")
    worker.daemon.stop()
    bus.listener.until(state="draining")
    bus.ask("three", request_id="r3", session="c")
    assert bus.listener.terminal("r3")["code"] == "shutting_down"
    gate.open()
    assert bus.listener.terminal("r1")["type"] == "done"
    assert worker.join() == 0
    assert not any(event.get("final") for event in bus.listener.of("r2"))
    bus.worker()
    assert bus.listener.terminal("r2")["full_content"] == "two"


def test_a_request_that_waits_for_an_absent_engine_is_kept_for_the_next_life(bus: Bus) -> None:
    for life in range(4):  # more lives than a request may be started
        engine = ScriptedEngine()
        engine.become("unreachable", "nobody listens")
        worker = bus.worker(engine, limits__drain_timeout_s=3600)
        if life == 0:
            bus.ask("patience", request_id="r1")
        registry = worker.daemon.parts.registry
        eventually(lambda registry=registry: [1 for job in registry.all() if job.phase == "running"])  # type: ignore[misc]
        assert worker.stop() == 0
    assert not any(event.get("final") for event in bus.listener.of("r1"))
    bus.worker()
    assert bus.listener.terminal("r1")["full_content"] == "patience"


def test_what_outlives_the_drain_ends_in_shutting_down(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play("so far", Silence())
    worker = bus.worker(engine, limits__drain_timeout_s=0.2)
    bus.ask("one", request_id="r1")
    bus.listener.until(type="chunk", request_id="r1")
    assert worker.stop() == 0
    error = bus.listener.terminal("r1")
    assert (error["code"], error["partial_content"]) == ("shutting_down", "so far")


def test_a_second_signal_does_not_wait_for_running_requests(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play("so far", Silence())
    worker = bus.worker(engine, limits__drain_timeout_s=3600)
    bus.ask("one", request_id="r1")
    bus.listener.until(type="chunk", request_id="r1")
    worker.daemon.stop()
    worker.daemon.stop()
    assert worker.join() == 0
    assert bus.listener.terminal("r1")["code"] == "shutting_down"


def test_with_the_memory_store_queued_requests_end_with_the_worker(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play(Silence())
    worker = bus.worker(engine, sessions__store="memory", limits__drain_timeout_s=0)
    bus.ask("one", request_id="r1", session="a")
    bus.ask("two", request_id="r2", session="b")
    bus.listener.until(type="queued", request_id="r2")
    worker.stop()
    assert {bus.listener.terminal(each)["code"] for each in ("r1", "r2")} == {"shutting_down"}


def test_a_second_worker_on_the_same_state_does_not_start(bus: Bus) -> None:
    bus.worker()
    second = bus.worker(wait=False)
    assert second.join() == 3
    bus.ask("still served", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"


def test_a_second_worker_under_the_same_root_does_not_start(bus: Bus) -> None:
    bus.worker(status__every_s=1)
    second = bus.worker(wait=False, mqtt__worker_id="w2", sessions__path=str(bus.state / "other.db"), status__every_s=1)
    assert second.join() == 3
    bus.ask("still served", request_id="r1")
    bus.listener.terminal("r1")
    assert len([event for event in bus.listener.of("r1") if event.get("final")]) == 1


def test_a_stale_online_of_a_dead_worker_does_not_stop_a_new_one(bus: Bus) -> None:
    old = {"state": "online", "protocol": 1, "instance": "dead", "ts": time.time() - 500, "every_s": 10.0}
    bus.sender.publish("llm/status/w2", encode(old), retain=True)
    bus.worker()
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"


def test_a_fresh_online_that_falls_silent_is_waited_out(bus: Bus) -> None:
    old = {"state": "online", "protocol": 1, "instance": "dead", "ts": time.time(), "every_s": 0.2}
    bus.sender.publish("llm/status/w2", encode(old), retain=True)
    bus.worker()
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"


def test_a_lost_connection_costs_no_request_and_no_event(bus: Bus) -> None:
    gate = Gate()
    engine = ScriptedEngine(slots=1)
    engine.play("before ", gate, "after")
    worker = bus.worker(engine)
    bus.ask("one", request_id="r1")
    eventually(gate.reached.is_set)
    bus.broker.drop_connection(worker.client_id)
    bus.ask("two", request_id="r2", session="b")
    gate.open()
    assert bus.listener.terminal("r1")["full_content"] == "before after"
    assert bus.listener.terminal("r2")["type"] == "done"
    # What had no PUBACK yet comes once more, so a strict count would be wrong; a client that keeps the rules sees none of it.
    reader = EventReader("r1")
    told = [reading.content for event in bus.listener.of("r1") if (reading := reader.feed(event)) is not None]
    assert "".join(told) == "before after"
    assert not reader.hole


def test_an_operator_drains_and_resumes(bus: Bus) -> None:
    bus.worker()
    bus.admin("drain", transaction="t1")
    assert bus.listener.until(action="drain")["transaction"] == "t1"
    bus.listener.until(_topic="llm/status/w1", state="draining")
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["code"] == "shutting_down"
    bus.admin("resume")
    bus.listener.until(action="resume", state="online")
    bus.ask("two", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


def test_nobody_takes_back_that_a_worker_stops(bus: Bus) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play("one", gate)
    worker = bus.worker(engine)
    bus.ask("one", request_id="r1")
    assert gate.reached.wait(10)
    worker.daemon.stop()
    bus.listener.until(_topic="llm/status/w1", state="draining")
    bus.admin("resume")
    assert bus.listener.until(action="resume")["code"] == "shutting_down"
    bus.ask("two", request_id="r2", session="b")
    assert bus.listener.terminal("r2")["code"] == "shutting_down"
    gate.open()
    worker.join()
    assert bus.listener.terminal("r1")["type"] == "done"
    bus.listener.until(_topic="llm/status/w1", state="offline", reason="stopped")
    states = [event["state"] for event in bus.listener.events if event["_topic"] == "llm/status/w1"]
    assert states[-2:] == ["draining", "offline"]


def test_correlation_data_comes_back_with_an_operators_answer(bus: Bus) -> None:
    bus.worker()
    bus.sender.publish("llm/admin/w1", b"drain", correlation=b"\x00op")
    bus.listener.until(action="drain")
    assert bus.listener.deliveries[-1].correlation == b"\x00op"


def test_an_operator_cancels_everything(bus: Bus) -> None:
    engine = ScriptedEngine(slots=1)
    engine.play(Silence())
    bus.worker(engine)
    bus.ask("one", request_id="r1", session="a")
    bus.ask("two", request_id="r2", session="b")
    bus.listener.until(type="queued", request_id="r2")
    bus.admin("cancel_all")
    assert bus.listener.until(action="cancel_all")["cancelled"] == 2
    assert bus.listener.terminal("r1")["finish_reason"] == bus.listener.terminal("r2")["finish_reason"] == "cancelled"


def test_an_operator_gets_a_reason_when_something_cannot_be_done(bus: Bus) -> None:
    bus.worker()
    bus.sender.publish("llm/admin/w1", b"restart_engine")
    assert "status" in bus.listener.until(action="restart_engine")
    bus.sender.publish("llm/admin/w1", b"fly")
    error = bus.listener.until(_topic="llm/admin-reply/w1", status="error", code="bad_request")
    assert "cancel_all" in error["fields"]["action"]


def test_an_operator_sees_the_last_problems_of_the_log(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [{"ts": "t", "level": "error", "event": f"e{number}", "text": "x" * 400} for number in range(9)]
    monkeypatch.setattr(logs, "problems", lambda most: problems[-most:])
    bus.worker(limits__max_event_bytes=2048)
    bus.admin("problems", transaction="some", limit=2)
    assert bus.listener.until(transaction="some")["problems"] == problems[-2:]
    bus.admin("problems", transaction="all")
    told = bus.listener.until(transaction="all")["problems"]
    assert told == problems[-len(told) :]
    assert len(told) == 3
    assert len(bus.listener.deliveries[-1].payload) <= 2048


def test_reload_takes_what_it_can_and_names_what_needs_a_restart(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine)
    worker.daemon._loaded.overrides.update(  # type: ignore[attr-defined]
        {"generation.system_prompt": "Be new.", "limits.queue_size": "7", "mqtt.host": "elsewhere"}
    )
    bus.admin("reload")
    ack = bus.listener.until(action="reload")
    assert set(ack["changed"]) == {"generation.system_prompt", "limits.queue_size"}
    assert ack["needs_restart"] == ["mqtt.host"]
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert engine.calls[-1].messages[0] == {"role": "system", "content": "Be new."}


def test_aliases_of_models_are_told_in_the_status_and_change_at_reload(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine, engine__model="qwen", engine__aliases={"gpt-4": "qwen"})
    assert {"qwen", "gpt-4"} <= set(bus.listener.until(state="online")["models"])
    bus.ask("one", request_id="r1", model="gpt-4")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert engine.calls[-1].model == "qwen"
    worker.daemon._loaded.overrides.update({"engine.aliases": '{"gpt-5":"default"}'})  # type: ignore[attr-defined]
    bus.admin("reload")
    assert bus.listener.until(action="reload")["changed"] == ["engine.aliases"]
    bus.ask("two", request_id="r2", model="gpt-5")
    assert bus.listener.terminal("r2")["type"] == "done"
    assert engine.calls[-1].model == "qwen"
    bus.ask("three", request_id="r3", model="gpt-4")
    assert bus.listener.terminal("r3")["code"] == "model_not_found"


def test_a_wrong_configuration_changes_nothing_at_reload(bus: Bus) -> None:
    worker = bus.worker()
    worker.daemon._loaded.overrides.update({"limits.queue_size": "many"})  # type: ignore[attr-defined]
    bus.admin("reload")
    ack = bus.listener.until(action="reload")
    assert ack["status"] == "error"
    assert "queue_size" in ack["message"]


def test_a_route_has_its_own_topics_fields_prompt_and_defaults(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(
        engine,
        routes__maze__request="maze/user_input",
        routes__maze__reply="maze/assistant_response/{session}",
        routes__maze__trust_payload_session=True,
        routes__maze__fields={"prompt": "message", "session_id": "sessionId"},
        routes__maze__system_prompt="You guide through a maze.",
        routes__maze__temperature=0.1,
        routes__maze__mode="off",
    )
    bus.sender.publish("maze/user_input", b'{"sessionId":"s7","message":"where am I?"}')
    done = bus.listener.until(_topic="maze/assistant_response/s7", type="done")
    assert done["full_content"] == "where am I?"
    assert engine.calls[-1].messages[0]["content"] == "You guide through a maze."
    assert engine.calls[-1].sampling["temperature"] == 0.1
    bus.ask("plain", request_id="r1")
    bus.listener.terminal("r1")
    assert "temperature" not in engine.calls[-1].sampling


def test_an_engine_that_comes_later_is_waited_for_with_loading(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.become("loading", "the model is being loaded")
    worker = bus.worker(engine, wait=False)
    bus.listener.until(_topic="llm/status/w1", state="online")
    bus.ask("one", request_id="r1")
    assert bus.listener.until(type="queued", request_id="r1")["reason"] in ("loading", "waiting")
    assert not worker.daemon.ready
    engine.become("ready")
    assert bus.listener.terminal("r1")["type"] == "done"
    eventually(lambda: worker.daemon.ready)


def test_the_worker_gives_up_after_its_startup_timeout_with_exit_code_3(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.become("unreachable", "nobody listens")
    worker = bus.worker(engine, wait=False, limits__startup_timeout_s=0.3)
    assert worker.join() == 3


def test_an_engine_that_can_never_open_ends_with_2_and_one_line(bus: Bus, capsys: pytest.CaptureFixture[str]) -> None:
    class Unfit(ScriptedEngine):
        @override
        def open(self) -> None:
            raise ValueError("engine.model_path: there is no file model.gguf")

    worker = bus.worker(Unfit(), wait=False)
    assert worker.join() == 2
    told = capsys.readouterr()
    assert "there is no file model.gguf" in told.out + told.err
    assert "Traceback" not in told.out + told.err


def test_a_burst_of_64_requests_over_8_sessions_is_answered_without_a_hole(bus: Bus) -> None:
    bus.worker(ScriptedEngine(slots=4), limits__queue_size=100, limits__session_queue=100)
    for number in range(64):
        bus.ask(f"prompt number {number} of many", request_id=f"r{number}", session=f"s{number % 8}")
    for number in range(64):
        done = bus.listener.terminal(f"r{number}")
        assert done["full_content"] == f"prompt number {number} of many"
        assert bus.listener.read(f"r{number}").content == done["full_content"]
