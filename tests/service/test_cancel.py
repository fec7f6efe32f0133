"""Cancel for real: the server's slot is free at once, wherever the request was on its way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]

MUCH = "max_queued_messages 100000"
# What was promised, and room for a busy machine with two cores.
FREE_WITHIN_S = 0.5 + 1.5


def test_a_cancelled_generation_tells_its_partial_text_and_frees_its_slot(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    engine = start_llama_server(slots=1)
    watcher = watch(broker.port)
    start_worker(broker.port, engine.url)
    watcher.ask("a", "go on", request_id="running", max_tokens=8000)
    watcher.first(type="chunk", request_id="running")
    watcher.ask("b", "wait", request_id="next", max_tokens=3)
    watcher.first(type="queued", request_id="next")
    watcher.control("a", "cancel", request_id="running", transaction="t")
    ack = watcher.first(type="ack", transaction="t")
    assert (ack.event["status"], ack.event["state"], ack.event["request_id"]) == ("ok", "running", "running")
    done = check_stream(watcher.of("running")) if watcher.terminal("running") else {}
    assert (done["type"], done["finish_reason"]) == ("done", "cancelled")
    assert done["full_content"]
    assert done["timings"]["cancel_ms"] < FREE_WITHIN_S * 1000
    # The only slot was free: the next one's first token came out of it.
    assert watcher.first(type="chunk", request_id="next").at - ack.at < FREE_WITHIN_S
    watcher.control("a", "history", transaction="h")
    messages = watcher.first(transaction="h").event["messages"]
    assert messages == [
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": done["full_content"]},
    ]


def test_a_long_prompt_is_cancelled_while_another_slot_generates(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, slow_llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    watcher = watch(broker.port)
    start_worker(broker.port, slow_llama_server.url)
    watcher.ask("a", "go on", request_id="other", max_tokens=6000)
    watcher.first(type="chunk", request_id="other")
    watcher.ask("b", "word " * 6500, request_id="long", max_tokens=5)
    watcher.first(type="start", request_id="long")
    watcher.ask("c", "wait", request_id="next", max_tokens=3)
    watcher.first(type="queued", request_id="next")
    watcher.control("b", "cancel", transaction="t")
    ack = watcher.first(type="ack", transaction="t")
    assert ack.event["cancelled"] == 1
    done = watcher.terminal("long")
    assert (done["finish_reason"], done["full_content"]) == ("cancelled", "")
    assert not any(event["type"] == "chunk" for event in watcher.of("long")), "the prompt was too short for this test"
    assert watcher.first(type="chunk", request_id="next").at - ack.at < FREE_WITHIN_S
    # The other stream went on, untouched.
    watcher.control("a", "cancel", transaction="t2")
    assert watcher.terminal("other")["finish_reason"] == "cancelled"
    check_stream(watcher.of("other"))
    slow_llama_server.idle_within(10)


def test_a_queued_request_is_cancelled_empty_and_a_cancel_that_came_first_is_remembered(
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    start_llama_server: Callable[..., LlamaServer],
    watch: Watch,
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    engine = start_llama_server(slots=1)
    watcher = watch(broker.port)
    start_worker(broker.port, engine.url)
    watcher.ask("a", "go on", request_id="running", max_tokens=8000)
    watcher.first(type="chunk", request_id="running")
    watcher.ask("b", "wait", request_id="waiting", max_tokens=3)
    watcher.first(type="queued", request_id="waiting")
    watcher.control("b", "cancel", request_id="waiting", transaction="t1")
    assert watcher.first(transaction="t1").event["state"] == "queued"
    done = check_stream(watcher.of("waiting")) if watcher.terminal("waiting") else {}
    assert (done["finish_reason"], done["full_content"], done["seq"]) == ("cancelled", "", 0)

    watcher.control("c", "cancel", request_id="early", transaction="t2")
    assert watcher.first(transaction="t2").event["state"] == "unknown"
    watcher.ask("c", "I was cancelled before I came", request_id="early", max_tokens=3)
    assert watcher.terminal("early")["finish_reason"] == "cancelled"
    check_stream(watcher.of("early"))

    watcher.control("b", "cancel", request_id="waiting", transaction="t3")
    assert watcher.first(transaction="t3").event["state"] == "ended"
    watcher.control("a", "reset", transaction="t4")
    assert watcher.first(transaction="t4").event["cancelled"] == 1
    assert watcher.terminal("running")["finish_reason"] == "cancelled"
    watcher.control("a", "history", transaction="t5")
    assert watcher.first(transaction="t5").event["messages"] == []


def test_forty_requests_that_are_cancelled_at_any_moment_each_end_once(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer, watch: Watch
) -> None:
    broker = start_mosquitto(settings=[MUCH])
    watcher = watch(broker.port)
    start_worker(broker.port, llama_server.url)
    for number in range(40):
        watcher.ask(f"s{number}", "go on", request_id=f"r{number}", max_tokens=1 + 37 * number % 300)
    for number in range(40):
        # After another event each time: the cancels fall before, into and after the generations.
        watcher.first(request_id=f"r{(number * 7) % 40}")
        watcher.control(f"s{number}", "cancel", request_id=f"r{number}", transaction=f"t{number}")
    for number in range(40):
        assert watcher.first(type="ack", transaction=f"t{number}").event["status"] == "ok"
        watcher.terminal(f"r{number}")
        assert check_stream(watcher.of(f"r{number}"))["finish_reason"] in ("cancelled", "length")
    watcher.ask("after", "still there?", request_id="after", max_tokens=3)
    assert watcher.terminal("after")["type"] == "done"
    llama_server.idle_within(10)
