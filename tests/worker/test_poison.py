"""A request with a schema or tools under which the engine died is not started again, and the like of it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.errors import EngineLost, Unsupported
from llamacpp_mqtt_deploy.ports import EntryKey
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.poison import KEPT, KEPT_S, PoisonSchemas, schema_digest
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {}}}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
KINDS: list[dict[str, Any]] = [{"response_format": FORMAT}, {"tools": TOOLS}]


@pytest.mark.parametrize("fields", KINDS)
def test_a_request_with_a_schema_or_tools_is_not_started_again_when_the_engine_died(
    bus: Bus, fields: dict[str, Any]
) -> None:
    engine = ScriptedEngine()
    engine.play(EngineLost("gone"))
    bus.worker(engine)
    bus.ask("hi", request_id="r1", **fields)
    assert bus.listener.terminal("r1")["code"] == "engine_lost"
    assert len(engine.calls) == 1
    bus.ask("another prompt", request_id="r2", session="elsewhere", **fields)
    refused = bus.listener.terminal("r2")
    assert (refused["code"], refused["retryable"]) == ("unsupported", False)
    assert len(engine.calls) == 1, "the engine hears nothing of it"
    bus.ask("no schema", request_id="r3")
    assert bus.listener.terminal("r3")["type"] == "done"


def test_a_plain_request_is_started_again_as_before(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(EngineLost("gone"))
    bus.worker(engine)
    bus.ask("hi", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert len(engine.calls) == 2


def test_an_answer_that_had_begun_makes_its_tools_suspect_only_the_second_time(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play("some ", EngineLost("gone"))
    engine.play("some ", EngineLost("gone"))
    bus.worker(engine)
    for number in (1, 2, 3):
        bus.ask("hi", request_id=f"r{number}", tools=TOOLS)
        bus.listener.terminal(f"r{number}")
    codes = [bus.listener.terminal(f"r{number}")["code"] for number in (1, 2, 3)]
    assert codes == ["engine_lost", "engine_lost", "unsupported"]


def test_a_request_that_waits_is_refused_too_when_one_like_it_ends_the_engine(bus: Bus) -> None:
    engine, gate = ScriptedEngine(slots=1), Gate()
    engine.play(gate, EngineLost("gone"))
    bus.worker(engine, engine__slots=1)
    bus.ask("hi", request_id="r1", response_format=FORMAT, session="one")
    assert gate.reached.wait(10)
    bus.ask("hi", request_id="r2", response_format=FORMAT, session="two")
    bus.listener.until(type="queued", request_id="r2")
    gate.open()
    assert bus.listener.terminal("r1")["code"] == "engine_lost"
    assert bus.listener.terminal("r2")["code"] == "unsupported"


@pytest.mark.parametrize("stream", [True, False])
def test_each_start_is_known_after_a_crash_whether_it_streams_or_not(bus: Bus, stream: bool) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play(gate)
    worker = bus.worker(engine)
    bus.ask("hi", request_id="r1", stream=stream)
    assert gate.reached.wait(10)

    def known() -> bool:
        entry = worker.daemon.parts.store.find(EntryKey("default", "demo", "r1"))
        return entry is not None and (entry.state == "streaming" or entry.starts == 1)

    eventually(known)
    gate.open()


def test_poison_is_forgotten_after_its_time_and_bounded_in_number() -> None:
    poison = PoisonSchemas()
    for number in range(KEPT + 1):
        poison.died(str(number), begun=False, now=0.0)
    assert not poison.is_known("0", now=1.0), "the oldest made room"
    assert poison.is_known("1", now=1.0)
    assert not poison.is_known("1", now=KEPT_S + 1.0)


def test_poison_is_known_to_the_end_of_its_time_and_two_deaths_of_begun_answers_make_it() -> None:
    poison = PoisonSchemas()
    poison.died("a", begun=False, now=0.0)
    assert poison.is_known("a", now=KEPT_S)
    assert not poison.is_known("a", now=KEPT_S + 0.1)
    assert not poison.is_known("never seen", now=0.0)
    poison.died("b", begun=True, now=0.0)
    assert not poison.is_known("b", now=1.0)
    poison.died("b", begun=True, now=2.0)
    assert poison.is_known("b", now=3.0)
    assert poison.is_known("b", now=KEPT_S + 2.0), "it counts from the last death"


def test_whoever_is_refused_for_a_schema_learns_for_how_long() -> None:
    poison = PoisonSchemas()
    poison.refuse("a", now=0.0)
    poison.died("a", begun=False, now=0.0)
    with pytest.raises(Unsupported, match="for 10 minutes"):
        poison.refuse("a", now=1.0)


def test_the_most_recent_deaths_are_remembered() -> None:
    poison = PoisonSchemas()
    for number in range(KEPT):
        poison.died(str(number), begun=False, now=0.0)
    poison.died("0", begun=False, now=1.0)
    poison.died("one more", begun=False, now=2.0)
    assert [poison.is_known(name, now=3.0) for name in ("0", "1", "2")] == [True, False, True]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ({}, {"tool_choice": "auto"}, True),
        ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}, False),
        ({"tools": TOOLS}, {"tools": tuple(TOOLS)}, True),
        ({"response_format": FORMAT}, {"response_format": FORMAT, "tool_choice": "auto"}, True),
        ({"response_format": FORMAT}, {"response_format": FORMAT, "tools": TOOLS}, False),
        ({"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}}, True),
        ({"tools": TOOLS}, {"tools": TOOLS, "response_format": {"type": "json_object"}}, True),
    ],
)
def test_what_the_engine_makes_a_grammar_of_is_told_apart_and_nothing_else(
    one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    nothing: dict[str, Any] = {"response_format": None, "tools": None, "tool_choice": None}
    assert (schema_digest(**(nothing | one)) == schema_digest(**(nothing | other))) is same


def test_what_matters_is_the_schema_and_the_tools_not_the_prompt() -> None:
    assert schema_digest(response_format=None, tools=(), tool_choice=None) is None
    one = schema_digest(response_format=FORMAT, tools=None, tool_choice=None)
    assert one == schema_digest(response_format=dict(reversed(FORMAT.items())), tools=(), tool_choice=None)
    assert one != schema_digest(response_format={"type": "json_object"}, tools=None, tool_choice=None)
