"""What clients hear of requests that wait in a pool's common queue, where very many do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from llamacpp_mqtt_deploy.pool_ports import SharedJournal
from llamacpp_mqtt_deploy.ports import EntryKey, Outbox
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


class _Watch:
    def __init__(self) -> None:
        self.time = 1000.0
        self.journal, self.heard = _StandingQueue(), _Heard()
        self.waiting = WaitingRequests(
            journal=cast("SharedJournal", self.journal),
            outbox=cast("Outbox", self.heard),
            heartbeat_s=lambda: 15.0,
            now=lambda: self.time,
        )


def test_of_thousands_that_wait_in_a_queue_that_stands_still_everybody_hears_a_ping() -> None:
    watch = _Watch()
    for number in range(WAITING):
        watch.waiting.add(entry(f"r{number}"), received_at=watch.time, position=0)
    for _ in range(4 * 30):
        watch.time += 0.25
        watch.waiting.check()
    everybody = {f"r{number}" for number in range(WAITING)}
    assert watch.heard.told("queued") == everybody
    assert watch.heard.told("ping") == everybody
    assert max(watch.journal.looks) <= LOOKED_AT_ONCE


def test_a_newcomer_is_told_its_place_before_those_who_know_theirs() -> None:
    watch = _Watch()
    for number in range(WAITING):
        watch.waiting.add(entry(f"r{number}"), received_at=watch.time, position=number + 1)
    watch.time += 5.0
    watch.waiting.add(entry("r9000"), received_at=watch.time - 0.5, position=0)
    watch.waiting.check()
    assert "r9000" in watch.heard.told("queued")
