"""What a worker does every few seconds beside serving."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from llamacpp_mqtt_deploy.ports import Purged, StoreError
from llamacpp_mqtt_deploy.service.upkeep import Upkeep
from llamacpp_mqtt_deploy.stores.group_commit import Write
from llamacpp_mqtt_deploy.worker.journal_clock import BELIEVED_AFTER_S, JournalClock
from tests.support.store_cases import NOW

YEAR_S = 365 * 86400.0


class Disk:
    """A store whose writes are over when the test says so."""

    def __init__(self) -> None:
        self.told: list[float] = []
        self.writes: list[Write] = []
        self.refuses = False

    def clock_was_set(self, forward_s: float, *, now: float) -> Write:
        assert now > NOW
        if self.refuses:
            raise StoreError("not now")
        self.told.append(forward_s)
        self.writes.append(Write(lambda _: None, size=0, durable=False, urgent=True))
        return self.writes[-1]

    def purge(self, **_: Any) -> Purged:
        return Purged(entries=0, sessions=0, more=False)


class Hands:
    """A clock that is set forward by a year after a minute."""

    def __init__(self) -> None:
        self.passed = self.set_by = 0.0
        self.clock = JournalClock(wall=lambda: NOW + self.passed + self.set_by, steady=lambda: self.passed)
        self.passed = 60.0
        self.clock.now()
        self.set_by = YEAR_S
        self.clock.now()
        self.passed += BELIEVED_AFTER_S


def upkeep(store: object, clock: JournalClock) -> Callable[[], None]:
    """Its purge."""
    sessions = SimpleNamespace(ttl_s=86400.0, max_sessions=10)
    limits = SimpleNamespace(remember_s=600.0, max_journal_mib=1)
    settings = SimpleNamespace(sessions=sessions, limits=limits)
    parts: Any = SimpleNamespace(
        registry=SimpleNamespace(limits_tokens=False),
        in_force=SimpleNamespace(settings=settings),
        store=store,
        clock=clock,
    )
    return Upkeep(parts, online=lambda: True).purge


def test_a_store_that_takes_long_is_told_once_that_the_clock_was_set() -> None:
    disk, hands = Disk(), Hands()
    purge = upkeep(disk, hands.clock)
    purge()
    purge()
    assert disk.told == [YEAR_S]
    disk.writes[0].settle()
    purge()
    assert disk.told == [YEAR_S]


def test_a_store_that_could_not_write_it_is_told_again_that_the_clock_was_set() -> None:
    disk, hands = Disk(), Hands()
    purge = upkeep(disk, hands.clock)
    disk.refuses = True
    purge()
    disk.refuses = False
    purge()
    disk.writes[0].problem = StoreError("full")
    disk.writes[0].settle()
    purge()
    disk.writes[1].settle()
    purge()
    assert disk.told == [YEAR_S, YEAR_S]
