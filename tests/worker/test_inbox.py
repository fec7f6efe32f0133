"""The inbox between the link and the intake: bounded in number and bytes, and never a reason for the link to wait."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.ports import Delivery
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from llamacpp_mqtt_deploy.worker.inbox import Inbox
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker


class SlowJournal:
    """Holds the intake's thread in its first look at the journal until `open`."""

    def __init__(self, worker: WholeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        store = worker.daemon.parts.store
        find = store.find

        def slow_find(*args: Any) -> Any:
            self.reached.set()
            assert self.open.wait(30)
            return find(*args)

        monkeypatch.setattr(store, "find", slow_find)


def _delivery(payload: bytes = b"hi", qos: int = 0, level: str = "flood") -> Delivery:
    return Delivery(topic=f"llm/request/{level}", payload=payload, qos=qos)


def _inbox(max_messages: int = 20) -> Inbox:
    return Inbox(max_messages=max_messages)


def _offer(inbox: Inbox, delivery: Delivery) -> bool:
    return inbox.offer(delivery, delivery.topic.rpartition("/")[2])


def _held(inbox: Inbox) -> Counter[str]:
    """Takes everything."""
    return Counter(delivery.topic.rpartition("/")[2] for delivery in inbox.take(10**6, timeout_s=0.0) or [])


def test_a_full_inbox_never_holds_the_link(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = bus.worker(ScriptedEngine(slots=1), mqtt__inbox_messages=20)
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("hold", request_id="r0")
    assert journal.reached.wait(10)
    intake = worker.daemon.parts.intake
    taken: list[bool] = []
    flood = threading.Thread(target=lambda: taken.extend(intake.offer(_delivery()) for _ in range(60)), daemon=True)
    flood.start()
    flood.join(5)
    assert not flood.is_alive(), "each message over the bound costs the link's thread time"
    assert taken == [True] * 20 + [False] * 40
    with capture_logs() as lines:
        journal.open.set()
        assert bus.listener.terminal("r0")["type"] == "done"
        eventually(lambda: any(line["event"] == "inbox.refused" for line in lines))
    told = next(line for line in lines if line["event"] == "inbox.refused")
    assert (told["messages"], told["lost"]) == (40, 40), "the operator learns how much was lost"
    assert intake.offer(_delivery())


def test_the_inbox_is_bounded_in_bytes_and_takes_one_message_of_any_size(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker(ScriptedEngine(slots=1))
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("hold", request_id="r0")
    assert journal.reached.wait(10)
    intake = worker.daemon.parts.intake
    megabyte = b"x" * 1024 * 1024
    assert [intake.offer(_delivery(megabyte)) for _ in range(40)].count(True) == 31
    journal.open.set()
    eventually(lambda: intake.offer(_delivery(megabyte)))


def test_what_comes_while_the_inbox_closes_is_left_to_the_broker() -> None:
    inbox = _inbox(1)
    assert _offer(inbox, _delivery(b"before"))
    inbox.close()
    assert _offer(inbox, _delivery(b"after", qos=1)), "refused, it would make the link connect again while it closes"
    taken = inbox.take(10, timeout_s=0.0)
    assert taken is not None
    assert [delivery.payload for delivery in taken] == [b"before"]
    assert inbox.take(10, timeout_s=0.0) is None


def test_a_message_counts_with_all_that_a_client_can_put_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.inbox._MAX_BYTES", 100)
    first = Delivery(topic="t" * 10, payload=b"p" * 20, qos=1, response_topic="r" * 30, correlation=b"c" * 15)
    for size, taken in ((25, True), (26, False)):
        inbox = _inbox(10)
        assert _offer(inbox, first)
        assert _offer(inbox, Delivery(topic="t" * size, payload=b"", qos=1)) is taken


def test_the_place_of_what_was_read_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.inbox._MAX_BYTES", 100)
    inbox = _inbox(3)
    for _ in range(5):
        for number in range(3):
            assert _offer(inbox, Delivery(topic="t", payload=bytes([number]) * 30, qos=1))
        assert not _offer(inbox, Delivery(topic="t", payload=b"", qos=1)), "three are as many as may wait"
        first = inbox.take(2, timeout_s=0.0)
        last = inbox.take(2, timeout_s=0.0)
        assert [delivery.payload[0] for delivery in [*(first or ()), *(last or ())]] == [0, 1, 2]
        assert (len(first or ()), len(inbox)) == (2, 0)


def test_a_flood_is_told_once_when_all_of_it_was_read_and_names_what_is_lost_for_good() -> None:
    inbox = _inbox(2)
    with capture_logs() as lines:
        taken = [_offer(inbox, _delivery(qos=qos)) for qos in (1, 0, 1, 0, 0)]
        assert taken == [True, True, False, False, False]
        inbox.take(1, timeout_s=0.0)
        assert lines == [], "not over yet"
        inbox.take(1, timeout_s=0.0)
        assert [(line["messages"], line["lost"]) for line in lines] == [(3, 2)]
        for _ in range(2):
            _offer(inbox, _delivery())
            inbox.take(9, timeout_s=0.0)
    assert len(lines) == 1


def test_a_reader_waits_for_messages_and_is_woken_by_them_and_by_the_end() -> None:
    inbox = _inbox(2)
    assert inbox.take(9, timeout_s=0.01) == []
    read: list[object] = []
    for wake in (lambda: _offer(inbox, _delivery()), inbox.close):
        reader = threading.Thread(target=lambda: read.append(inbox.take(9, timeout_s=60.0)), daemon=True)
        reader.start()
        eventually(lambda: inbox._changed._waiters)  # type: ignore[attr-defined]
        wake()
        reader.join(10)
        assert not reader.is_alive()
    assert read == [[_delivery()], None]
    assert inbox.closed


def test_one_that_floods_at_qos_0_leaves_others_a_place() -> None:
    inbox = _inbox(20)
    assert [_offer(inbox, _delivery()) for _ in range(30)].count(True) == 20
    assert [_offer(inbox, _delivery(qos=1, level="chat")) for _ in range(10)] == [True] * 10
    assert not _offer(inbox, _delivery(qos=1, level="chat")), "it holds as much as the other one"
    assert len(inbox) == 20
    with capture_logs() as lines:
        assert _held(inbox) == {"flood": 10, "chat": 10}
    assert [(line["messages"], line["lost"]) for line in lines] == [(21, 20)]


def test_the_places_that_a_flood_gives_up_are_those_of_its_newest_messages() -> None:
    inbox = _inbox(20)
    for number in range(20):
        _offer(inbox, _delivery(b"%d" % number))
    for _ in range(3):
        _offer(inbox, _delivery(b"chat", level="chat"))
    taken = inbox.take(100, timeout_s=0.0) or []
    assert [delivery.payload for delivery in taken] == [b"%d" % number for number in range(17)] + [b"chat"] * 3


def test_large_messages_of_one_leave_others_a_place() -> None:
    inbox = _inbox(1000)
    megabyte = b"x" * 1024 * 1024
    assert [_offer(inbox, _delivery(megabyte)) for _ in range(40)].count(True) == 31
    assert [_offer(inbox, _delivery(megabyte, qos=1, level="chat")) for _ in range(20)].count(True) == 15
    assert _held(inbox) == {"flood": 16, "chat": 15}
    assert _offer(inbox, _delivery(megabyte)), "what was taken and what was given up no longer counts"


def test_what_waits_for_its_acknowledgement_is_never_given_up() -> None:
    inbox = _inbox(20)
    for _ in range(20):
        assert _offer(inbox, _delivery(qos=1))
    assert not _offer(inbox, _delivery(qos=1, level="chat")), "it stays with the broker, which delivers it again"
    assert _held(inbox) == {"flood": 20}


def test_two_floods_do_not_put_each_other_out_in_turn() -> None:
    inbox = _inbox(20)
    for _ in range(1000):
        _offer(inbox, _delivery(level="a"))
        _offer(inbox, _delivery(level="b"))
    assert _held(inbox) == {"a": 10, "b": 10}


@given(st.lists(st.tuples(st.sampled_from("aaabc-"), st.integers(0, 1)), max_size=120))
def test_the_inbox_keeps_its_bounds_and_its_order_whatever_comes(arrivals: list[tuple[str, int]]) -> None:
    inbox, last = _inbox(20), -1
    acknowledgeable: list[bytes] = []
    taken: list[Delivery] = []
    for number, (level, qos) in enumerate(arrivals):
        if level == "-":
            taken += inbox.take(3, timeout_s=0.0) or []
        elif _offer(inbox, _delivery(b"%d" % number, qos=qos, level=level)) and qos:
            acknowledgeable.append(b"%d" % number)
        assert len(inbox) <= 20
        assert len(inbox) == sum(inbox._places.values())
        assert inbox._bytes_in_all == sum(inbox._bytes.values())
    taken += inbox.take(1000, timeout_s=0.0) or []
    for delivery in taken:
        assert int(delivery.payload) > last
        last = int(delivery.payload)
    assert [delivery.payload for delivery in taken if delivery.qos] == acknowledgeable
    assert len(inbox) == 0


def test_a_flood_that_names_many_levels_costs_the_link_no_look_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, looks = _inbox(1000), 0
    look = Inbox._of_those_at_qos0

    def counted(*args: Any) -> int | None:
        nonlocal looks
        looks += 1
        return look(*args)

    monkeypatch.setattr(Inbox, "_of_those_at_qos0", counted)
    for number in range(1000):
        assert _offer(inbox, _delivery(level=f"level{number}"))
    for number in range(1000):
        assert not _offer(inbox, _delivery(level=f"other{number}"))
    assert looks < 4 * 1000


def test_a_flood_of_one_client_never_makes_the_worker_refuse_another_ones_request(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bus.worker(ScriptedEngine(slots=1), mqtt__inbox_messages=20)
    journal = SlowJournal(worker, monkeypatch)
    bus.ask("hold", request_id="r0")
    assert journal.reached.wait(10)
    intake = worker.daemon.parts.intake
    assert [intake.offer(_delivery(level="flood/s")) for _ in range(60)].count(False) == 40
    offer = intake.offer
    taken: list[bool] = []

    def counted(delivery: Delivery) -> bool:
        taken.append(offer(delivery))
        return taken[-1]

    monkeypatch.setattr(intake, "offer", counted)
    bus.ask("hi", session="chat/s", request_id="r1")
    bus.ask("later", session="chat/s", request_id="r2")
    eventually(lambda: len(taken) >= 2)
    with capture_logs() as lines:
        journal.open.set()
        assert bus.listener.terminal("r2")["full_content"] == "later"
        eventually(lambda: any(line["event"] == "inbox.refused" for line in lines))
    told = next(line for line in lines if line["event"] == "inbox.refused")
    assert (told["messages"], told["lost"]) == (42, 42), "nothing but what nobody waits for at QoS 0"
