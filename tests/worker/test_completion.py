"""What the operator's log and the client's timings say of an ended request."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.core.deltas import Finished, PromptProgress, TokenUsage
from llamacpp_mqtt_deploy.core.errors import EngineFailed, EngineLost
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from llamacpp_mqtt_deploy.worker.responder import Responder
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
    timings = bus.listener.terminal("r2")["timings"]
    assert 200 <= timings["queue_ms"] <= timings["total_ms"]
    gate.open()


@pytest.mark.parametrize("part", ["chunk_record", "error"])
def test_a_defect_in_the_last_step_still_brings_an_end(bus: Bus, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def broken(*_: object, **__: object) -> Any:
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
    bus.ask("two", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


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
