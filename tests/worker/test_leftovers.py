"""What a request leaves behind when it is over: nothing that only the garbage collector would find."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.jobs import Job
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "fields",
    [{}, {"stream": False}, {"stream": "sentence"}, {"new": True}, {"messages": [{"role": "user", "content": "hi"}]}],
    ids=["stream", "whole", "sentences", "new", "messages"],
)
@pytest.mark.usefixtures("without_collector")
def test_the_job_of_a_request_that_has_ended_is_gone(bus: Bus, fields: dict[str, Any]) -> None:
    bus.worker(ScriptedEngine(slots=2))
    for number in range(5):
        bus.ask(None if "messages" in fields else "one two three", request_id=f"r{number}", **fields)
        assert bus.listener.terminal(f"r{number}")["type"] == "done"
    eventually(lambda: _jobs() == 0)


@pytest.mark.usefixtures("without_collector")
def test_the_job_of_a_request_that_was_cancelled_is_gone(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    bus.worker(engine)
    engine.play("one", gate, "two")
    bus.ask("go on", request_id="r1")
    bus.listener.until(type="chunk", request_id="r1")
    bus.control("cancel", request_id="r1")
    assert bus.listener.terminal("r1")["finish_reason"] == "cancelled"
    eventually(lambda: _jobs() == 0)


def _jobs() -> int:
    return sum(type(each) is Job for each in gc.get_objects())
