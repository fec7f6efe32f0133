"""What a terminal event and the history hold of an answer is what the chunks told, in the order in which it was generated."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.support.whole_worker import Bus

CALLS = (ToolCall(0, "c0", "look", "{}"), Finished("tool_calls", TokenUsage()))


def _told(bus: Bus, request_id: str, kind: str = "content") -> str:
    return "".join(event.get(kind, "") for event in bus.listener.of(request_id) if event["type"] == "chunk")


@pytest.mark.parametrize("mode, stream", [("native", True), ("native", "sentence"), ("simulated", True)])
def test_the_partial_text_of_an_error_is_what_the_chunks_told(bus: Bus, mode: str, stream: bool | str) -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("Hm."), "One. Two and", EngineFailed("broken"))
    bus.worker(engine, streaming__mode=mode)
    bus.ask("count", request_id="r1", stream=stream)
    assert bus.listener.terminal("r1")["partial_content"] == _told(bus, "r1") == "One. Two and"
    bus.listener.read("r1")


@pytest.mark.parametrize("how", ["timeout", "cancel", "shutdown"])
def test_a_paced_answer_that_is_cut_short_holds_no_more_than_was_told(bus: Bus, how: str) -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("R" * 8), "one two three four", *CALLS)
    worker = bus.worker(
        engine,
        streaming__mode="simulated",
        streaming__chunk_chars=4,
        streaming__chunk_interval_s=0.4,
        limits__drain_timeout_s=0,
    )
    bus.ask("count", request_id="r1", timeout_s=1.5 if how == "timeout" else 60)
    bus.listener.until(type="chunk", content="one ")
    if how == "cancel":
        bus.control("cancel", request_id="r1")
    elif how == "shutdown":
        worker.stop()
    end = bus.listener.terminal("r1")
    told = _told(bus, "r1")
    assert "one two three four".startswith(told)
    assert told != "one two three four"
    if how == "cancel":
        assert end["full_content"] == end["message"]["content"] == told
        assert end["full_reasoning"] == _told(bus, "r1", "reasoning")
        assert "tool_calls" not in end["message"], "no chunk told of them"
        history = worker.daemon.parts.store.history(("default", "demo"))
        assert [message["content"] for message in history] == ["count", told]
    else:
        assert end["partial_content"] == told


def test_reasoning_that_is_cancelled_while_it_is_paced_is_not_told_in_full(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("one two three four"), "five")
    bus.worker(engine, streaming__mode="simulated", streaming__chunk_chars=4, streaming__chunk_interval_s=0.4)
    bus.ask("count", request_id="r1")
    bus.listener.until(type="chunk", reasoning="one ")
    bus.control("cancel", request_id="r1")
    done = bus.listener.terminal("r1")
    assert done["full_content"] == ""
    assert done.get("full_reasoning", "") == _told(bus, "r1", "reasoning") != "one two three four"


def _in_order(bus: Bus, request_id: str) -> list[Any]:
    """The text of the chunks by kind, neighbours of one kind joined."""
    told: list[Any] = []
    for event in bus.listener.of(request_id):
        for kind in ("reasoning", "content", "tool_calls"):
            if event["type"] == "chunk" and kind in event:
                value = event[kind] if kind != "tool_calls" else json.dumps([call["name"] for call in event[kind]])
                if told and told[-1][0] == kind:
                    told[-1][1] += value
                else:
                    told.append([kind, value])
    return told


def test_sentences_reasoning_and_calls_come_in_the_order_in_which_they_were_generated(bus: Bus) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("Let me", Reasoning("a"), Reasoning("b"), " see. I", Reasoning("c"), "Done. And", *CALLS[:1], gate)
    bus.worker(engine)
    bus.broker.hold_pubacks()  # what waits for an acknowledgement must not be overtaken either
    bus.ask("go", request_id="r1", stream="sentence")
    assert gate.reached.wait(10)
    gate.open()
    bus.broker.release_pubacks()
    bus.listener.terminal("r1")
    assert _in_order(bus, "r1") == [
        ["content", "Let me"],
        ["reasoning", "ab"],
        ["content", " see. I"],
        ["reasoning", "c"],
        ["content", "Done. And"],
        ["tool_calls", '["look"]'],
    ]
