"""The broker restarts, dies, forgets, comes late or hangs: requests still end once, and the worker is back soon."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.core.events import EventReader
from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Watcher
from tests.support.cable import SUBACK, Cable
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]

MUCH = "max_queued_messages 100000"
SAVE_EVERYTHING = ["autosave_interval 1", "autosave_on_changes true"]


def _read(watcher: Watcher, request_id: str) -> EventReader:
    """What a client that keeps the rules makes of everything that came."""
    reader = EventReader(request_id)
    for event in watcher.of(request_id):
        reader.feed(event)
    return reader


def _ends(watcher: Watcher, request_id: str) -> set[bytes]:
    return {
        seen.payload for seen in watcher.seen() if seen.event.get("final") and seen.event["request_id"] == request_id
    }


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "forgotten"])
def test_a_broker_that_is_killed_under_load_costs_no_accepted_request(
    protocol: str,
    saved: bool,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto(persistence=saved, settings=[MUCH, *(SAVE_EVERYTHING if saved else [])])
    watcher = watch(broker.port, version=protocol)
    worker = start_worker(broker.port, llama_server.url, mqtt__protocol=protocol)
    payloads = {}
    for number in range(12):
        name = f"r{number}"
        payloads[name] = watcher.ask(f"s{number}", "go on", request_id=name, max_tokens=1500)
    for number in range(4):
        watcher.first(type="chunk", request_id=f"r{number}")
    for number in range(12):
        watcher.first(request_id=f"r{number}")  # its first event: it is accepted
    broker.kill()
    worker.until(lambda: worker.log("link.lost"), 10, "loss of the link")
    back_at = time.monotonic()
    broker.start()
    worker.until(lambda: len(worker.log("link.online")) >= 2, 10, "reconnect")
    assert time.monotonic() - back_at < 10
    # The rules for clients: after a reconnect, publish again what has not ended, the same bytes. A broker that saved nothing
    # may also have lost an end that it had acknowledged.
    for _ in range(4):
        missing = [name for name in payloads if not _ends(watcher, name)]
        for name in missing:
            watcher.publish(f"llm/request/s{name[1:]}", payloads[name])
        try:
            for name in missing:
                watcher.terminal(name, 15)
            break
        except AssertionError:
            continue
    for name in payloads:
        assert len(_ends(watcher, name)) == 1, _ends(watcher, name)
        reader = _read(watcher, name)
        assert reader.terminal is not None
        assert reader.terminal["type"] == "done", reader.terminal
        assert reader.content == reader.terminal["full_content"]
        assert reader.terminal["usage"]["completion_tokens"] == 1500
    # Chunks may come again (worker and broker both send again what was not acknowledged), but nothing was run again.
    eventually(lambda: len(worker.log("request.finished")) >= len(payloads))
    finished = worker.log("request.finished")
    assert sorted((line["request_id"], line["starts"]) for line in finished) == sorted((name, 1) for name in payloads)
    late = watch(broker.port, version=protocol)
    assert late.first(_topic="llm/status/w1").event["state"] == "online"


def test_a_worker_waits_for_a_broker_that_comes_later(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    broker.kill()
    worker = start_worker(broker.port, llama_server.url, ready=False)
    worker.until(lambda: worker.log("link.refused"), 10, "a line that says why")
    assert str(broker.port) in worker.log("link.refused")[0]["why"]
    assert "READY=1" not in worker.notify.words()
    broker.start()
    worker.wait_ready(10)
    watcher = watch(broker.port)
    watcher.ask("s", "hello", request_id="r", max_tokens=3)
    assert watcher.terminal("r")["type"] == "done"


def test_an_end_that_the_broker_did_not_take_before_sigterm_is_delivered_by_the_next_life(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    for number in range(3):
        watcher.ask(f"s{number}", "go on", request_id=f"r{number}", max_tokens=1500)
    for number in range(3):
        watcher.first(type="chunk", request_id=f"r{number}")
    broker.kill()
    worker.until(lambda: len(worker.log("request.finished")) == 3, 20, "ends without a broker")
    assert worker.stop(20) == 0
    broker.start()
    watcher.wait_back()
    second = start_worker(broker.port, llama_server.url)
    eventually(lambda: second.log("journal.recovered"))
    assert second.log("journal.recovered")[0]["delivered_again"] == 3
    for number in range(3):
        assert watcher.terminal(f"r{number}")["type"] == "done"


def test_sigterm_ends_a_worker_whose_broker_hangs(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    worker = start_worker(broker.port, llama_server.url, limits__drain_timeout_s=1)
    broker.freeze()
    assert worker.stop(15) == 0
    broker.thaw()
    # The goodbye was not acknowledged, so the broker says it: the will.
    watch(broker.port).first(_topic="llm/status/w1", state="offline")


def test_sigterm_ends_a_worker_whose_broker_hangs_before_it_has_answered_a_subscription(
    start_worker: StartWorker, mosquitto: Mosquitto, llama_server: LlamaServer, cable_to: Callable[[int], Cable]
) -> None:
    cable = cable_to(mosquitto.port)
    cable.eat(SUBACK)
    worker = start_worker(cable.port, llama_server.url, ready=False, limits__drain_timeout_s=1, mqtt__root="hanging")
    worker.until(lambda: cable.eaten, 15, "a subscription")
    asked_at = time.monotonic()
    assert worker.stop(15) == 0
    assert time.monotonic() - asked_at < 5


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_cable_that_is_cut_again_and_again_costs_no_event(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
    cable_to: Callable[[int], Cable],
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    cable = cable_to(broker.port)
    watcher = watch(broker.port, version=protocol)
    worker = start_worker(
        cable.port, llama_server.url, mqtt__protocol=protocol, mqtt__reconnect_max_s=0.2, logging__level="debug"
    )
    for number in range(4):
        watcher.ask(f"s{number}", "go on", request_id=f"r{number}", max_tokens=3000)
    for cut in range(4):
        for number in range(4):
            since = watcher.count()
            if not any(
                seen.event.get("final") for seen in watcher.seen() if seen.event.get("request_id") == f"r{number}"
            ):
                watcher.first(since=since, request_id=f"r{number}")
        cable.cut()
        wanted = cut + 2
        worker.until(lambda wanted=wanted: len(worker.log("link.online")) >= wanted, 10, "reconnect")  # type: ignore[misc]
    for number in range(4):
        watcher.terminal(f"r{number}")
        seqs = [event["seq"] for event in watcher.of(f"r{number}") if event["type"] == "chunk"]
        done = watcher.terminal(f"r{number}")
        assert done["type"] == "done"
        assert sorted(set(seqs)) == list(range(done["seq"])), "a chunk is missing"
        reader = _read(watcher, f"r{number}")
        assert not reader.hole
        assert reader.content == done["full_content"]
    assert worker.stop() == 0


def test_a_request_that_waits_ends_by_its_time_limit_also_while_the_broker_is_away(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    payload = watcher.ask("s", "go on", request_id="r", max_tokens=8000, timeout_s=1.0)
    watcher.first(type="chunk", request_id="r")
    broker.kill()
    worker.until(lambda: worker.log("request.finished"), 10, "the end")
    broker.start()
    # This broker saved no session, so the end may have come before the watcher was back: it asks again, as clients have to.
    watcher.wait_back()
    watcher.publish("llm/request/s", payload)
    assert watcher.terminal("r")["code"] == "timeout"
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0


def _threads_and_files(worker: DaemonProcess) -> tuple[int, int]:
    own = Path(f"/proc/{worker.process.pid}")
    return len(list((own / "task").iterdir())), len(list((own / "fd").iterdir()))


def test_a_broker_that_is_gone_for_long_costs_nothing_and_everything_is_delivered_when_it_is_back(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    watcher = watch(broker.port)
    worker = start_worker(
        broker.port,
        llama_server.url,
        mqtt__outbox_messages=100,
        mqtt__reconnect_max_s=0.1,  # as many attempts in seconds as else in an hour
        status__every_s=1,
        status__health_every_s=1,
    )
    payloads = {}
    for number in range(8):
        stream = "sentence" if number % 2 else True
        payloads[f"r{number}"] = watcher.ask(
            f"s{number}", "go on", request_id=f"r{number}", max_tokens=1500, stream=stream
        )
    for name in payloads:
        watcher.first(request_id=name)  # its first event: it is accepted
    broker.kill()
    worker.until(lambda: len(worker.log("request.finished")) == 8, 30, "ends without a broker")
    (threads, files), memory_before = _threads_and_files(worker), worker.rss_bytes()
    long_at = time.monotonic() + 6
    worker.until(lambda: time.monotonic() > long_at, 10, "a long time")
    threads_then, files_then = _threads_and_files(worker)
    assert threads_then <= threads
    assert files_then <= files + 1  # an attempt may be on its way
    assert worker.rss_bytes() - memory_before < 4 * 2**20
    # It is told, to the log and to systemctl, and not for each attempt.
    why = worker.log("link.lost") + worker.log("link.refused")
    assert str(broker.port) in why[-1]["why"]
    assert len(why) < 10, why
    assert any(word.startswith("STATUS=") and f":{broker.port}" in word for word in worker.notify.words())
    broker.start()
    worker.until(lambda: len(worker.log("link.online")) >= 2, 10, "reconnect")
    assert worker.log("link.online")[-1]["unacknowledged"] <= 100
    watcher.wait_back()
    for name, payload in payloads.items():
        if not _ends(watcher, name):
            watcher.publish(f"llm/request/s{name[1:]}", payload)
    for name in payloads:
        done = watcher.terminal(name)
        assert done["type"] == "done", done
        reader = _read(watcher, name)
        assert reader.content == done["full_content"]
        assert reader.terminal == done
    assert {line["starts"] for line in worker.log("request.finished")} == {1}
    watcher.ask("s", "hello", request_id="new", max_tokens=3)
    assert watcher.terminal("new")["type"] == "done"
    assert watch(broker.port).first(_topic="llm/status/w1").event["state"] == "online"
    assert worker.stop() == 0
