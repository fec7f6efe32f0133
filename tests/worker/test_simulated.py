"""A finished answer that is paced: a piece each interval, fewer and larger ones where the broker is slow, then the end."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.core.chunking import SentenceCutter
from llamacpp_mqtt_deploy.core.deltas import FinishReason, ToolCall
from llamacpp_mqtt_deploy.io_loop import IoLoop, Timer
from llamacpp_mqtt_deploy.worker import simulated
from llamacpp_mqtt_deploy.worker.background import Background
from llamacpp_mqtt_deploy.worker.completion import Completion
from llamacpp_mqtt_deploy.worker.jobs import Job
from llamacpp_mqtt_deploy.worker.simulated import SimulatedStream
from tests.support.lone_job import Taker, lone_job

INTERVAL_S = 0.25


class HandLoop(IoLoop):
    """Calls what is due when the test says so; remembers the pauses."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.pauses_s: list[float] = []

    @override
    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.pauses_s.append(seconds)
        self.due.append(call)
        return Timer(call)

    def turn(self) -> None:
        due, self.due = self.due, []
        for call in due:
            call()


class AtOnce(Background):
    """Does its work here and now, or has no place for it."""

    full = False

    @override
    def run(self, name: Hashable, call: Callable[[], object]) -> bool:
        if not self.full:
            call()
        return not self.full


class Ends(Completion):
    """Notes the ends."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    @override
    def done(self, job: Job, finish_reason: FinishReason) -> None:
        self.ends.append(finish_reason)

    @override
    def stopped(self, job: Job) -> None:
        self.ends.append(str(job.stop.reason))


class Bench:
    def __init__(self, text: str, *, reasoning: str = "", chars: int = 4, **fields: Any) -> None:
        self.outbox, self.loop, self.background, self.completion = Taker(), HandLoop(), AtOnce(), Ends()
        self.job = lone_job(outbox=self.outbox, **fields)
        self.job.phase = "pacing"
        self.job.answer.add_reasoning(reasoning, 1.0)
        self.job.answer.add_text(text, 1.0)
        self.job.responder.start({"worker": "w", "created": 1})
        self.stream = SimulatedStream(
            job=self.job,
            finish_reason="stop",
            completion=self.completion,
            loop=self.loop,
            background=self.background,
            chunk_chars=chars,
            interval_s=INTERVAL_S,
        )

    def chunks(self) -> list[Any]:
        kinds = ("content", "reasoning", "tool_calls")
        return [event[kind] for event in self.outbox.events for kind in kinds if kind in event]

    def acknowledge(self) -> None:
        while self.outbox.unacknowledged:
            self.outbox.unacknowledged.pop()(True)

    def play(self) -> None:
        """To the end, with a broker that acknowledges at once."""
        self.stream.start()
        while self.loop.due:
            self.loop.turn()
            self.acknowledge()


def test_a_piece_goes_out_each_interval_and_then_the_end() -> None:
    bench = Bench("one two three", reasoning="hm hm")
    bench.play()
    assert bench.chunks() == ["hm h", "m", "one ", "two ", "thre", "e"]
    assert bench.loop.pauses_s == [0.0, *[INTERVAL_S] * 6]
    assert bench.completion.ends == ["stop"]


def test_sentences_go_out_whole_where_sentences_are_asked_for() -> None:
    bench = Bench("One two. Three four. And", stream="sentence")
    bench.play()
    assert bench.chunks() == ["One two.", " Three four.", " And"]


def test_a_long_answer_is_cut_into_sentences_little_by_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop has others to serve meanwhile."""
    fed: list[int] = []

    class Counting(SentenceCutter):
        @override
        def feed(self, text: str) -> list[str]:
            fed.append(len(text))
            return super().feed(text)

    monkeypatch.setattr(simulated, "SentenceCutter", Counting)
    bench = Bench("One sentence. " * 1000, stream="sentence")
    bench.stream.start()
    bench.loop.turn()
    assert fed == [4096]
    while bench.loop.due:
        bench.acknowledge()
        bench.loop.turn()
    assert sum(fed) == 14_000
    assert bench.chunks() == ["One sentence.", *[" One sentence."] * 999, " "]


def test_a_slow_broker_gets_what_was_due_meanwhile_as_one_piece_of_each_kind() -> None:
    bench = Bench("12345678", reasoning="abcdefghijkl")
    bench.stream.start()
    for _ in range(5):
        bench.loop.turn()
    assert bench.chunks() == ["abcd"], "the first one is not acknowledged"
    bench.acknowledge()
    assert bench.chunks() == ["abcd"]
    assert bench.completion.ends == []
    bench.loop.turn()
    assert bench.chunks() == ["abcd", "efghijkl", "12345678"]
    assert bench.completion.ends == ["stop"]


def test_what_is_due_goes_out_as_soon_as_the_broker_has_the_piece_before_it() -> None:
    bench = Bench("123456789012")
    bench.stream.start()
    bench.loop.turn()
    bench.loop.turn()
    bench.acknowledge()
    bench.loop.turn()
    assert bench.chunks() == ["1234", "56789012"]
    assert bench.completion.ends == []


def test_tool_calls_come_after_the_text_with_their_numbers() -> None:
    bench = Bench("look:")
    for index, name in ((3, "look"), (7, "listen")):
        bench.job.answer.add_call(ToolCall(index, f"c{index}", name, "{}"), 2.0)
    bench.play()
    assert bench.chunks()[-1] == [
        {"index": 0, "id": "c3", "name": "look", "arguments": "{}"},
        {"index": 1, "id": "c7", "name": "listen", "arguments": "{}"},
    ]
    assert bench.chunks()[:-1] == ["look", ":"]


def test_a_stop_ends_it_once_and_tells_nothing_more() -> None:
    bench = Bench("one two three")
    bench.stream.start()
    bench.loop.turn()
    bench.acknowledge()
    bench.job.stop.set("timeout")
    bench.loop.turn()
    assert bench.loop.due == []
    assert bench.chunks() == ["one "]
    assert bench.completion.ends == ["timeout"]


def test_nothing_more_is_told_of_a_request_that_has_ended_otherwise() -> None:
    bench = Bench("one two three")
    bench.job.phase = "ended"
    bench.play()
    assert (bench.chunks(), bench.completion.ends) == ([], [])


def test_an_end_that_finds_no_place_is_tried_again_a_little_later() -> None:
    bench = Bench("one")
    bench.background.full = True
    bench.stream.start()
    for _ in range(4):
        bench.loop.turn()
        bench.acknowledge()
    assert bench.completion.ends == []
    assert bench.loop.pauses_s == [0.0, INTERVAL_S, 0.1, 0.1, 0.1]
    bench.background.full = False
    bench.loop.turn()
    assert (bench.completion.ends, bench.loop.due) == (["stop"], [])
