"""The inbox between the link and the intake: bounded in number and bytes, and never a reason for the link to wait."""

from __future__ import annotations

import threading
from typing import Any

import pytest
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


def _delivery(payload: bytes = b"hi", qos: int = 0) -> Delivery:
    return Delivery(topic="llm/request/flood", payload=payload, qos=qos)


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
    inbox = Inbox(max_messages=1)
    assert inbox.offer(_delivery(b"before"))
    inbox.close()
    assert inbox.offer(_delivery(b"after", qos=1)), "refused, it would make the link connect again while it closes"
    taken = inbox.take(10, timeout_s=0.0)
    assert taken is not None
    assert [delivery.payload for delivery in taken] == [b"before"]
    assert inbox.take(10, timeout_s=0.0) is None


def test_a_message_counts_with_all_that_a_client_can_put_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.inbox._MAX_BYTES", 100)
    first = Delivery(topic="t" * 10, payload=b"p" * 20, qos=1, response_topic="r" * 30, correlation=b"c" * 15)
    for size, taken in ((25, True), (26, False)):
        inbox = Inbox(max_messages=10)
        assert inbox.offer(first)
        assert inbox.offer(Delivery(topic="t" * size, payload=b"", qos=1)) is taken


def test_the_place_of_what_was_read_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.worker.inbox._MAX_BYTES", 100)
    inbox = Inbox(max_messages=3)
    for _ in range(5):
        for number in range(3):
            assert inbox.offer(Delivery(topic="t", payload=bytes([number]) * 30, qos=1))
        assert not inbox.offer(Delivery(topic="t", payload=b"", qos=1)), "three are as many as may wait"
        first = inbox.take(2, timeout_s=0.0)
        last = inbox.take(2, timeout_s=0.0)
        assert [delivery.payload[0] for delivery in [*(first or ()), *(last or ())]] == [0, 1, 2]
        assert (len(first or ()), len(inbox)) == (2, 0)


def test_a_flood_is_told_once_when_all_of_it_was_read_and_names_what_is_lost_for_good() -> None:
    inbox = Inbox(max_messages=2)
    with capture_logs() as lines:
        taken = [inbox.offer(_delivery(qos=qos)) for qos in (1, 0, 1, 0, 0)]
        assert taken == [True, True, False, False, False]
        inbox.take(1, timeout_s=0.0)
        assert lines == [], "not over yet"
        inbox.take(1, timeout_s=0.0)
        assert [(line["messages"], line["lost"]) for line in lines] == [(3, 2)]
        for _ in range(2):
            inbox.offer(_delivery())
            inbox.take(9, timeout_s=0.0)
    assert len(lines) == 1


def test_a_reader_waits_for_messages_and_is_woken_by_them_and_by_the_end() -> None:
    inbox = Inbox(max_messages=2)
    assert inbox.take(9, timeout_s=0.01) == []
    read: list[object] = []
    for wake in (lambda: inbox.offer(_delivery()), inbox.close):
        reader = threading.Thread(target=lambda: read.append(inbox.take(9, timeout_s=60.0)), daemon=True)
        reader.start()
        eventually(lambda: inbox._changed._waiters)  # type: ignore[attr-defined]
        wake()
        reader.join(10)
        assert not reader.is_alive()
    assert read == [[_delivery()], None]
    assert inbox.closed
