"""What a user is promised, with a whole worker and a real engine, on each broker. `make brokers` adds those that BROKERS names."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Watcher, check_stream
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.other_brokers import CHOSEN, CHOSEN_MEMBERS
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine, pytest.mark.timeout(180)]

MEMBERS = ("mosquitto-5", "mosquitto-3.1.1", *(("amqtt-3.1.1", *CHOSEN_MEMBERS) if CHOSEN else ()))


@dataclass
class Place:
    """One broker and one root of its own; `worker` and `watch` use both."""

    member: str
    broker: Any
    root: str
    engine: LlamaServer
    _start_worker: StartWorker
    _watch: Watch

    def worker(self, **settings: Any) -> DaemonProcess:
        given = {"mqtt__root": self.root, "mqtt__protocol": "5" if self.member.endswith("-5") else "3.1.1"}
        return self._start_worker(self.broker.port, self.engine.url, **(given | settings))

    def watch(self, **wishes: Any) -> Watcher:
        return self._watch(self.broker.port, version=self.member.partition("-")[2], root=self.root, **wishes)

    def restart_broker(self) -> None:
        self.broker.stop()
        self.broker.start()


@pytest.fixture(scope="module")
def kept_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    broker = Mosquitto(tmp_path_factory.mktemp("kept"), persistence=True).start()
    yield broker
    broker.close()


@pytest.fixture(params=MEMBERS)
def place(
    request: pytest.FixtureRequest,
    kept_mosquitto: Mosquitto,
    broker_named: Callable[[str], Any],
    llama_server: LlamaServer,
    start_worker: StartWorker,
    watch: Watch,
) -> Place:
    name = request.param.partition("-")[0]
    broker = kept_mosquitto if name == "mosquitto" else broker_named(name)
    return Place(request.param, broker, f"t{uuid.uuid4().hex[:8]}", llama_server, start_worker, watch)


def test_an_answer_streams_in_order_without_a_hole(place: Place) -> None:
    place.worker()
    watcher = place.watch()
    for number in range(8):
        watcher.ask(f"u/s{number}", "go on", request_id=f"r{number}", max_tokens=60)
    for number in range(8):
        assert watcher.terminal(f"r{number}")["type"] == "done"
        check_stream(watcher.of(f"r{number}"))


def test_a_worker_with_default_settings_finds_the_version_that_the_broker_speaks(place: Place) -> None:
    worker = place.worker(mqtt__protocol="auto")
    eventually(lambda: worker.log("link.online"))
    spoken = worker.log("link.online")[0]["protocol"]
    assert spoken == ("5" if place.member.startswith("mosquitto") else "3.1.1")


def test_a_client_that_comes_later_reads_the_retained_status(place: Place) -> None:
    place.worker()
    status = place.watch().first(_topic=f"{place.root}/status/w1")
    assert status.retained
    assert status.event["state"] == "online"


def test_a_worker_that_dies_is_told_offline_by_its_will(place: Place) -> None:
    worker = place.worker()
    watcher = place.watch()
    watcher.first(_topic=f"{place.root}/status/w1", state="online")
    worker.kill()
    assert watcher.first(_topic=f"{place.root}/status/w1", state="offline").event["reason"] == "lost"


def test_requests_published_while_the_worker_is_away_run_when_it_is_back(place: Place) -> None:
    place.worker().stop()
    watcher = place.watch()
    for number in range(5):
        watcher.ask(f"s{number}", "later", request_id=f"r{number}", max_tokens=3)
    place.worker()
    for number in range(5):
        assert watcher.terminal(f"r{number}")["type"] == "done"


def test_requests_that_wait_at_the_broker_outlive_its_restart(place: Place) -> None:
    place.worker().stop()
    watcher = place.watch()
    for number in range(3):
        watcher.publish(
            f"{place.root}/request/s{number}",
            b'{"prompt":"later","request_id":"r%d","max_tokens":3}' % number,
        ).wait_for_publish(10)
    place.restart_broker()
    watcher.wait_back()
    place.worker()
    for number in range(3):
        assert watcher.terminal(f"r{number}")["type"] == "done"


def test_an_accepted_request_ends_once_over_a_restart_of_the_broker(place: Place) -> None:
    worker = place.worker()
    watcher = place.watch()
    payload = watcher.ask("s", "go on", request_id="r", max_tokens=1500)
    watcher.first(request_id="r", type="chunk")
    place.restart_broker()
    watcher.wait_back()
    worker.until(lambda: len(worker.log("link.online")) >= 2, 30, "reconnect")
    # The rules for clients: after a reconnect, and after silence, the same bytes again. A broker that kept nothing drops what
    # comes before the worker has subscribed again.
    for _ in range(4):
        watcher.publish(f"{place.root}/request/s", payload)
        with contextlib.suppress(AssertionError):
            watcher.terminal("r", 15)
            break
    ends = {seen.payload for seen in watcher.seen() if seen.event.get("request_id") == "r" and seen.event.get("final")}
    assert len(ends) == 1
    eventually(lambda: worker.log("request.finished"))
    assert len(worker.log("request.finished")) == 1


def test_a_request_that_is_sent_again_runs_once(place: Place) -> None:
    worker = place.worker()
    watcher = place.watch()
    payload = watcher.ask("s", "once", request_id="r", max_tokens=5)
    first = watcher.terminal("r")
    since = watcher.count()
    watcher.publish(f"{place.root}/request/s", payload)
    assert watcher.first(since=since, request_id="r", final=True).event == first
    eventually(lambda: worker.log("request.finished"))
    assert len(worker.log("request.finished")) == 1


def test_a_session_whose_name_has_a_dot_stays_itself(place: Place) -> None:
    place.worker()
    watcher = place.watch()
    watcher.ask("alice.phone", "who am I?", request_id="r", max_tokens=3)
    end = watcher.first(request_id="r", final=True)
    assert (end.topic, end.event["session_id"]) == (f"{place.root}/reply/alice.phone", "alice.phone")
