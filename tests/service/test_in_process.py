"""Moments that a real broker or engine meets too rarely to be waited for, brought about in process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall
from llamacpp_mqtt_deploy.ports import Delivery
from llamacpp_mqtt_deploy.service import daemon
from llamacpp_mqtt_deploy.service.daemon import Daemon
from llamacpp_mqtt_deploy.service.identity import client_id
from llamacpp_mqtt_deploy.stopping import StopSignal
from llamacpp_mqtt_deploy.testing.loopback import LoopbackLink
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from llamacpp_mqtt_deploy.worker.jobs import Job
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker, bus_in


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with bus_in(tmp_path) as bus:
        yield bus


class AtOnce(ScriptedEngine):
    """Has the whole answer at hand before its reader comes round, as a fast server or a busy reader makes it."""

    @override
    def stream(
        self,
        call: EngineCall,
        *,
        stop: StopSignal,
        on_wait: Callable[[str], None],
        before_read: Callable[[], None] | None = None,
    ) -> Iterator[Delta]:
        deltas = super().stream(call, stop=stop, on_wait=on_wait)
        yield next(deltas)
        if before_read is not None:
            before_read()
        yield from deltas


def test_an_answer_that_arrives_in_one_read_is_published_once(bus: Bus) -> None:
    bus.worker(AtOnce())
    for number in range(10):
        bus.ask(f"text number {number}", request_id=f"r{number}", session=f"s{number}")
    for number in range(10):
        done = bus.listener.terminal(f"r{number}")
        chunks = [event["content"] for event in bus.listener.of(f"r{number}") if event["type"] == "chunk"]
        assert "".join(chunks) == done["full_content"] == f"text number {number}"


class Stubborn(LoopbackLink):
    """Raises these errors, one for each subscription, before it subscribes."""

    errors: list[Exception]

    @override
    def subscribe(
        self,
        filters: Sequence[tuple[str, int]],
        *,
        timeout_s: float,
        retained: bool = False,
        give_up: Callable[[], bool] | None = None,
    ) -> Mapping[str, str]:
        if self.errors:
            raise self.errors.pop(0)
        return super().subscribe(filters, timeout_s=timeout_s, retained=retained, give_up=give_up)


def _settings(bus: Bus) -> dict[str, str]:
    return {"sessions.path": str(bus.state / "state.db"), "mqtt.worker_id": "w1"}


def _worker_with(bus: Bus, errors: list[Exception]) -> WholeWorker:
    worker = WholeWorker(broker=bus.broker, engine=ScriptedEngine(), settings=_settings(bus))
    link = Stubborn(bus.broker, client_id=client_id(worker.loaded.settings))
    link.errors = errors
    worker.daemon = Daemon(worker.loaded, link=link, engine=worker.engine)
    bus.workers.append(worker)
    worker.start()
    return worker


@pytest.mark.parametrize(
    "errors",
    [
        # while looking for rivals, then twice while subscribing again
        [TimeoutError("no SUBACK"), TimeoutError("no SUBACK"), ConnectionError("lost")],
        [ConnectionError("lost"), TimeoutError("no SUBACK")],
    ],
)
def test_a_broker_that_does_not_answer_a_subscription_is_asked_again_until_it_does(
    bus: Bus, errors: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_START_UP_AGAIN_S", 0.05)
    worker = _worker_with(bus, errors)
    bus.listener.until(_topic="llm/status/w1", state="online")
    assert worker.daemon._startup.settled, "what an earlier life left must not be forgotten"
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert worker.exit_code is None


def test_a_defect_in_the_reading_of_one_burst_does_not_end_the_reading(bus: Bus) -> None:
    worker = bus.worker()
    positions = worker.daemon.parts.registry.waiting
    calls: list[object] = []

    def broken(jobs: Sequence[Job]) -> list[Job]:
        calls.append(jobs)
        if len(calls) == 1:
            raise RuntimeError("a defect")
        return positions(jobs)

    worker.daemon.parts.registry.waiting = broken  # type: ignore[method-assign]
    bus.ask("one", request_id="r1", session="a")
    eventually(lambda: calls)
    bus.ask("two", request_id="r2", session="b")
    assert bus.listener.terminal("r2")["type"] == "done"
    # The message of the defect is not delivered for ever, and its client gets an answer.
    assert bus.listener.terminal("r1")["code"] == "internal"


class Slow(LoopbackLink):
    """Subscribes when it is let."""

    may: threading.Event

    @override
    def subscribe(
        self,
        filters: Sequence[tuple[str, int]],
        *,
        timeout_s: float,
        retained: bool = False,
        give_up: Callable[[], bool] | None = None,
    ) -> Mapping[str, str]:
        assert self.may.wait(10)
        return super().subscribe(filters, timeout_s=timeout_s, retained=retained, give_up=give_up)


def test_a_request_that_comes_before_the_greeting_is_not_taken_for_one_that_was_left_behind(bus: Bus) -> None:
    worker = WholeWorker(broker=bus.broker, engine=ScriptedEngine(), settings=_settings(bus))
    link = Slow(bus.broker, client_id=client_id(worker.loaded.settings))
    link.may = threading.Event()
    worker.daemon = Daemon(worker.loaded, link=link, engine=worker.engine)
    bus.workers.append(worker)
    worker.start()
    intake = worker.daemon.parts.intake
    eventually(lambda: link.info().state == "online")
    # As a broker does that kept the session of an earlier life.
    early = Delivery(
        topic="llm/request/demo",
        payload=b'{"prompt":"early","request_id":"r1"}',
        qos=1,
        received_at=time.monotonic(),
    )
    assert worker.daemon._on_delivery(early)
    deadlines = [intake.beat_at]
    for _ in range(2):
        eventually(lambda: intake.beat_at > deadlines[-1])
        deadlines.append(intake.beat_at)
    assert bus.listener.of("r1") == []
    link.may.set()
    assert bus.listener.terminal("r1")["type"] == "done"
    assert bus.listener.read("r1").content == "early"
