"""What every engine owes the worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import (
    Delta,
    EngineCall,
    Finished,
    Opened,
    PromptProgress,
    Reasoning,
    Text,
    ToolCall,
)
from llamacpp_mqtt_deploy.core.errors import ContextOverflow, EngineUnavailable, IdleTimeout, ShuttingDown
from llamacpp_mqtt_deploy.ports import Engine
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from tests.engines.members import MEMBERS, Member
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

FREE_WITHIN_S = 1.5
"""The promise is 0.5 s; the rest is for busy machines that run many tests at once."""


@pytest.fixture(params=sorted(MEMBERS))
def member(request: pytest.FixtureRequest) -> Iterator[Member]:
    made = MEMBERS[request.param](request)
    member = next(made)
    assert member.engine.wait_ready(StopSignal(), 30)
    yield member
    member.engine.close(Deadline(5))
    member.unreachable.close(Deadline(5))
    next(made, None)


def play(engine: Engine, call: EngineCall, waits: list[str] | None = None) -> list[Delta]:
    return list(engine.stream(call, stop=StopSignal(), on_wait=(waits if waits is not None else []).append))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


class Run(threading.Thread):
    """A generation in a thread of its own, with what came of it."""

    def __init__(self, engine: Engine, call: EngineCall) -> None:
        super().__init__(name="generation", daemon=True)
        self.stop = StopSignal()
        self.deltas: list[Delta] = []
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self._engine = engine
        self._call = call
        self.start()

    def run(self) -> None:
        try:
            for delta in self._engine.stream(self._call, stop=self.stop, on_wait=lambda reason: None):
                self.deltas.append(delta)
        except BaseException as error:  # noqa: BLE001 - whatever came is what the test looks at
            self.error = error
        self.ended_at = time.monotonic()

    def has(self, kind: type[Any]) -> bool:
        return any(isinstance(delta, kind) for delta in self.deltas)

    def cancel(self) -> float:
        """Stop it; the seconds until `Stopped` came out."""
        self.stop.set("cancelled")
        self.join(10)
        assert not self.is_alive()
        assert isinstance(self.error, Stopped), self.error
        assert self.stop.at is not None
        return self.ended_at - self.stop.at


def assert_free(member: Member, others: int = 0) -> None:
    # Asked rarely: each look at the server's slots puts off what it does about a client that has gone.
    eventually(lambda: member.busy() <= others, FREE_WITHIN_S, every_s=0.25)


def test_a_stream_opens_shows_progress_speaks_and_finishes(member: Member) -> None:
    deltas = play(member.engine, member.short)
    assert isinstance(deltas[0], Opened)
    assert isinstance(deltas[-1], Finished)
    assert [type(delta) for delta in deltas].count(Opened) == 1
    assert [type(delta) for delta in deltas].count(Finished) == 1
    kinds = [type(delta) for delta in deltas[1:-1]]
    if "progress" in member.lacks:
        assert set(kinds) == {Text}
        return
    assert set(kinds) == {PromptProgress, Text}
    assert kinds == sorted(kinds, key=[PromptProgress, Text].index)
    last = [delta for delta in deltas if isinstance(delta, PromptProgress)][-1]
    assert last.processed == last.total > 0


def test_no_text_is_empty_and_all_of_it_is_unicode(member: Member) -> None:
    deltas = play(member.engine, replace(member.short, sampling={**member.short.sampling, "max_tokens": 300}))
    assert all(delta.text for delta in deltas if isinstance(delta, Text))
    assert text_of(deltas).encode()
    assert not text_of(deltas).isascii()


def test_usage_counts_prompt_and_answer(member: Member) -> None:
    finished = play(member.engine, member.short)[-1]
    assert isinstance(finished, Finished)
    assert finished.usage.completion_tokens > 0
    assert finished.usage.prompt_tokens > 0
    if "counting" in member.lacks:
        assert member.engine.count_tokens(member.short, stop=StopSignal()) is None
        return
    assert finished.usage.prompt_tokens == member.engine.count_tokens(member.short, stop=StopSignal())


def test_max_tokens_ends_an_answer_with_length(member: Member) -> None:
    if "limiting" in member.lacks:
        pytest.skip("this server ignores max_tokens")
    finished = play(member.engine, replace(member.short, sampling={**member.short.sampling, "max_tokens": 2}))[-1]
    assert isinstance(finished, Finished)
    assert finished.finish_reason == "length"
    assert finished.usage.completion_tokens == 2


def test_the_info_says_what_the_engine_is(member: Member) -> None:
    info = member.engine.probe()
    assert info == member.engine.info()
    assert info.state == "ready"
    assert info.slots == (1 if "parallel" in member.lacks else 2)
    assert info.n_ctx is not None
    assert info.models
    assert info.tools
    assert info.thinking is ("thinking" not in member.lacks)
    assert info.json_schema


def test_a_call_that_is_stopped_beforehand_never_begins(member: Member) -> None:
    stop = StopSignal()
    stop.set("cancelled")
    with pytest.raises(Stopped):
        next(iter(member.engine.stream(member.short, stop=stop, on_wait=lambda reason: None)))
    assert member.busy() == 0


def test_a_cancel_in_the_middle_of_an_answer_frees_the_slot(member: Member) -> None:
    run = Run(member.engine, member.endless())
    eventually(lambda: run.has(Text))
    assert run.cancel() < 0.5
    assert_free(member)


def test_a_cancel_in_the_middle_of_a_prompt_frees_the_slot(member: Member) -> None:
    run = Run(member.engine, member.long_prompt())
    eventually(lambda: run.has(Opened if "progress" in member.lacks else PromptProgress))
    assert run.cancel() < 0.5
    assert not run.has(Text)
    assert_free(member)


def test_a_cancel_in_a_prompt_frees_the_slot_while_another_generates(member: Member) -> None:
    if "parallel" in member.lacks:
        pytest.skip("this engine runs one request at a time")
    other = Run(member.engine, member.endless())
    eventually(lambda: other.has(Text))
    run = Run(member.engine, member.long_prompt())
    eventually(lambda: run.has(Opened if "progress" in member.lacks else PromptProgress))
    assert run.cancel() < 0.5
    assert_free(member, others=1)
    assert other.is_alive()
    other.cancel()
    assert_free(member)


def test_closing_the_iterator_frees_the_slot(member: Member) -> None:
    stream = member.engine.stream(member.endless(), stop=StopSignal(), on_wait=lambda reason: None)
    next(delta for delta in stream if isinstance(delta, Text))
    assert isinstance(stream, Generator)
    stream.close()
    assert_free(member)


def test_a_call_beyond_the_slots_waits_and_can_be_cancelled_there(member: Member) -> None:
    running = [Run(member.engine, member.endless()) for _ in range(member.engine.info().slots)]
    for run in running:
        eventually(lambda run=run: run.has(Text))  # type: ignore[misc]
    waiting = Run(member.engine, member.short)
    assert not waiting.deltas
    assert waiting.cancel() < 0.5
    assert not waiting.deltas
    for run in running:
        run.cancel()
    assert_free(member)


def test_a_freed_slot_serves_the_next_call(member: Member) -> None:
    for _ in range(4):
        run = Run(member.engine, member.endless())
        eventually(lambda run=run: run.has(Text))  # type: ignore[misc]
        run.cancel()
    assert text_of(play(member.engine, member.short))


def test_a_prompt_that_does_not_fit_is_refused_with_its_numbers(member: Member) -> None:
    if "counting" in member.lacks:
        pytest.skip("this server has no context")
    with pytest.raises(ContextOverflow) as caught:
        play(member.engine, member.overflow)
    assert caught.value.details["n_prompt_tokens"] > caught.value.details["n_ctx"]
    assert caught.value.details["n_ctx"] == member.engine.info().n_ctx
    assert_free(member)


def test_a_silent_engine_is_given_up_after_the_chunk_timeout(member: Member) -> None:
    with member.frozen():
        started = time.monotonic()
        with pytest.raises(IdleTimeout):
            play(member.engine, replace(member.short, chunk_timeout_s=0.4))
        assert 0.3 < time.monotonic() - started < 5
    assert_free(member)


def test_a_cancel_reaches_a_silent_engine(member: Member) -> None:
    with member.frozen():
        run = Run(member.engine, member.short)
        assert not run.stop.wait(0.2)
        assert run.cancel() < 0.5
    assert_free(member)


def test_an_engine_that_is_away_is_waited_for_and_then_reported(member: Member) -> None:
    if "away" in member.lacks:
        pytest.skip("this engine is in our own process and cannot be away")
    waits: list[str] = []
    with pytest.raises(EngineUnavailable):
        play(member.unreachable, member.short, waits)
    assert waits == ["engine_restarting"]
    assert member.unreachable.info().state == "unreachable"


def test_a_cancel_ends_the_wait_for_an_engine_that_is_away(member: Member) -> None:
    if "away" in member.lacks:
        pytest.skip("this engine is in our own process and cannot be away")
    run = Run(member.unreachable, member.short)
    assert run.cancel() < 0.5


def test_a_forced_tool_call_comes_as_pieces_of_one_json(member: Member) -> None:
    deltas = play(member.engine, member.tools)
    pieces = [delta for delta in deltas if isinstance(delta, ToolCall) and delta.index == 0]
    assert len(pieces) > 1
    assert pieces[0].name == "get_weather"
    assert pieces[0].id
    assert all(piece.id is None and piece.name is None for piece in pieces[1:])
    assert isinstance(json.loads("".join(piece.arguments for piece in pieces)), dict)
    assert "<tool_call>" not in text_of(deltas)


def test_a_constrained_answer_is_json(member: Member) -> None:
    deltas = play(member.engine, member.json_schema)
    assert isinstance(json.loads(text_of(deltas)), dict)
    assert isinstance(deltas[-1], Finished)
    assert deltas[-1].finish_reason == "stop"


def test_thinking_is_kept_apart_from_the_answer(member: Member) -> None:
    if "thinking" in member.lacks:
        pytest.skip("this server has no thinking model")
    deltas = play(member.engine, member.thinking)
    kinds = [type(delta) for delta in deltas if isinstance(delta, Reasoning | Text)]
    assert kinds[0] is Reasoning
    assert kinds[-1] is Text
    assert "think>" not in text_of(deltas)


def test_a_closed_engine_ends_what_runs_and_takes_nothing_more(member: Member) -> None:
    run = Run(member.engine, member.endless())
    eventually(lambda: run.has(Text))
    member.engine.close(Deadline(5))
    run.join(5)
    assert not run.is_alive()
    assert isinstance(run.error, ShuttingDown)
    with pytest.raises(ShuttingDown):
        play(member.engine, member.short)
    assert member.engine.info().state == "closed"
    assert not member.engine.wait_ready(StopSignal(), 1)
    member.engine.close(Deadline(5))


# --- pumped: the same generation, given to `feed` by whichever thread reads it ----------------------------------------


class Pumped(Run):
    """A generation whose deltas are fed; `rest_s` is what each feed answers."""

    rest_s = 0.0
    finished: Finished | None = None

    def run(self) -> None:
        try:
            self.finished = self._engine.pump(self._call, stop=self.stop, on_wait=lambda reason: None, feed=self.feed)
        except BaseException as error:  # noqa: BLE001 - whatever came is what the test looks at
            self.error = error
        self.ended_at = time.monotonic()

    def feed(self, deltas: Sequence[Delta]) -> float:
        self.deltas += deltas
        return self.rest_s


class Resting(Pumped):
    rest_s = 0.02


class Failing(Pumped):
    def feed(self, deltas: Sequence[Delta]) -> float:
        if any(isinstance(delta, Text) for delta in deltas):
            raise LookupError("a defect of whoever is fed")
        return 0.0


@pytest.mark.parametrize("way", [Pumped, Resting])
def test_a_pump_says_what_a_stream_says(member: Member, way: type[Pumped]) -> None:
    call = replace(member.short, sampling={**member.short.sampling, "temperature": 0.0, "seed": 1})
    streamed = play(member.engine, call)
    run = way(member.engine, call)
    run.join(30)
    assert run.error is None, run.error
    assert isinstance(run.deltas[0], Opened)
    assert not run.has(Finished)
    assert text_of(run.deltas) == text_of(streamed)
    assert run.finished is not None
    assert isinstance(streamed[-1], Finished)
    assert run.finished.finish_reason == streamed[-1].finish_reason
    assert run.finished.usage.completion_tokens == streamed[-1].usage.completion_tokens
    assert_free(member)


def test_a_pump_that_is_cancelled_ends_at_once_and_its_slot_is_free(member: Member) -> None:
    run = Pumped(member.engine, member.endless())
    eventually(lambda: run.has(Text), 10)
    assert run.cancel() < FREE_WITHIN_S
    assert_free(member)


def test_a_pump_that_is_cancelled_while_it_rests_ends_at_once(member: Member) -> None:
    run = Resting(member.engine, member.endless())
    eventually(lambda: run.has(Text), 10)
    assert run.cancel() < FREE_WITHIN_S
    assert_free(member)


def test_a_pump_gives_up_an_engine_that_keeps_silent(member: Member) -> None:
    with member.frozen():
        run = Pumped(member.engine, replace(member.short, chunk_timeout_s=0.5))
        run.join(10)
    assert isinstance(run.error, IdleTimeout | EngineUnavailable), run.error


def test_what_a_feed_raises_ends_the_generation_and_reaches_the_caller(member: Member) -> None:
    run = Failing(member.engine, member.endless())
    run.join(10)
    assert isinstance(run.error, LookupError), run.error
    assert_free(member)


def test_a_pump_on_an_engine_that_is_away_says_so(member: Member) -> None:
    if "away" in member.lacks:
        pytest.skip("this engine is in our own process and cannot be away")
    run = Pumped(member.unreachable, member.short)
    run.join(10)
    assert isinstance(run.error, EngineUnavailable), run.error


def test_two_pumps_at_once_do_not_mix(member: Member) -> None:
    if "parallel" in member.lacks:
        pytest.skip("this engine runs one request at a time")
    runs = [Pumped(member.engine, member.short) for _ in range(2)]
    for run in runs:
        run.join(30)
        assert run.error is None
        assert [type(delta) for delta in run.deltas].count(Opened) == 1
        assert text_of(run.deltas)


def test_a_model_that_was_let_go_comes_back_with_the_next_call_or_never_goes(member: Member) -> None:
    engine = member.engine
    before = engine.info()
    outcome = engine.unload()
    if not before.can_unload:
        assert (outcome, engine.keep_awake(60), engine.info().kept_awake) == ("unsupported", False, False)
        return
    assert outcome == engine.unload() == "done"
    asleep = engine.probe()
    assert (asleep.state, asleep.models, asleep.slots) == ("asleep", before.models, before.slots)
    waits: list[str] = []
    assert isinstance(play(engine, member.short, waits)[-1], Finished)
    assert waits == ["loading"]
    assert engine.unload() == "done"
    assert engine.keep_awake(60)
    eventually(lambda: engine.info().state == "ready", 20)
    assert engine.info().kept_awake


def test_an_announced_call_is_answered_like_any_other(member: Member) -> None:
    for _ in range(3):
        member.engine.expect()
    assert text_of(play(member.engine, member.short))
    member.unreachable.expect()
    assert member.unreachable.info().state != "ready"
    member.engine.close(Deadline(5))
    member.engine.expect()
    with pytest.raises(ShuttingDown):
        play(member.engine, member.short)
