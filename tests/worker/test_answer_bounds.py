"""An engine that does not stop by itself is stopped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamacpp_mqtt_deploy.core.deltas import EngineCall, Reasoning
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine, Step
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

ENDLESS = 1_000_000


def _endless(call: EngineCall) -> Iterator[Step]:
    for number in range(ENDLESS):
        yield f"word {number} "


def _thinks_endlessly(call: EngineCall) -> Iterator[Step]:
    for _ in range(ENDLESS):
        yield Reasoning("hmm ")


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_ignores_max_tokens_is_stopped(bus: Bus, stream: bool) -> None:
    engine = ScriptedEngine(_endless)
    bus.worker(engine)
    bus.ask("hi", request_id="r1", max_tokens=10, stream=stream)
    done = bus.listener.terminal("r1")
    assert (done["type"], done["finish_reason"]) == ("done", "length")
    assert 100 < len(done["full_content"]) < 1000
    assert "cut" in done["warnings"][0]
    eventually(lambda: engine.busy == 0)
    assert bus.listener.read("r1").content == done["full_content"]


def test_thinking_without_end_is_stopped_too(bus: Bus) -> None:
    bus.worker(ScriptedEngine(_thinks_endlessly))
    bus.ask("hi", request_id="r1", max_tokens=10)
    assert bus.listener.terminal("r1")["finish_reason"] == "length"


def test_no_answer_is_longer_than_the_worker_keeps(bus: Bus) -> None:
    bus.worker(ScriptedEngine(_endless), limits__max_answer_bytes=2000)
    bus.ask("hi", request_id="r1", max_tokens=30_000)
    done = bus.listener.terminal("r1")
    assert done["finish_reason"] == "length"
    assert len(done["full_content"]) == 2000


def test_a_server_that_sends_letter_by_letter_may_say_all_that_was_asked_for(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(*"four letters in a token on average!")
    bus.worker(engine)
    bus.ask("hi", request_id="r1", max_tokens=9)
    assert bus.listener.terminal("r1")["finish_reason"] == "stop"
