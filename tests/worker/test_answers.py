"""Refusals and acks take at most a third of the outbox; what more would bring them stays unread."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.core.deltas import Text
from llamacpp_mqtt_deploy.ports import Published
from llamacpp_mqtt_deploy.testing.loopback import LoopbackLink
from llamacpp_mqtt_deploy.testing.loopback_broker import LoopbackBroker
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from llamacpp_mqtt_deploy.worker.answers import Answers
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus

_OUTBOX = 120


def _controls(bus: Bus, number: int) -> None:
    bus.control("ping", session="flood", transaction=str(number))


def _refusals(bus: Bus, number: int) -> None:
    bus.ask(session="flood", prompt="hi", temperature="hot", request_id=f"f{number}")


def _copies_of_one_that_runs(bus: Bus, number: int) -> None:
    bus.ask("slow", session="flood", request_id="f")


def _copies_of_one_that_ended(bus: Bus, number: int) -> None:
    bus.ask("over", session="flood", request_id="over")


@pytest.mark.parametrize(
    "flood", [_controls, _refusals, _copies_of_one_that_runs, _copies_of_one_that_ended], ids=lambda f: f.__name__[1:]
)
def test_a_flood_that_only_brings_answers_leaves_the_outbox_to_the_streams_of_others(
    bus: Bus, flood: Callable[[Bus, int], None]
) -> None:
    gate, own_gate = Gate(), Gate()
    engine = ScriptedEngine(slots=2)
    worker = bus.worker(engine, mqtt__outbox_messages=_OUTBOX, mqtt__inbox_messages=1000)
    bus.ask("over", session="flood", request_id="over")
    bus.listener.terminal("over")
    engine.play(Text("slow"), own_gate)
    bus.ask("slow", session="flood", request_id="f")
    bus.listener.until(type="chunk", request_id="f")
    engine.play(Text("one "), gate, Text("two"))
    bus.ask("count", session="other", request_id="r")
    bus.listener.until(type="chunk", request_id="r")
    link, intake = worker.daemon.parts.link, worker.daemon.parts.intake
    eventually(lambda: link.info().unacknowledged == 0)

    bus.broker.hold_pubacks()
    for number in range(2 * _OUTBOX):
        flood(bus, number)
    eventually(lambda: link.info().unacknowledged >= _OUTBOX // 3)
    gate.open()
    end = bus.listener.terminal("r")
    assert (end["type"], end["full_content"]) == ("done", "one two")
    assert link.info().unacknowledged < _OUTBOX
    assert intake.waiting > _OUTBOX, "the rest is not read yet"

    bus.broker.release_pubacks()
    eventually(lambda: intake.waiting == 0 and link.info().unacknowledged == 0)
    if flood is _controls:
        eventually(lambda: _acks(bus) == 2 * _OUTBOX)
    elif flood is _copies_of_one_that_runs:
        # It still runs: once it has ended, copies that wait together are answered by its one end.
        assert len([event for event in bus.listener.of("f") if event["type"] == "snapshot"]) > _OUTBOX
    own_gate.open()
    assert bus.listener.terminal("f")["full_content"] == "slow"


def test_a_worker_stops_in_time_while_no_answer_finds_room(bus: Bus) -> None:
    worker = bus.worker(mqtt__outbox_messages=_OUTBOX, limits__drain_timeout_s=1)
    bus.broker.hold_pubacks()
    for number in range(2 * _OUTBOX):
        _controls(bus, number)
    eventually(lambda: worker.daemon.parts.link.info().unacknowledged >= _OUTBOX // 3)
    assert worker.stop(timeout_s=12.0) == 0


def _acks(bus: Bus) -> int:
    bus.listener.of("")
    return sum(json.loads(d.payload).get("type") == "ack" for d in bus.listener.deliveries if "/reply/" in d.topic)


class _Link(LoopbackLink):
    """A link with so much room for answers; `says` is what becomes of each publish."""

    def __init__(self) -> None:
        super().__init__(LoopbackBroker())
        self.rooms: list[int] = []
        self.waits_s: list[float] = []
        self.says: list[Published] = []
        self.sent: list[tuple[str, bytes, bytes | None]] = []

    @override
    def room_for_answers(self, largest: int, *, timeout_s: float = 0.0) -> int:
        assert largest == 1024
        self.waits_s.append(timeout_s)
        return self.rooms.pop(0)

    @override
    def publish(self, topic: str, payload: bytes, *, correlation: bytes | None = None, **wishes: Any) -> Published:
        assert wishes == {"share": "answer", "content_type": "application/json"}
        said = self.says.pop(0) if self.says else "queued"
        if said == "queued":
            self.sent.append((topic, payload, correlation))
        return said


def test_as_many_messages_may_be_read_as_answers_find_room_now() -> None:
    link = _Link()
    answers = Answers(link, max_event_bytes=lambda: 1024)
    link.rooms = [0]
    assert answers.room(timeout_s=1.5) == 0
    link.rooms = [7]
    assert answers.room(timeout_s=1.5) == 7
    assert link.waits_s == [1.5, 1.5], "asked once"


def test_answers_that_found_no_place_go_out_in_order_before_anything_more_is_read() -> None:
    link = _Link()
    answers = Answers(link, max_event_bytes=lambda: 1024)
    link.says = ["full"]
    for payload in (b"1", b"2", b"3"):
        answers.publish("llm/reply/demo", payload, correlation=b"c" + payload)
    assert link.sent == [], "the second must not overtake the first"
    link.rooms, link.says = [3], ["queued", "full"]
    assert answers.room(timeout_s=0.0) == 0, "nothing more is read while one waits"
    link.rooms, link.says = [3, 5], []
    assert answers.room(timeout_s=0.0) == 5
    answers.publish("llm/reply/demo", b"4", correlation=None)
    assert link.sent == [
        *(("llm/reply/demo", each, b"c" + each) for each in (b"1", b"2", b"3")),
        ("llm/reply/demo", b"4", None),
    ]


def test_an_answer_that_no_broker_could_take_holds_up_no_other() -> None:
    link = _Link()
    answers = Answers(link, max_event_bytes=lambda: 1024)
    link.says = ["unfit"]
    answers.publish("llm/reply/demo", b"1", correlation=None)
    answers.publish("llm/reply/demo", b"2", correlation=None)
    assert [payload for _, payload, _ in link.sent] == [b"2"]
