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
