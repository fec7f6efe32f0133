"""What the operator's log and the client's timings say of an ended request."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.core.deltas import Finished, PromptProgress, TokenUsage
from llamacpp_mqtt_deploy.core.errors import EngineFailed, EngineLost
from llamacpp_mqtt_deploy.ports import Entry, EntryKey, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.counters import Counters
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.journal_marks import JournalMarks
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.responder import Responder
from tests.support.lone_job import Taker, lone_job, registry
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker


def _empty(worker: WholeWorker) -> None:
    eventually(lambda: len(worker.daemon.parts.registry) == 0)


def _line(lines: list[Any], request_id: str) -> dict[str, Any]:
    wanted = [line for line in lines if line["event"] == "request.finished" and line["request_id"] == request_id]
    assert len(wanted) == 1, "one line for each request"
    return dict(wanted[0])


@pytest.mark.parametrize("log_content", [True, False])
def test_each_request_leaves_one_line_in_the_log(bus: Bus, log_content: bool) -> None:
    engine = ScriptedEngine()
    engine.play(EngineLost("gone"))
    engine.play("one ", "two", Finished("length", TokenUsage(7, 2)))
    worker = bus.worker(engine, logging__log_content=log_content)
    with capture_logs() as lines:
        bus.ask("count", request_id="r1")
        bus.listener.terminal("r1")
        eventually(lambda: any(line["event"] == "request.finished" for line in lines))
    line = _line(lines, "r1")
    told = {
        name: line[name] for name in ("route", "session", "outcome", "prompt_tokens", "completion_tokens", "starts")
    }
    assert told == {
        "route": "default",
        "session": "demo",
        "outcome": "length",
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "starts": 2,
    }
    assert line["log_level"] == "info"
    assert line["chunks"] == len([event for event in bus.listener.of("r1") if event["type"] == "chunk"])
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["total_ms"]
    contents = {name: line[name] for name in ("prompt", "answer") if name in line}
    assert contents == ({"prompt": "count", "answer": "one two"} if log_content else {})
    _empty(worker)


def test_the_log_tells_the_cause_of_an_error_and_the_client_does_not_hear_it(bus: Bus) -> None:
    engine = ScriptedEngine()
    failed = EngineFailed("the engine failed")
    failed.__cause__ = OSError("connection refused to 10.0.0.7")
    engine.play(failed)
    engine.play(EngineFailed("no cause"))
    bus.worker(engine)
    with capture_logs() as lines:
        for request_id in ("r1", "r2"):
            bus.ask("hi", request_id=request_id)
            assert "10.0.0.7" not in str(bus.listener.terminal(request_id))
        eventually(lambda: sum(line["event"] == "request.finished" for line in lines) == 2)
    line = _line(lines, "r1")
    assert (line["log_level"], line["outcome"], line["message"]) == ("warning", "engine_error", "the engine failed")
    assert line["cause"] == "OSError: connection refused to 10.0.0.7"
    assert _line(lines, "r2")["cause"] is None


def test_an_error_brings_timings_warnings_and_metadata_as_a_good_end_does(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play("one ", EngineFailed("broken"))
    engine.play(EngineFailed("broken"))
    bus.worker(engine)
    bus.ask("hi", request_id="r1", metadata={"k": 1}, max_token=5)
    bus.ask("hi", request_id="r2")
    full, plain = bus.listener.terminal("r1"), bus.listener.terminal("r2")
    assert full["metadata"] == {"k": 1}
    assert "max_tokens" in full["warnings"][0]
    assert 0 <= full["timings"]["queue_ms"] <= full["timings"]["first_token_ms"] <= full["timings"]["total_ms"]
    assert full["partial_content"] == "one "
    assert "cancel_ms" not in full["timings"]
    assert not {"metadata", "warnings", "partial_content"} & set(plain)
    assert "first_token_ms" not in plain["timings"], "there was none"


def test_only_a_cancelled_answer_tells_how_long_the_cancel_took(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("one ", gate)
    bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.control("cancel", request_id="r1")
    cancelled = bus.listener.terminal("r1")["timings"]
    assert 0 <= cancelled["cancel_ms"] <= cancelled["total_ms"]
    bus.ask("hi", request_id="r2")
    assert "cancel_ms" not in bus.listener.terminal("r2")["timings"]


def test_a_request_that_never_ran_has_waited_all_its_time(bus: Bus) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play(gate)
    bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.ask("hi", request_id="r2", session="other", timeout_s=0.2)
    error = bus.listener.terminal("r2")
    assert error["message"] == "the limit of 0.2 s for this request passed while it waited for a slot"
    timings = error["timings"]
    assert 200 <= timings["queue_ms"] <= timings["total_ms"]
    gate.open()


@pytest.mark.parametrize("part", ["chunk_record", "error"])
def test_a_defect_in_the_last_step_still_brings_an_end(bus: Bus, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    responders: list[Responder] = []

    def broken(responder: Responder, **_: object) -> Any:
        responders.append(responder)
        raise RuntimeError("a defect")

    engine = ScriptedEngine()
    engine.play("text", EngineFailed("broken"))
    worker = bus.worker(engine)
    with monkeypatch.context() as patch:
        patch.setattr(Responder, part, broken)
        bus.ask("one", request_id="r1", full_content=False)
        end = bus.listener.terminal("r1")
        assert end["code"] == ("internal" if part == "error" else "engine_error")
        _empty(worker)
    responders[0].piece("content", "late")
    bus.ask("two", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"
    assert bus.listener.of("r1")[-1]["type"] == "error", "nothing comes after the end"


def test_an_end_is_sent_with_the_correlation_data_of_its_request(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    send = Redelivery.send

    def noted(redelivery: Redelivery, *given: Any, **more: Any) -> None:
        sent.append(given)
        send(redelivery, *given, **more)

    monkeypatch.setattr(Redelivery, "send", noted)
    bus.worker()
    bus.sender.publish("llm/request/demo", b'{"prompt":"hi","request_id":"r1"}', correlation=b"c")
    bus.listener.terminal("r1")
    ((key, topic, _, correlation),) = sent
    assert (key.request_id, topic, correlation) == ("r1", "llm/reply/demo", b"c")


def test_a_cancel_in_the_prompt_tells_the_tokens_that_were_read(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play(PromptProgress(5, 9, 4), gate)
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.control("cancel", request_id="r1")
    usage = bus.listener.terminal("r1")["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"]) == (9, 0, 4)
    eventually(lambda: worker.daemon.parts.counters.snapshot(period_s=1.0)["requests"]["cancelled"] == 1)  # type: ignore[index]


def test_a_time_limit_of_a_running_request_is_named(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play("so far", Silence())
    bus.worker(engine)
    bus.ask("hi", request_id="r1", timeout_s=0.3)
    assert bus.listener.terminal("r1")["message"] == "the limit of 0.3 s for this request passed"


class Bench:
    """A completion over a journal in memory; it is 101.234567 s by the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
        self.store, self.registry, self.outbox = SqliteStore(None), registry(), Taker()
        self.store.open()
        self.job: Job = lone_job(outbox=self.outbox, received_at=100.0, deadline=160.0, **fields)
        entry = Entry(key=self.job.key, topic="t", payload=b"{}", digest="d", reply_topic="llm/reply/demo")
        self.store.accept([entry])
        self.redelivery = Redelivery(outbox=self.outbox, store=self.store, max_event_bytes=lambda: 4096)
        self.completion = Completion(
            store=self.store,
            marks=JournalMarks(self.store),
            registry=self.registry,
            counters=Counters(),
            redelivery=self.redelivery,
            log_content=lambda: False,
        )
        self.registry.enter(self.job)
        self.registry.commit([self.job])
        monkeypatch.setattr(time, "monotonic", lambda: 101.234567)

    def end(self) -> dict[str, Any]:
        ends = [event for event in self.outbox.events if event.get("final")]
        assert len(ends) == 1
        return ends[0]


@pytest.mark.parametrize("silent", [True, False])
def test_timings_are_milliseconds_from_the_receipt_on(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    bench = Bench(monkeypatch, silent=silent)
    bench.job.started_at = 100.5
    bench.job.responder.start({"worker": "w", "created": 1})
    bench.job.answer.add_text("hi", 100.75)
    bench.completion.done(bench.job, "stop")
    first_token_ms = 750.0 if silent else 1234.57
    assert bench.end()["timings"] == {"queue_ms": 500.0, "first_token_ms": first_token_ms, "total_ms": 1234.57}


def test_a_clock_that_stands_still_brings_no_negative_times(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.job.received_at = 101.3
    bench.completion.done(bench.job, "stop")
    assert bench.end()["timings"] == {"queue_ms": 0.0, "total_ms": 0.0}


def test_a_cancel_tells_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.job.stop.set("cancelled")
    bench.job.stop.at = 101.2
    bench.completion.stopped(bench.job)
    assert (bench.end()["finish_reason"], bench.end()["timings"]["cancel_ms"]) == ("cancelled", 34.57)


def test_whoever_comes_second_with_an_end_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.completion.failed(bench.job, EngineFailed("broken"))
    bench.completion.done(bench.job, "stop")
    bench.completion.failed(bench.job, EngineFailed("again"))
    bench.job.stop.set("put_back")
    bench.completion.stopped(bench.job)
    assert bench.end()["message"] == "broken"
    entry = bench.store.find(bench.job.key)
    assert entry is not None
    assert json.loads(entry.terminal or b"")["message"] == "broken"


def test_a_request_that_is_put_back_has_no_end_and_is_left_to_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.job.stop.set("put_back")
    bench.completion.stopped(bench.job)
    assert bench.outbox.events == []
    assert bench.registry.find(bench.job.key) is None
    assert [entry.state for entry in bench.store.unfinished()] == ["accepted"]


def test_a_reset_in_the_moment_in_which_the_disk_refuses_an_end_still_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.job.answer.add_text("secret", 101.0)

    def refuse(key: EntryKey, *_: Any, **__: Any) -> None:
        bench.job.forgotten = True
        raise StoreError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "finish", refuse)
        bench.completion.done(bench.job, "stop")
        assert bench.outbox.kinds() == ["chunk"]
        assert bench.job.phase == "ending"
    bench.redelivery.sweep()
    assert bench.end()["full_content"] == "secret"
    assert bench.store.history(("default", "demo")) == ()
    assert bench.registry.find(bench.job.key) is None


def test_an_end_whose_history_the_store_cannot_take_for_a_defect_is_stored_and_told_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.job.answer.add_text("hi", 101.0)
    finish, tried = bench.store.finish, list[bool]()

    def broken(*given: Any, history: object, **more: Any) -> None:
        tried.append(history is not None)
        if history is not None:
            raise RuntimeError("a defect")
        finish(*given, **more)

    monkeypatch.setattr(bench.store, "finish", broken)
    bench.completion.done(bench.job, "stop")
    assert bench.end()["full_content"] == "hi"
    assert tried == [True, False]
    assert (bench.store.unfinished(), bench.store.history(("default", "demo"))) == ([], ())


def test_a_stateless_request_and_a_forgotten_one_leave_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, remembered in (({}, 2), ({"messages": [{"role": "user", "content": "x"}]}, 0)):
        bench = Bench(monkeypatch, **fields)
        bench.job.answer.add_text("hi", 101.0)
        bench.completion.done(bench.job, "stop")
        assert len(bench.store.history(("default", "demo"))) == remembered
    bench = Bench(monkeypatch)
    bench.job.forgotten = True
    bench.completion.done(bench.job, "stop")
    assert bench.store.history(("default", "demo")) == ()


def test_new_forgets_what_was_said_before_with_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, remembered in (({}, 4), ({"new": True}, 2)):
        bench = Bench(monkeypatch, **fields)
        first = lone_job("r0", outbox=bench.outbox)
        first.answer.add_text("before", 101.0)
        bench.completion.done(first, "stop")
        bench.job.answer.add_text("hi", 101.0)
        bench.completion.done(bench.job, "stop")
        assert len(bench.store.history(("default", "demo"))) == remembered
