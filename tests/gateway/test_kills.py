"""Worker, broker and gateway are killed in the middle of a stream: no cut answer ever looks like a whole one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.process import GatewayProcess
from tests.support.daemon_process import DaemonProcess
from tests.support.mosquitto import Mosquitto
from tests.support.sham_server import DONE, END, STREAM, ShamServer, chunk, delta
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "tell it"}], "stream": True}
BEGINNING, REST = "the beginning", " and the rest"


@dataclass
class Chain:
    """Engine, broker, worker and gateway, each one's life in the hand of the test; the engine waits in mid-answer for `go_on`."""

    engine: ShamServer
    broker: Mosquitto
    worker: DaemonProcess
    gateway: GatewayProcess
    go_on: threading.Event


@dataclass
class Reader:
    """One streamed answer in a thread of its own."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    whole: bool = False
    error: str = ""

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream(
                "POST", f"{self.url}/v1/chat/completions", json=ASKED, headers=self.headers, timeout=60
            ) as response:
                if response.status_code != 200:
                    response.read()
                    self.error = f"status {response.status_code}"
                    return
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        self.whole = True
                    elif line.startswith("data: "):
                        piece = json.loads(line[6:])
                        if "error" in piece:
                            self.error = piece["error"]["code"]
                        else:
                            self.text += piece["choices"][0]["delta"].get("content") or ""
        except httpx.TransportError as error:
            self.error = type(error).__name__

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def chain(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> Iterator[Chain]:
    broker = start_mosquitto(persistence=True)
    go_on = threading.Event()
    with ShamServer() as engine:
        beginning = STREAM + chunk(delta(content=BEGINNING))
        rest = chunk(delta(content=REST)) + chunk(delta("stop")) + chunk(DONE) + END
        engine.on("/v1/chat/completions", (beginning, go_on, rest))
        worker = DaemonProcess(
            tmp_path / "worker", {"mqtt__port": broker.port, "engine__url": engine.url, "streaming__heartbeat_s": 1}
        ).start()
        gateway = GatewayProcess(tmp_path / "gateway", broker.port)
        try:
            worker.wait_ready()
            gateway.start()
            eventually(lambda: httpx.get(f"{gateway.url}/readyz", timeout=5).status_code == 200, 20)
            yield Chain(engine, broker, worker, gateway, go_on)
        finally:
            go_on.set()
            gateway.close()
            worker.close()
    assert "Traceback" not in gateway.log_text(), gateway.log_text()[-4000:]


def test_a_worker_that_is_killed_ends_the_stream_with_the_apis_error(chain: Chain) -> None:
    reader = Reader(chain.gateway.url)
    eventually(lambda: reader.text == BEGINNING)
    chain.worker.kill()
    chain.worker.start()
    reader.join()
    assert reader.error == "interrupted"
    assert not reader.whole


def test_a_broker_that_is_killed_and_comes_back_costs_nothing_of_the_answer(chain: Chain) -> None:
    reader = Reader(chain.gateway.url)
    eventually(lambda: reader.text == BEGINNING)
    chain.broker.kill()
    chain.go_on.set()
    eventually(lambda: not httpx.get(f"{chain.gateway.url}/readyz", timeout=5).json()["broker"])
    chain.broker.start()
    reader.join()
    assert (reader.text, reader.error, reader.whole) == (BEGINNING + REST, "", True)
    assert len(chain.engine.bodies()) == 1


def test_a_gateway_that_is_killed_cuts_the_stream_and_the_same_request_again_brings_all_of_it(chain: Chain) -> None:
    headers = {"Idempotency-Key": "mine"}
    reader = Reader(chain.gateway.url, headers)
    eventually(lambda: reader.text == BEGINNING)
    chain.gateway.kill()
    reader.join()
    assert not reader.whole
    assert reader.error
    chain.gateway.start()
    eventually(lambda: httpx.get(f"{chain.gateway.url}/readyz", timeout=5).status_code == 200, 20)
    again = Reader(chain.gateway.url, headers)
    eventually(lambda: again.text == BEGINNING)
    chain.go_on.set()
    again.join()
    assert (again.text, again.error, again.whole) == (BEGINNING + REST, "", True)
    assert len(chain.engine.bodies()) == 1


def test_the_gateway_stops_on_sigterm_with_code_0_and_tells_systemd(chain: Chain) -> None:
    reader = Reader(chain.gateway.url)
    eventually(lambda: reader.text == BEGINNING)
    chain.go_on.set()
    assert chain.gateway.stop() == 0
    reader.join()
    assert (reader.text, reader.whole) == (BEGINNING + REST, True)
    assert [word for word in chain.gateway.notify.words() if word in ("READY=1", "STOPPING=1")] == [
        "READY=1",
        "STOPPING=1",
    ]
    assert chain.gateway.log("gateway.without_keys")
    answered = chain.gateway.log("http.answered")
    assert answered[-1]["path"] == "/v1/chat/completions"
    assert "tell it" not in chain.gateway.log_text()
    assert "the beginning" not in chain.gateway.log_text()
