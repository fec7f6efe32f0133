"""The worker dies in the middle: what was accepted ends exactly once, in this life or the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import Watcher, check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

RUNNING = [f"run{number}" for number in range(8)]
QUEUED = [f"wait{number}" for number in range(8)]


def _terminals(watcher: Watcher) -> Counter[str]:
    return Counter(seen.event["request_id"] for seen in watcher.seen() if seen.event.get("final"))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_after_sigkill_each_of_16_requests_ends_once_and_answers_again_when_sent_again(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    engine = start_llama_server(slots=8, n_ctx=4096)
    watcher = watch(broker.port, version=protocol)
    first = start_worker(broker.port, engine.url, mqtt__protocol=protocol)
    payloads = {}
    for number, name in enumerate(RUNNING):
        payloads[name] = watcher.ask(f"a{number}", "go on and on", request_id=name, max_tokens=4000)
    for name in RUNNING:
        watcher.first(type="chunk", request_id=name)
    for number, name in enumerate(QUEUED):
        payloads[name] = watcher.ask(f"b{number}", "wait your turn", request_id=name, max_tokens=4)
    for name in QUEUED:
        watcher.first(type="queued", request_id=name)
    first.kill()
    assert not _terminals(watcher), "the test is too slow: something ended before the worker was killed"
    watcher.first(_topic="llm/status/w1", state="offline", reason="lost")

    before = watcher.count()
    second = start_worker(broker.port, engine.url, mqtt__protocol=protocol)
    for name in RUNNING:
        error = watcher.terminal(name)
        assert (error["type"], error["code"], error["retryable"]) == ("error", "interrupted", True)
    for name in QUEUED:
        assert watcher.terminal(name)["type"] == "done"
        check_stream(watcher.of(name))
    # Delivered events are ticked off about once a second; a third life has nothing left to tell.
    second.stop()
    third = start_worker(broker.port, engine.url, mqtt__protocol=protocol)
    assert not third.log("journal.recovered")
    assert _terminals(watcher) == Counter(RUNNING + QUEUED)
    assert all(
        seen.event["type"] in ("error", "done", "queued", "start", "chunk")
        for seen in watcher.seen()[before:]
        if "request_id" in seen.event
    )

    stored = {
        name: next(s.payload for s in watcher.seen() if s.event.get("final") and s.event["request_id"] == name)
        for name in payloads
    }
    again = watcher.count()
    for number, name in enumerate(RUNNING):
        watcher.publish(f"llm/request/a{number}", payloads[name])
    for number, name in enumerate(QUEUED):
        watcher.publish(f"llm/request/b{number}", payloads[name])
    for name in payloads:
        assert watcher.first(since=again, request_id=name, final=True).payload == stored[name]
    assert not any(seen.event.get("type") in ("start", "chunk") for seen in watcher.seen()[again:])
    ledger = watcher.count()
    watcher.publish("llm/admin/w1", b"usage")
    rows = watcher.first(since=ledger, action="usage").event["usage"]
    assert sum(row["requests"] for row in rows) == len(payloads), "each counts once"
    assert {row["first_level"] for row in rows if row["tokens_out"]} == {f"b{number}" for number in range(8)}
    assert third.stop() == 0


def test_requests_published_while_the_worker_is_dead_run_when_it_comes_back(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    first = start_worker(broker.port, llama_server.url)
    first.kill()
    for number in range(20):
        watcher.ask(f"s{number}", "while you were away", request_id=f"r{number}", max_tokens=3)
    start_worker(broker.port, llama_server.url, ready=False)
    for number in range(20):
        end = watcher.terminal(f"r{number}")
        assert end["type"] == "done", str(end)
        check_stream(watcher.of(f"r{number}"))


def test_a_worker_killed_six_times_under_load_neither_loses_nor_doubles_a_request(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    names = []
    for life in range(6):
        worker = start_worker(broker.port, llama_server.url, limits__max_starts=100, ready=life == 0)
        for number in range(8):
            names.append(f"r{life}-{number}")
            watcher.ask(f"s{life}{number}", "go on", request_id=names[-1], max_tokens=60)
        # At another place each time: at the first word, amid the chunks, around the first ends.
        kind = ("queued", "start", "chunk", "chunk", "done", "done")[life]
        since = watcher.count()
        watcher.first(since=since, type=kind)
        worker.kill()
    start_worker(broker.port, llama_server.url, limits__max_starts=100)
    for name in names:
        watcher.terminal(name)
    for name in names:
        # At least once: the broker took the event, and the worker died before it could tick that off.
        ends = {seen.payload for seen in watcher.seen() if seen.event.get("final") and seen.event["request_id"] == name}
        assert len(ends) == 1, ends
        end = watcher.terminal(name)
        begun = sum(event["type"] == "chunk" and event["seq"] == 0 for event in watcher.of(name))
        assert begun <= 1, "an answer whose first chunk was published was begun again"
        assert end["type"] == "done" or end["code"] == "interrupted"


def test_an_engine_that_dies_in_mid_stream_ends_begun_requests_and_runs_the_others_again(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    engine = start_llama_server(slots=2)
    watcher = watch(broker.port)
    worker = start_worker(broker.port, engine.url)
    for number in range(2):
        watcher.ask(f"a{number}", "go on", request_id=f"run{number}", max_tokens=8000)
    for number in range(2):
        watcher.first(type="chunk", request_id=f"run{number}")
    for number in range(4):
        watcher.ask(f"b{number}", "wait", request_id=f"wait{number}", max_tokens=4)
    watcher.first(type="queued", request_id="wait3")
    engine.kill()
    for number in range(2):
        error = check_stream(watcher.of(f"run{number}")) if watcher.terminal(f"run{number}") else {}
        assert (error["code"], error["retryable"]) == ("engine_lost", True)
        assert error["partial_content"]
    watcher.first(type="queued", reason="engine_restarting")
    engine.start()
    for number in range(4):
        assert watcher.terminal(f"wait{number}")["type"] == "done"
        check_stream(watcher.of(f"wait{number}"))
    eventually(lambda: worker.log("engine.ready"))
