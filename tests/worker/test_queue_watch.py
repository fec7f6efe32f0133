"""What clients hear of requests that wait in a pool's common queue, where very many do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import pytest

from llamacpp_mqtt_deploy.pool_ports import SharedJournal
from llamacpp_mqtt_deploy.ports import EntryKey, Outbox
from llamacpp_mqtt_deploy.worker.pooled import queue_watch
from llamacpp_mqtt_deploy.worker.pooled.queue_watch import WaitingRequests
from tests.support.store_cases import entry

LOOKED_AT_ONCE = 1000
WAITING = 9000


class _StandingQueue:
    """Everybody keeps the place in which he came."""

    def __init__(self) -> None:
        self.looks: list[int] = []

    def watched(self, keys: Sequence[EntryKey]) -> dict[EntryKey, int]:
        self.looks.append(len(keys))
        return {key: int(key.request_id[1:]) + 1 for key in keys}


class _Heard:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def publish(self, _topic: str, payload: bytes, **_: Any) -> str:
        self.events.append(json.loads(payload))
        return "queued"

    def told(self, kind: str) -> set[str]:
        return {event["request_id"] for event in self.events if event["type"] == kind}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(queue_watch.time, "monotonic", lambda: now[0])
    return now


def test_of_thousands_that_wait_in_a_queue_that_stands_still_everybody_hears_a_ping(clock: list[float]) -> None:
    journal, heard = _StandingQueue(), _Heard()
    waiting = WaitingRequests(
        journal=cast("SharedJournal", journal), outbox=cast("Outbox", heard), heartbeat_s=lambda: 15.0
    )
    for number in range(WAITING):
        waiting.add(entry(f"r{number}"), received_at=clock[0], position=0)
    for _ in range(4 * 30):
        clock[0] += 0.25
        waiting.check()
    everybody = {f"r{number}" for number in range(WAITING)}
    assert heard.told("queued") == everybody
    assert heard.told("ping") == everybody
    assert max(journal.looks) <= LOOKED_AT_ONCE


def test_a_newcomer_is_told_its_place_before_those_who_know_theirs(clock: list[float]) -> None:
    heard = _Heard()
    waiting = WaitingRequests(
        journal=cast("SharedJournal", _StandingQueue()), outbox=cast("Outbox", heard), heartbeat_s=lambda: 15.0
    )
    for number in range(WAITING):
        waiting.add(entry(f"r{number}"), received_at=clock[0], position=number + 1)
    clock[0] += 5.0
    waiting.add(entry("r9000"), received_at=clock[0] - 0.5, position=0)
    waiting.check()
    assert "r9000" in heard.told("queued")
