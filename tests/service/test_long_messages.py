"""Messages that are far longer than anything the worker takes: they are answered, cost no memory, and do not come again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.service.conftest import StartWorker, Watch
from tests.support.daemon_process import DaemonProcess
from tests.support.llama_server import LlamaServer
from tests.support.mosquitto import Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.engine]

MIB = 1024 * 1024
LENGTH = 64 * MIB
MOST_GROWTH_MIB = 24
"""Of the worker's memory at its peak; it grew by 390 while messages were read as a whole."""


def peak_mib(worker: DaemonProcess) -> int:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) // 1024


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_of_64_mib_are_refused_as_they_come_and_not_delivered_again(
    start_worker: StartWorker,
    start_mosquitto: Callable[..., Mosquitto],
    llama_server: LlamaServer,
    watch: Watch,
    protocol: str,
) -> None:
    broker = start_mosquitto(verbose=False)
    bus = watch(broker.port, version=protocol, filters=["llm/reply/#", "llm/admin-reply/#"])
    worker = start_worker(broker.port, llama_server.url, mqtt__protocol=protocol)
    bus.ask("good/chat", "hello", request_id="before", max_tokens=5)
    bus.terminal("before")
    before = peak_mib(worker)

    filler = b"x" * LENGTH
    request = b'{"request_id":"long","prompt":"%s"}' % filler
    bus.publish("llm/request/bad/1", request)
    error = bus.terminal("long")
    assert (error["code"], error["fields"]) == ("payload_too_large", {"payload": "at most 1048576 bytes"})
    assert f"payload: {len(request)} bytes" in error["message"]

    bus.publish("llm/control/bad/1", b'{"action":"cancel","transaction":"t1","x":"%s"}' % filler)
    ack = bus.first(type="ack", transaction="t1").event
    assert (ack["action"], ack["code"]) == ("cancel", "payload_too_large")

    bus.publish("llm/admin/w1", b'{"action":"drain","x":"%s"}' % filler)
    assert bus.first(type="ack", worker="w1").event["code"] == "payload_too_large"

    bus.publish("llm/status/other", filler)
    bus.ask("good/chat", "hello", request_id="after", max_tokens=5)
    assert bus.terminal("after")["type"] == "done"
    assert peak_mib(worker) - before < MOST_GROWTH_MIB

    worker.kill()
    worker.start()
    worker.wait_ready()
    bus.ask("good/chat", "hello", request_id="restarted", max_tokens=5)
    assert bus.terminal("restarted")["type"] == "done"
    assert [event["type"] for event in bus.of("long")] == ["error"], "it did not come again"
