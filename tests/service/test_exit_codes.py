"""How the process ends when it cannot serve: codes that systemd and scripts can tell apart, and lines that say why."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import check_stream
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]


def test_a_wrong_configuration_ends_with_2_and_one_line_for_each_field(tmp_path: Path) -> None:
    worker = DaemonProcess(
        tmp_path / "w1",
        {"mqtt.port": 99999, "limits.queue_size": "many", "engine.knd": "server", "streaming.mode": "telepathy"},
    )
    worker.start()
    assert worker.wait() == 2
    lines = [line.strip() for line in worker.log_text().splitlines()]
    for key in ("[mqtt] port", "[limits] queue_size", "[engine] knd", "[streaming] mode"):
        assert sum(line.startswith(f"{key}: ") for line in lines) == 1, lines
    assert len(lines) == 6, lines
    worker.close()


def test_topics_that_clash_end_with_2(tmp_path: Path) -> None:
    worker = DaemonProcess(
        tmp_path / "w1",
        {"routes.loop.request": "llm/reply/{session}", "routes.loop.reply": "llm/request/{session}"},
    )
    worker.start()
    assert worker.wait() == 2
    assert "loop" in worker.log_text()
    worker.close()
    assert "Traceback" not in worker.log_text()


@pytest.mark.parametrize("missing", ["broker", "engine"])
def test_a_broker_or_engine_that_stays_away_ends_with_3_after_the_startup_timeout(
    missing: str, start_worker: StartWorker, mosquitto: Mosquitto, llama_server: LlamaServer
) -> None:
    nobody = free_port()
    worker = start_worker(
        nobody if missing == "broker" else mosquitto.port,
        f"http://127.0.0.1:{nobody}" if missing == "engine" else llama_server.url,
        ready=False,
        mqtt__root=f"absent-{missing}",
        limits__startup_timeout_s=1,
    )
    assert worker.wait(15) == 3
    reason = worker.log("worker.ending")[0]["reason"]
    assert missing in reason
    assert str(nobody) in reason
    assert "READY=1" not in worker.notify.words()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_second_worker_of_another_name_leaves_the_root_to_the_first(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto()
    first = start_worker(broker.port, llama_server.url, mqtt__protocol=protocol, status__every_s=1)
    second = start_worker(
        broker.port,
        llama_server.url,
        folder="w2",
        ready=False,
        mqtt__worker_id="w2",
        mqtt__protocol=protocol,
        status__every_s=1,
    )
    assert second.wait(20) == 3
    reason = second.log("worker.ending")[0]["reason"]
    assert "'w1'" in reason
    watcher = watch(broker.port, version=protocol)
    watcher.ask("s", "still there?", request_id="r", max_tokens=3)
    assert watcher.terminal("r")["type"] == "done"
    check_stream(watcher.of("r"))
    assert not any(seen.topic == "llm/status/w2" and seen.event.get("state") == "online" for seen in watcher.seen())
    assert first.stop() == 0


def test_a_second_worker_on_the_same_state_file_ends_with_3_and_names_the_process(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer
) -> None:
    broker = start_mosquitto()
    first = start_worker(broker.port, llama_server.url)
    second = start_worker(broker.port, llama_server.url, ready=False)
    assert second.wait(15) == 3
    assert str(first.process.pid) in second.log("worker.ending")[0]["reason"]
    assert first.process.poll() is None


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("together", [False, True], ids=["later", "together"])
def test_of_two_workers_with_the_same_client_id_exactly_one_survives(
    together: bool,
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port, version=protocol)
    first = start_worker(broker.port, llama_server.url, mqtt__protocol=protocol, status__every_s=1, ready=not together)
    second = start_worker(
        broker.port, llama_server.url, folder="twin", ready=False, mqtt__protocol=protocol, status__every_s=1
    )

    def one_ended() -> bool:
        return first.process.poll() is not None or second.process.poll() is not None

    try:
        second.until(one_ended, 30, "end of one of the two")
    except AssertionError:
        if not one_ended():
            raise
    loser, winner = (first, second) if first.process.poll() is not None else (second, first)
    assert loser.wait() == 3
    reason = loser.log("worker.ending")[0]["reason"]
    # As it has met the other one: by its status, by the broker's words, or, of two that start at once, by its claim alone.
    assert any(named in reason for named in ("worker 'w1'", "client id", "another worker (instance "))
    winner.wait_ready()
    since = watcher.count()
    for number in range(4):
        watcher.ask(f"s{number}", "who is there?", request_id=f"r{number}", max_tokens=3)
    for number in range(4):
        assert watcher.first(since=since, request_id=f"r{number}", final=True).event["type"] == "done"
        check_stream(watcher.of(f"r{number}"))
    # Three renewals of the status later it is still there, and says so.
    for _ in range(3):
        assert watcher.first(since=watcher.count(), _topic="llm/status/w1").event["state"] == "online"
    with pytest.raises(subprocess.TimeoutExpired):
        winner.process.wait(0.1)
    assert winner.stop() == 0


def test_a_state_directory_that_cannot_be_written_ends_with_1_and_says_what_to_do(
    start_worker: StartWorker, mosquitto: Mosquitto, llama_server: LlamaServer
) -> None:
    worker = start_worker(
        mosquitto.port, llama_server.url, ready=False, mqtt__root="unwritable", sessions__path="/proc/nowhere/state.db"
    )
    assert worker.wait(15) == 1
    assert "/proc/nowhere" in worker.log("worker.ending")[0]["reason"]
