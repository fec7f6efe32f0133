"""Signals, and what systemd hears: real signals to a real process, a real notify socket."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]


def test_sigterm_lets_running_requests_finish_and_says_goodbye(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url, limits__drain_timeout_s=90)
    for number in range(4):
        watcher.ask(f"s{number}", "go on", request_id=f"r{number}", max_tokens=2000)
    for number in range(4):
        watcher.first(type="chunk", request_id=f"r{number}")
    watcher.ask("late", "wait", request_id="queued", max_tokens=4)
    watcher.first(type="queued", request_id="queued")
    worker.send(signal.SIGTERM)
    watcher.first(_topic="llm/status/w1", state="draining")
    watcher.ask("s9", "too late", request_id="refused")
    assert watcher.terminal("refused")["code"] == "shutting_down"
    assert worker.wait() == 0
    for number in range(4):
        watcher.terminal(f"r{number}")
        assert check_stream(watcher.of(f"r{number}"))["type"] == "done"
    watcher.first(_topic="llm/status/w1", state="offline", reason="stopped")
    words = worker.notify.words()
    assert "STOPPING=1" in words
    assert words.index("READY=1") < words.index("STOPPING=1")
    # The one that waited is the next life's.
    start_worker(broker.port, llama_server.url, limits__drain_timeout_s=90)
    assert watcher.terminal("queued")["type"] == "done"
    late = watch(broker.port)
    assert late.first(_topic="llm/status/w1").event["state"] == "online"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_with_a_terminal_event_for_each(
    number: signal.Signals,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url, limits__drain_timeout_s=3600)
    for each in range(3):
        watcher.ask(f"s{each}", "go on", request_id=f"r{each}", max_tokens=8000)
    for each in range(3):
        watcher.first(type="chunk", request_id=f"r{each}")
    worker.send(number)
    watcher.first(_topic="llm/status/w1", state="draining")
    worker.send(number)
    assert worker.wait(10) == 0
    for each in range(3):
        error = watcher.terminal(f"r{each}")
        assert error["code"] == "shutting_down"
        check_stream(watcher.of(f"r{each}"))
        text = "".join(event.get("content", "") for event in watcher.of(f"r{each}") if event["type"] == "chunk")
        assert error["partial_content"] == text
    watcher.first(_topic="llm/status/w1", state="offline", reason="stopped")
    llama_server.idle_within(10)


def test_sigterm_ends_an_idle_worker_within_two_seconds(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    worker = start_worker(broker.port, llama_server.url)
    assert worker.stop(5) == 0


def test_sighup_takes_a_new_configuration_and_survives_a_wrong_one(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url, generation__max_tokens=5)
    watcher.ask("s1", "before", request_id="before")
    assert watcher.terminal("before")["usage"]["completion_tokens"] == 5
    worker.write_config(generation__max_tokens=9)
    worker.send(signal.SIGHUP)
    eventually(lambda: worker.log("configuration.reloaded"))
    assert worker.log("configuration.reloaded")[0]["changed"] == ["generation.max_tokens"]
    eventually(lambda: worker.notify.words().count("READY=1") == 2)
    assert any(word.startswith("RELOADING=1\nMONOTONIC_USEC=") for word in worker.notify.words())
    watcher.ask("s1", "after", request_id="after")
    assert watcher.terminal("after")["usage"]["completion_tokens"] == 9
    worker.write_config(generation__max_tokens=0, limits__queue_size="many")
    worker.send(signal.SIGHUP)
    eventually(lambda: worker.log("configuration.refused"))
    assert len(worker.log("configuration.refused")[0]["problems"]) == 2
    eventually(lambda: worker.notify.words().count("READY=1") == 3)
    watcher.ask("s1", "still", request_id="still")
    assert watcher.terminal("still")["usage"]["completion_tokens"] == 9


def test_ready_is_said_only_when_subscribed_and_the_engine_answers(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    engine = start_llama_server()
    engine.kill()
    worker = start_worker(
        broker.port, engine.url, ready=False, status__every_s=1, environment={"WATCHDOG_USEC": "400000"}
    )
    assert watcher.first(_topic="llm/status/w1", state="online").event["engine"]["state"] != "ready"
    # Long enough for a wrong READY=1: three beats of the watchdog, which lives before the service is ready.
    worker.until(lambda: worker.notify.words().count("WATCHDOG=1") >= 3, 10, "watchdog")
    assert "READY=1" not in worker.notify.words()
    assert any("engine" in word for word in worker.notify.words() if word.startswith("STATUS="))
    watcher.ask("s1", "early", request_id="early", max_tokens=3)
    watcher.first(type="queued", request_id="early")
    engine.start()
    worker.wait_ready()
    assert watcher.terminal("early")["type"] == "done"
    eventually(lambda: any("engine ready" in word for word in worker.notify.words()))
    beats = worker.notify.words().count("WATCHDOG=1")
    worker.until(lambda: worker.notify.words().count("WATCHDOG=1") >= beats + 3, 10, "watchdog")


def test_without_a_watchdog_in_the_environment_of_the_process_itself_the_worker_still_serves(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    start_worker(
        broker.port, llama_server.url, environment={"WATCHDOG_USEC": "nonsense", "NOTIFY_SOCKET": ""}, ready=False
    )
    watcher.first(_topic="llm/status/w1", state="online")
    watcher.ask("s1", "hello", request_id="r", max_tokens=3)
    assert watcher.terminal("r")["type"] == "done"


def test_sigterm_ends_a_worker_that_waits_for_its_broker(start_worker: StartWorker, llama_server: LlamaServer) -> None:
    worker = start_worker(free_port(), llama_server.url, ready=False)
    worker.until(lambda: worker.log("link.refused"), 20, "a line that says why")
    assert worker.stop(10) == 0
    assert "READY=1" not in worker.notify.words()


def test_sigterm_ends_a_worker_that_waits_for_its_engine_and_keeps_who_waits_too_for_the_next(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    worker = start_worker(broker.port, f"http://127.0.0.1:{free_port()}", ready=False, limits__drain_timeout_s=60)
    watcher.first(_topic="llm/status/w1", state="online")
    watcher.ask("s", "anybody there?", request_id="r", max_tokens=3)
    watcher.first(type="queued", request_id="r")
    assert worker.stop(10) == 0
    assert "READY=1" not in worker.notify.words()
    assert not [event for event in watcher.of("r") if event.get("final")]
    start_worker(broker.port, llama_server.url)
    assert watcher.terminal("r")["type"] == "done"


def test_a_storm_of_sighups_under_load_costs_nothing(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    worker = start_worker(broker.port, llama_server.url)
    for number in range(12):
        watcher.ask(f"s{number}", "go on", request_id=f"r{number}", max_tokens=300)
    watcher.first(type="chunk")
    for number in range(20):
        worker.write_config(generation__system_prompt=f"number {number}")
        worker.send(signal.SIGHUP)
        eventually(lambda number=number: len(worker.log("configuration.reloaded")) > number)  # type: ignore[misc]
    for number in range(12):
        watcher.terminal(f"r{number}")
        assert check_stream(watcher.of(f"r{number}"))["type"] == "done"
    assert worker.stop() == 0
