"""One request on its engine: when the journal hears of it, how often it is started, and what it leaves to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs
from typing_extensions import override

from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Opened
from llamacpp_mqtt_deploy.core.errors import EngineLost
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.stopping import StopSignal
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker
from tests.worker.test_background import HeldStore


def _becomes(worker: WholeWorker, state: str, starts: int) -> None:
    def noted() -> bool:
        entry = worker.daemon.parts.store.find(EntryKey("default", "demo", "r1"))
        return entry is not None and (entry.state, entry.starts) == (state, starts)

    eventually(noted)


class SlowToOpen(ScriptedEngine):
    """Says that it loads, and nothing more until the gate opens."""

    gate = Gate()

    @override
    def stream(self, call: EngineCall, *, stop: StopSignal, on_wait: Callable[[str], None]) -> Iterator[Delta]:
        on_wait("loading")
        self.gate.wait(stop, 10)
        yield from super().stream(call, stop=stop, on_wait=on_wait)


@pytest.mark.parametrize("chars, noted", [(4000, ("streaming", 0)), (4001, ("accepted", 1))])
def test_a_short_prompt_is_noted_as_begun_at_once_and_a_long_one_as_started(
    bus: Bus, chars: int, noted: tuple[str, int]
) -> None:
    """During a long prompt a crash must not cost the request its chance to be started again."""
    engine, gate = ScriptedEngine(), Gate()
    engine.play(Opened("m"), gate, "hi")
    worker = bus.worker(engine)
    bus.ask("x" * chars, request_id="r1")
    assert gate.reached.wait(10)
    _becomes(worker, *noted)
    gate.open()
    bus.listener.terminal("r1")


def test_the_history_belongs_to_the_length_of_a_prompt(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("y" * 2000)
    engine.play(Opened("m"), gate, "hi")
    worker = bus.worker(engine)
    bus.ask("x" * 1000, request_id="r0")
    bus.listener.terminal("r0")
    bus.ask("z" * 1001, request_id="r1")
    assert gate.reached.wait(10)
    _becomes(worker, "accepted", 1)
    gate.open()
    bus.listener.terminal("r1")


def test_a_second_start_is_counted_before_anything_is_said(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play(EngineLost("gone"))
    engine.play(Opened("m"), gate, "hi")
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    _becomes(worker, "accepted", 1)
    gate.open()
    bus.listener.terminal("r1")


@pytest.mark.parametrize("fields", [{"stream": False}, {}])
def test_an_answer_that_is_not_streamed_counts_its_start_and_is_not_noted_as_begun(
    bus: Bus, fields: dict[str, Any]
) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("one ", gate, "two")
    worker = bus.worker(engine, streaming__mode="native" if fields else "simulated")
    bus.ask("hi", request_id="r1", **fields)
    assert gate.reached.wait(10)
    _becomes(worker, "accepted", 1)
    gate.open()
    bus.listener.terminal("r1")


def test_a_request_that_was_started_as_often_as_allowed_is_not_started_once_more(bus: Bus) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play(gate)
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.ask("hi", request_id="r2", session="other")
    bus.listener.until(type="queued", request_id="r2")
    job = worker.daemon.parts.registry.find(EntryKey("default", "other", "r2"))
    assert job is not None
    job.starts = 3  # in earlier lives, of which the limit was higher
    gate.open()
    end = bus.listener.terminal("r2")
    assert end["code"] == "engine_lost"
    assert "3 times" in end["message"]
    assert len(engine.calls) == 1


def test_a_slot_is_free_for_the_next_request_while_the_disk_writes_the_end_of_the_last(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker(ScriptedEngine(slots=1))
    held = HeldStore(worker, monkeypatch, "finish", matches="slow")
    bus.ask("one", request_id="slow")
    assert held.reached.wait(10)
    bus.ask("two", request_id="r2", session="other")
    assert bus.listener.terminal("r2")["full_content"] == "two"
    held.open.set()
    assert bus.listener.terminal("slow")["full_content"] == "one"


def test_a_defect_ends_its_request_with_internal_and_costs_no_other_one(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("a defect")

    bus.worker(ScriptedEngine(slots=1))
    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(PromptBuilder, "build", broken)
        bus.ask("hi", request_id="r1")
        assert bus.listener.terminal("r1")["code"] == "internal"
    assert [line["request_id"] for line in lines if line["event"] == "generation.failed"] == ["r1"]
    bus.ask("hi", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


def test_whoever_sends_his_request_again_while_it_waits_for_the_engine_hears_what_it_waits_for(bus: Bus) -> None:
    engine = SlowToOpen()
    engine.gate = gate = Gate()
    bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    bus.listener.until(type="queued", request_id="r1")
    bus.ask("hi", request_id="r1")
    eventually(lambda: len([event for event in bus.listener.of("r1") if event["type"] == "queued"]) == 2)
    told = [(event["reason"], event["position"]) for event in bus.listener.of("r1") if event["type"] == "queued"]
    assert told == [("loading", 0)] * 2
    gate.open()


def test_a_call_with_a_schema_may_be_given_to_an_engine_once_and_a_plain_one_again(bus: Bus) -> None:
    engine = ScriptedEngine()
    bus.worker(engine)
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    bus.ask("hi", request_id="r1", response_format=schema)
    bus.ask("hi", request_id="r2")
    bus.listener.terminal("r2")
    assert [call.once for call in engine.calls] == [True, False]


def test_an_answer_that_the_engine_gave_without_a_word_is_not_paced(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    engine.play(Opened("m"))
    worker = bus.worker(engine, streaming__mode="simulated")
    held = HeldStore(worker, monkeypatch, "mark_streaming")
    bus.ask("hi", request_id="r1")
    done = bus.listener.terminal("r1")
    assert (done["full_content"], done["seq"]) == ("", 0)
    assert not held.reached.is_set()


@pytest.mark.parametrize("blind_for, messages, kind", [(1, [3, 1], "done"), (2, [3], "error"), (0, [1], "done")])
def test_a_history_whose_length_was_guessed_is_fitted_again_when_the_engine_refuses_it(
    bus: Bus, blind_for: int, messages: list[int], kind: str
) -> None:
    """An engine that cannot be asked at that moment must not cost a request: it is told of a context that is too small for good."""
    blind = 0
    given: list[int] = []

    def count(call: EngineCall) -> int | None:
        nonlocal blind
        if blind > 0 and call.sampling.get("max_tokens") == 10:
            blind -= 1
            return None
        return sum(len(message["content"]) for message in call.messages)

    class Counting(ScriptedEngine):
        @override
        def stream(self, call: EngineCall, *, stop: StopSignal, on_wait: Callable[[str], None]) -> Iterator[Delta]:
            given.append(len(call.messages))
            nonlocal blind
            kept, blind = blind, 0
            try:
                yield from super().stream(call, stop=stop, on_wait=on_wait)
            finally:
                blind = kept

    engine = Counting(n_ctx=3000, count=count)
    for answer in ("b" * 1000, "c", "d"):
        engine.play(answer)
    bus.worker(engine)
    bus.ask("a" * 1000, request_id="r0")
    bus.listener.terminal("r0")
    given.clear()
    blind = blind_for
    bus.ask("z" * 1200, request_id="r1", max_tokens=10)
    end = bus.listener.terminal("r1")
    assert (end["type"], given) == (kind, messages)
    if kind == "error":
        assert end["code"] == "context_overflow"
