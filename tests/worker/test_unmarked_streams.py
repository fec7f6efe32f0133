"""A stream whose beginning the journal could not note tells nothing that a crash would tell a second time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.ports import EntryKey, StoreError
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

KEY = EntryKey("default", "demo", "r1")


class _Failing:
    """A write that turns out to have failed when it is told to."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[StoreError | None], None]] = []
        self.over = False

    def done(self) -> bool:
        return self.over

    def hurry(self) -> None:
        pass

    def on_done(self, callback: Callable[[StoreError | None], None]) -> None:
        if self.over:
            callback(StoreError("no space left"))
        else:
            self.callbacks.append(callback)

    def wait(self, timeout_s: float) -> None:
        raise StoreError("no space left")

    def fail(self) -> None:
        self.over = True
        for callback in self.callbacks:
            callback(StoreError("no space left"))


def _refuse(*_: Any) -> Any:
    raise StoreError("no space left")


def _at_once(_: EntryKey) -> _Failing:
    write = _Failing()
    write.fail()
    return write


@pytest.mark.parametrize("mode", ["native", "simulated"])
@pytest.mark.parametrize("how", [_refuse, _at_once])
def test_an_answer_that_the_journal_cannot_mark_comes_whole_with_its_end(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, how: Any, mode: str
) -> None:
    engine = ScriptedEngine()
    call = ToolCall(0, "c0", "look", "{}")
    engine.play(Reasoning("hm"), "the ", "answer", call, Finished("tool_calls", TokenUsage(1, 3)))
    worker = bus.worker(engine, streaming__mode=mode)
    monkeypatch.setattr(worker.daemon.parts.store, "mark_streaming_soon", how)
    monkeypatch.setattr(worker.daemon.parts.store, "mark_streaming", _refuse)
    bus.ask("hi", request_id="r1")
    done = bus.listener.terminal("r1")
    assert (done["full_content"], done["full_reasoning"], done["seq"]) == ("the answer", "hm", 0)
    assert done["message"]["tool_calls"][0]["id"] == "c0"
    assert [event["type"] for event in bus.listener.of("r1") if event["type"] == "chunk"] == []


def test_chunks_that_waited_for_the_mark_are_not_told_when_it_failed(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("one ", "two ", gate, "three")
    worker = bus.worker(engine, streaming__heartbeat_s=0.2)
    write = _Failing()
    monkeypatch.setattr(worker.daemon.parts.store, "mark_streaming_soon", lambda _: write)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    write.fail()
    bus.listener.until(type="ping", state="generating")  # its client knows that it is alive
    gate.open()
    assert bus.listener.terminal("r1")["full_content"] == "one two three"
    assert bus.listener.read("r1").content == "one two three"
    assert not any(event["type"] == "chunk" for event in bus.listener.of("r1"))


@pytest.mark.parametrize("with_text", [True, False])
def test_an_answer_that_ends_before_its_mark_failed_counts_no_chunks(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, with_text: bool
) -> None:
    engine, worker_waits = ScriptedEngine(), threading.Event()
    engine.play("one ", "two")
    worker = bus.worker(engine)

    class Slow(_Failing):
        def wait(self, timeout_s: float) -> None:
            worker_waits.set()
            eventually(self.done)
            super().wait(timeout_s)

    write = Slow()
    monkeypatch.setattr(worker.daemon.parts.store, "mark_streaming_soon", lambda _: write)
    bus.ask("hi", request_id="r1", full_content=with_text)
    assert worker_waits.wait(10), "the end waits for the mark"
    write.fail()
    assert bus.listener.terminal("r1")["seq"] == 0
    assert bus.listener.terminal("r1")["full_content"] == "one two"
    assert not any(event["type"] == "chunk" for event in bus.listener.of("r1"))


def test_a_long_answer_without_a_mark_goes_out_in_chunks_before_its_end(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    engine.play("word " * 1000)
    worker = bus.worker(engine, limits__max_event_bytes=1024)
    monkeypatch.setattr(worker.daemon.parts.store, "mark_streaming_soon", _refuse)
    bus.ask("hi", request_id="r1")
    bus.listener.terminal("r1")
    assert bus.listener.read("r1").content == "word " * 1000


def test_a_crash_under_an_answer_without_a_mark_mixes_no_texts(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = ScriptedEngine(), Gate()
    engine.play("one way ", gate)
    worker = bus.worker(engine)
    monkeypatch.setattr(worker.daemon.parts.store, "mark_streaming_soon", _refuse)
    bus.ask("hi", request_id="r1")
    assert gate.reached.wait(10)
    store = worker.daemon.parts.store
    eventually(lambda: store.find(KEY) is not None)
    entry = store.find(KEY)
    assert entry is not None
    assert entry.state == "accepted", "the next life starts it again"
    eventually(lambda: any(event["type"] == "start" for event in bus.listener.of("r1")))
    assert not any(event["type"] == "chunk" for event in bus.listener.of("r1"))
    gate.open()
