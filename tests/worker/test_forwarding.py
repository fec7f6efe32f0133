"""What an engine says, on its way to the events: when progress is told, when the journal is asked, when it is too much."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.core.coalescer import TextKind
from llamacpp_mqtt_deploy.core.deltas import (
    Delta,
    Finished,
    FinishReason,
    Opened,
    PromptProgress,
    Reasoning,
    Text,
    TokenUsage,
    ToolCall,
)
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.ports import StoreError
from llamacpp_mqtt_deploy.worker.forwarding import Forwarder, TooMuch
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.responder import Responder
from tests.support.lone_job import Taker, lone_job
from tests.worker.test_acknowledging import HeldWrite

REST_S = 0.25


class Heard(Responder):
    """Notes what it is told, in order."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(
            outbox=Taker(),
            topic="t",
            writer=EventWriter(request_id="r1", session_id="demo", max_bytes=4096),
            correlation=None,
            silent=silent,
            wake=lambda _s, _call: None,
        )
        self.told: list[Any] = []

    @override
    def start(self, fields: Mapping[str, Any]) -> None:
        self.told.append(("start", dict(fields)))

    @override
    def progress(self, *, processed: int, total: int, cached: int) -> None:
        self.told.append(("progress", processed, total, cached))

    @override
    def text(self, kind: TextKind, text: str) -> None:
        self.told.append((kind, text))

    @override
    def piece(self, kind: TextKind, text: str) -> None:
        self.told.append(("piece", text))

    @override
    def tool_call(self, delta: dict[str, Any]) -> None:
        self.told.append(("call", delta))

    @override
    def settle(self, *, pieces: int = 0) -> float:
        self.told.append(("settle", pieces))
        return REST_S

    @override
    def flush(self) -> None:
        self.told.append("flush")

    @override
    def hold(self) -> None:
        self.told.append("hold")

    @override
    def release(self) -> None:
        self.told.append("release")

    @override
    def withhold_text(self) -> None:
        self.told.append("withhold")

    def without(self, *kinds: str) -> list[Any]:
        return [told for told in self.told if told[0] not in kinds]


class Bench:
    """A forwarder; the journal takes the mark when the test says so, or fails to begin with it."""

    def __init__(
        self,
        *,
        native: bool = True,
        silent: bool = False,
        at_once: bool = False,
        journal_fails: bool = False,
        max_answer_bytes: int = 1_000_000,
        max_tokens: int | None = None,
        **fields: Any,
    ) -> None:
        self.heard = Heard(silent=silent)
        self.job = lone_job(responder=self.heard, **fields)
        self.marks: list[HeldWrite] = []
        self.opened: list[bool] = []
        self._at_once, self._journal_fails = at_once, journal_fails
        self.forwarder = Forwarder(
            job=self.job,
            native=native,
            worker_id="w1",
            opened=self._opened,
            mark=self._mark,
            max_answer_bytes=max_answer_bytes,
            max_tokens=max_tokens,
        )

    def _opened(self, job: Job) -> bool:
        self.opened.append(job.live)
        return self._at_once

    def _mark(self, job: Job) -> HeldWrite | None:
        assert job is self.job
        self.marks.append(HeldWrite())
        return None if self._journal_fails else self.marks[-1]

    def feed(self, *deltas: Delta) -> float:
        return self.forwarder.feed(deltas)


# --- progress ----------------------------------------------------------------------------------------------------------


def test_the_work_on_a_prompt_is_told_at_once_where_256_tokens_or_more_are_left_of_it() -> None:
    for processed, told in ((100, [("progress", 100, 356, 7)]), (101, [])):
        bench = Bench()
        bench.feed(PromptProgress(processed, 356, 7))
        assert bench.heard.told == told
        assert bench.job.answer.progress == PromptProgress(processed, 356, 7)


def test_more_of_a_long_prompt_is_told_each_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, now = Bench(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for passed_s, processed in ((0.0, 0), (0.25, 200), (0.25, 400), (0.25, 600), (0.5, 999)):
        now[0] += passed_s
        bench.feed(PromptProgress(processed, 1000, 0))
    assert [told[1] for told in bench.heard.told] == [0, 400, 999]


# --- how much is too much ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Text, Reasoning])
def test_an_answer_may_be_as_long_as_the_worker_keeps_and_no_longer(kind: type[Text | Reasoning]) -> None:
    bench = Bench(max_answer_bytes=12)
    bench.feed(kind("é" * 6))
    with pytest.raises(TooMuch):
        bench.feed(kind("x"))


@pytest.mark.parametrize("kind", [Text, Reasoning])
@pytest.mark.parametrize("stream", [True, False, "sentence"])
@pytest.mark.parametrize(
    "before, said, kept",
    [("", "x" * 100_000, "x" * 12), ("é" * 5, "é漢字", "é"), ("é" * 5, "漢字", ""), ("é" * 6, "x", "")],
)
def test_a_delta_that_is_too_long_is_told_as_far_as_the_answer_may_go(
    kind: type[Text | Reasoning], stream: bool | str, before: str, said: str, kept: str
) -> None:
    bench = Bench(silent=stream is False, max_answer_bytes=12, stream=stream)
    bench.feed(kind(before))
    with pytest.raises(TooMuch):
        bench.feed(kind(said), Text("z"), ToolCall(0, "c", "look", "{}"))
    bench.forwarder.finish(Finished("length", TokenUsage(1, 1)))
    answer = bench.job.answer
    assert answer.text() + answer.thoughts() == before + kept
    assert (answer.calls, answer.size <= 12) == ({}, True)
    told = [each[1] for each in bench.heard.told if each[0] in ("content", "reasoning", "piece")]
    assert "".join(told) == ("" if stream is False else before + kept)


@pytest.mark.parametrize("native", [True, False])
def test_more_deltas_than_tokens_were_asked_for_are_too_much_when_they_are_long_too(native: bool) -> None:
    bench = Bench(native=native, max_tokens=2)
    bench.feed(Text("x" * 32, pieces=2))
    bench.feed(Text("", pieces=5))  # letter by letter: deltas alone prove nothing
    with pytest.raises(TooMuch):
        bench.feed(Text("x"))


def test_two_tokens_may_be_as_long_as_they_like() -> None:
    Bench(max_tokens=2).feed(Text("x" * 1000, pieces=2))


# --- the pace ----------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_read_say_how_quick_an_engine_is() -> None:
    bench = Bench()
    for deltas in ([Text("a")], [Text("b"), Text("c")], [Text("d")], [Text("ef", pieces=2)]):
        assert bench.feed(*deltas) == REST_S
    assert [told[1] for told in bench.heard.told if told[0] == "settle"] == [1, 2, 1, 2]


def test_nothing_holds_an_engine_up_before_its_first_token_or_where_nothing_is_streamed() -> None:
    assert Bench().feed(Opened("m"), PromptProgress(0, 9, 0)) == 0.0
    for bench in (Bench(native=False), Bench(silent=True), Bench()):
        assert bench.feed(Opened("m", streams=bench.heard.silent), Text("a")) == 0.0
        assert bench.heard.without("start") == []


# --- the journal -------------------------------------------------------------------------------------------------------


def test_the_chunks_wait_for_the_journal_and_go_when_it_has_the_mark() -> None:
    bench = Bench()
    bench.feed(Opened("m"), PromptProgress(0, 9, 0))
    assert bench.marks == [], "during its prompt a request may still be started again"
    prompt_done = [bench.job.prompt_done]
    bench.feed(Text("a"), Text("b"))
    assert [*prompt_done, bench.job.prompt_done] == [False, True]
    assert bench.heard.without("start", "settle") == ["hold", ("content", "a"), ("content", "b")]
    (mark,) = bench.marks
    assert bench.job.marking is mark
    mark.end()
    assert bench.heard.told[-1] == "release"
    assert "withhold" not in bench.heard.told


def test_the_journal_is_asked_when_the_prompt_is_done_and_not_once_more_for_the_first_token() -> None:
    bench = Bench()
    bench.feed(Opened("m"), PromptProgress(8, 9, 0))
    assert bench.marks == []
    bench.feed(PromptProgress(9, 9, 0))
    assert len(bench.marks) == 1
    assert "hold" not in bench.heard.told, "what is not a chunk need not wait"
    bench.feed(Reasoning("hm"))
    assert len(bench.marks) == 1
    assert "hold" in bench.heard.told


def test_the_journal_is_asked_at_once_where_the_prompt_is_short() -> None:
    bench = Bench(at_once=True)
    bench.feed(Opened("m"))
    assert (len(bench.marks), bench.opened) == (1, [True])
    bench.feed(ToolCall(0, "c", "look", "{}"))
    assert len(bench.marks) == 1


def test_what_the_journal_turns_out_to_have_refused_is_not_told() -> None:
    bench = Bench()
    bench.feed(Text("a"))
    bench.marks[0].end(StoreError("no space left"))
    assert bench.heard.told[-2:] == ["withhold", "release"]


def test_where_the_journal_cannot_even_begin_no_text_is_told_and_nothing_waits() -> None:
    bench = Bench(journal_fails=True)
    bench.feed(Text("a"))
    assert "withhold" in bench.heard.told
    assert "hold" not in bench.heard.told
    assert bench.job.marking is None


@pytest.mark.parametrize("how", ["paced", "silent", "engine in one piece"])
def test_an_answer_that_is_not_streamed_from_the_engine_is_not_marked_before_it_is_told(how: str) -> None:
    """Until then a crash costs nobody anything: it can be started again."""
    bench = Bench(native=how != "paced", silent=how == "silent", at_once=True)
    bench.feed(Opened("m", streams=how != "engine in one piece"), PromptProgress(9, 9, 0), Text("a"))
    assert (bench.marks, bench.job.live, bench.opened) == ([], False, [False])
    assert bench.job.answer.text() == "a"


# --- start and end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine, asked, told", [("m", "alias", "m"), (None, "alias", "alias"), (None, None, "")])
def test_the_start_names_the_model_as_the_engine_does_or_else_as_the_request_did(
    engine: str | None, asked: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1234.9)
    fields: dict[str, Any] = {"model": asked} if asked else {}
    bench = Bench(**fields)
    bench.feed(Opened(engine))
    assert bench.job.opened
    assert bench.heard.told == [("start", {"model": told, "worker": "w1", "created": 1234})]


def test_the_start_tells_warnings_of_request_and_engine_once_and_the_metadata() -> None:
    bench = Bench(metadata={"room": 7}, max_token=3)
    bench.feed(Opened("m", warnings=("odd",)))
    bench.feed(Opened("m", warnings=("odd", "odder")))
    (_, first), (_, again) = bench.heard.told
    assert "max_tokens" in first["warnings"][0]
    assert first["warnings"][1:] == ["odd"]
    assert again["warnings"][1:] == ["odd", "odder"]
    assert first["metadata"] == {"room": 7}


@pytest.mark.parametrize("native", [True, False])
def test_the_rest_of_a_sentence_goes_out_when_the_engine_is_done(native: bool) -> None:
    bench = Bench(native=native, stream="sentence")
    bench.feed(Text("One. Two"))
    bench.forwarder.finish(Finished("stop", TokenUsage(3, -1)))
    wanted = ["hold", ("piece", "One."), ("piece", " Two"), "flush"] if native else []
    assert bench.heard.without("settle") == wanted
    assert bench.job.answer.finished == Finished("stop", TokenUsage(3, 0)), "what cannot be a count is none"


@pytest.mark.parametrize("reason", ["stop", "tool_calls", "length", "cancelled"])
@pytest.mark.parametrize("native", [True, False])
def test_a_call_without_arguments_gets_an_empty_object_unless_it_was_cut_off(
    native: bool, reason: FinishReason
) -> None:
    """Servers send nothing where a tool takes no arguments; the client has to be able to answer the call."""
    bench = Bench(native=native)
    bench.feed(ToolCall(0, "c0", "now", ""), ToolCall(1, "c1", "look", '{"a": 1}'), ToolCall(2, "c2", "here", " "))
    bench.feed(ToolCall(3, "c3", None, ""))
    told = len(bench.heard.told)
    bench.forwarder.finish(Finished(reason, TokenUsage(3, 4)))
    whole = reason in ("stop", "tool_calls")
    given = [("call", {"index": index, "arguments": "{}"}) for index in (0, 2)] if whole and native else []
    assert bench.heard.told[told:] == [*given, *(["flush"] if native else [])]
    calls = bench.job.answer.message("", with_calls=True)["tool_calls"]
    assert [call["id"] for call in calls] == (["c0", "c1", "c2"] if whole else ["c1"])
    assert [json.loads(call["function"]["arguments"]) for call in calls] == (
        [{}, {"a": 1}, {}] if whole else [{"a": 1}]
    )


def test_every_kind_is_told_at_once_and_a_sentence_that_was_begun_goes_before_it() -> None:
    for stream, wanted in ((True, [("content", "One")]), ("sentence", [("piece", "One")])):
        bench = Bench(stream=stream)
        bench.feed(Text("One"), Reasoning("hm"), ToolCall(0, "c", "look", "{}"), Reasoning("hm"))
        call = {"index": 0, "id": "c", "name": "look", "arguments": "{}"}
        assert bench.heard.without("settle") == [
            "hold",
            *wanted,
            ("reasoning", "hm"),
            ("call", call),
            ("reasoning", "hm"),
        ]
        bench.feed(Text("Two"), ToolCall(0, None, None, " "))
        assert bench.heard.without("settle")[-2:] == [(wanted[0][0], "Two"), ("call", {"index": 0, "arguments": " "})]


@pytest.mark.parametrize("delta", [Text("a"), Reasoning("a"), ToolCall(0, "c", "look", "{}")])
def test_the_first_word_of_any_kind_ends_the_prompt(delta: Delta) -> None:
    bench = Bench()
    bench.feed(delta)
    assert bench.job.prompt_done
    assert len(bench.marks) == 1


def test_nothing_of_an_answer_that_is_collected_is_told() -> None:
    bench = Bench(native=False)
    bench.feed(Text("a"), Reasoning("hm"), ToolCall(0, "c", "look", "{}"))
    assert bench.heard.told == []
    assert (bench.job.answer.text(), bench.job.answer.thoughts(), len(bench.job.answer.tool_calls())) == ("a", "hm", 1)
