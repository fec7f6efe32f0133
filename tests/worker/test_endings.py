"""Every accepted request ends with exactly one terminal event, whatever goes wrong while it ends."""

from __future__ import annotations

from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, PromptProgress, Text, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.ports import Published
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from llamacpp_mqtt_deploy.worker.redelivery import Redelivery
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus


def test_text_that_no_journal_can_hold_costs_its_memory_and_neither_the_end_nor_the_session(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(Text("half a pair: \ud83d"))
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["full_content"] == "half a pair: \ufffd"
    bus.ask("two", request_id="r2")
    assert bus.listener.terminal("r2")["full_content"] == "two"


@pytest.mark.parametrize("step", ["finish", "send"])
def test_a_defect_while_an_end_is_written_or_sent_still_brings_the_end_and_frees_the_session(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    worker = bus.worker()
    with monkeypatch.context() as patch:
        if step == "finish":
            patch.setattr(worker.daemon.parts.store, "finish", broken)
        else:
            patch.setattr(Redelivery, "_publish", broken)
        bus.ask("one", request_id="r1")
        eventually(lambda: worker.daemon.parts.counters.snapshot(period_s=1.0)["requests"]["done"] == 1)  # type: ignore[index]
        assert len(worker.daemon.parts.registry) == 0
    assert bus.listener.terminal("r1")["full_content"] == "one"
    bus.ask("two", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


@pytest.mark.parametrize("unfit", ["\ud83d", "a\nb", "i" * 1000, "é"])
def test_a_tool_call_whose_id_is_unfit_gets_one_of_ours(bus: Bus, unfit: str) -> None:
    engine = ScriptedEngine()
    engine.play(ToolCall(0, unfit, "look", '{"at": "\ud83d"}'), Finished("tool_calls", TokenUsage()))
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    done = bus.listener.terminal("r1")
    call = {"id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"at": "\ufffd"}'}}
    assert done["message"]["tool_calls"] == [call]
    assert bus.listener.read("r1").tool_calls == [call]
    bus.ask(request_id="r2", tool_results=[{"tool_call_id": "call_0", "content": "dark"}])
    assert bus.listener.terminal("r2")["type"] == "done"


@pytest.mark.parametrize(
    "calls",
    [
        [ToolCall(0, "c", "l\ud83d", "{}")],
        [ToolCall(0, "c", "look\x1b[2J", "{}")],
        [ToolCall(0, "c", "n" * 65, "{}")],
        [ToolCall(number, f"c{number}", "look", "{}") for number in range(129)],
        [ToolCall(0, "c", "look", '"'), *[ToolCall(0, None, None, "x" * 100_000)] * 11],
    ],
    ids=["half a pair", "control characters", "a name too long", "too many calls", "arguments without an end"],
)
def test_a_tool_call_that_is_none_ends_the_request_with_an_engine_error(bus: Bus, calls: list[ToolCall]) -> None:
    engine = ScriptedEngine()
    engine.play(*calls)
    bus.worker(engine)
    bus.ask("one", request_id="r1")
    end = bus.listener.terminal("r1")
    assert end["code"] == "engine_error"
    assert "tool" in end["message"]
    bus.ask("two", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


@pytest.mark.parametrize("refused_seq", [0, 1, 2])
def test_a_stream_of_which_the_outbox_refused_a_chunk_ends_interrupted_without_a_hole(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, refused_seq: int
) -> None:
    """The last chunk (2) as well: its `done` would claim to be the whole answer."""
    engine = ScriptedEngine()
    engine.play(Text("one "), Text("two "), Text("three"))
    worker = bus.worker(engine, streaming__mode="simulated", streaming__chunk_chars=4)
    link = worker.daemon.parts.link
    publish = link.publish
    refusals: list[bytes] = []

    def refusing(topic: str, payload: bytes, **wishes: Any) -> Published:
        if not refusals and b'"type":"chunk"' in payload and b'"seq":%d,' % refused_seq in payload:
            refusals.append(payload)
            return "full"
        return publish(topic, payload, **wishes)

    monkeypatch.setattr(link, "publish", refusing)
    bus.ask("count", request_id="r1")
    end = bus.listener.terminal("r1")
    assert (end["type"], end["code"], end["seq"]) == ("error", "interrupted", refused_seq)
    assert end["partial_content"] == bus.listener.read("r1").content == ("one two "[: 4 * refused_seq])
    assert len(refusals) == 1
    bus.ask("again", request_id="r2")
    assert bus.listener.terminal("r2")["type"] == "done"


def test_an_error_tells_the_tokens_that_were_used_and_none_where_the_engine_told_none(bus: Bus) -> None:
    engine = ScriptedEngine()
    engine.play(EngineFailed("at once"))
    engine.play(PromptProgress(5, 7, 3), EngineFailed("in the prompt"))
    engine.play("one ", "two", EngineFailed("in the answer"))
    bus.worker(engine)
    for number in range(3):
        bus.ask("hi", request_id=f"r{number}")
    at_once, in_the_prompt, in_the_answer = (bus.listener.terminal(f"r{number}") for number in range(3))
    assert "usage" not in at_once
    assert (in_the_prompt["usage"]["prompt_tokens"], in_the_prompt["usage"]["cached_tokens"]) == (7, 3)
    assert in_the_answer["usage"]["completion_tokens"] == 2
