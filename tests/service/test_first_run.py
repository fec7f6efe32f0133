"""The README's first run and many requests at once, with a real broker, a real llama.cpp server and the real command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.service.watcher import check_stream
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto
from tests.support.services import require_program
from tests.support.waiting import eventually

pytestmark = [pytest.mark.broker, pytest.mark.engine]

StartMosquitto = Callable[..., Mosquitto]


def test_what_the_readme_shows_works_with_the_commands_of_mosquitto(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, llama_server: LlamaServer
) -> None:
    publish, subscribe = require_program("mosquitto_pub"), require_program("mosquitto_sub")
    broker = start_mosquitto()
    start_worker(broker.port, llama_server.url, generation__max_tokens=12)
    where = ["-h", "127.0.0.1", "-p", str(broker.port), "-q", "1"]
    with subprocess.Popen(
        [subscribe, *where, "-t", "llm/reply/demo", "-i", "the-reader", "-W", "60"], stdout=subprocess.PIPE, text=True
    ) as reader:
        try:
            assert reader.stdout is not None
            eventually(lambda: "Sending SUBACK to the-reader" in broker.log())
            subprocess.run(
                [publish, *where, "-t", "llm/request/demo", "-m", "Tell me about the sea"], check=True, timeout=20
            )
            events = []
            for line in reader.stdout:
                events.append(json.loads(line))
                if events[-1].get("final"):
                    break
        finally:
            reader.kill()
    done = check_stream(events)
    assert done["type"] == "done"
    assert done["finish_reason"] == "length"
    assert next(event["type"] for event in events if event["type"] != "queued") == "start"
    assert sum(event["type"] == "chunk" for event in events) >= 1
    assert done["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_64_requests_over_8_sessions_stream_without_a_hole(
    protocol: str,
    start_worker: StartWorker,
    start_mosquitto: StartMosquitto,
    watch: Watch,
    llama_server: LlamaServer,
) -> None:
    # A watcher of 64 streams must not be the slow subscriber for which mosquitto drops what is over 1000 messages.
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port, version=protocol)
    worker = start_worker(
        broker.port, llama_server.url, mqtt__protocol=protocol, limits__queue_size=100, limits__session_queue=100
    )
    watcher.first(_topic="llm/status/w1", state="online", slots=4)
    eventually(lambda: worker.log("link.online"))
    assert worker.log("link.online")[0]["protocol"] == protocol
    names = [f"r{number}" for number in range(64)]
    for number, name in enumerate(names):
        watcher.ask(f"s{number % 8}", f"prompt number {number}", request_id=name, max_tokens=24, seed=number)
    for name in names:
        watcher.terminal(name, 60.0)
    for name in names:
        done = check_stream(watcher.of(name))
        assert (done["type"], done["finish_reason"], done["usage"]["completion_tokens"]) == ("done", "length", 24)
        assert len(done["full_content"]) > 24
    # One session's prompts ran one after the other, in the order in which they came.
    ended = [seen.event["request_id"] for seen in watcher.seen() if seen.event.get("final")]
    for session in range(8):
        mine = [name for name in ended if int(name[1:]) % 8 == session]
        assert mine == sorted(mine, key=lambda name: int(name[1:]))
    eventually(lambda: len(worker.log("request.finished")) == 64)


def test_simulated_streaming_publishes_the_same_text_in_pieces(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, watch: Watch, llama_server: LlamaServer
) -> None:
    broker = start_mosquitto()
    watcher = watch(broker.port)
    start_worker(broker.port, llama_server.url, streaming__mode="simulated", streaming__chunk_interval_s=0.001)
    for number in range(8):
        watcher.ask(f"s{number}", "tell me", request_id=f"r{number}", max_tokens=30)
    for number in range(8):
        watcher.terminal(f"r{number}")
        done = check_stream(watcher.of(f"r{number}"))
        assert done["type"] == "done"
        assert done["seq"] > 1


def test_an_answer_of_15_kilobytes_and_a_history_of_ten_turns_survive_the_way(
    start_worker: StartWorker, start_mosquitto: StartMosquitto, watch: Watch, llama_server: LlamaServer
) -> None:
    broker = start_mosquitto(settings=["max_queued_messages 100000"])
    watcher = watch(broker.port)
    start_worker(broker.port, llama_server.url)
    watcher.ask("long", "go on", request_id="long", max_tokens=5000)
    for turn in range(10):
        watcher.ask("turns", f"turn {turn}", request_id=f"t{turn}", max_tokens=5)
        assert watcher.terminal(f"t{turn}")["type"] == "done"
    watcher.control("turns", "history", transaction="h")
    messages = watcher.first(transaction="h").event["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 10
    assert [message["content"] for message in messages[::2]] == [f"turn {turn}" for turn in range(10)]
    done = watcher.terminal("long", 60.0)
    check_stream(watcher.of("long"))
    assert len(done["full_content"].encode()) > 15_000
