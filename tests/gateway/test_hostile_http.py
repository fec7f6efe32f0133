"""A flood of hostile HTTP, bodies and frames at the gateway, with good requests among them: nothing falls, no traceback, no secret."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.gateway.key_ring import KeyEntry, hash_of, new_key, write_keys
from tests.gateway.generated_bodies import SECRET, broken_body, valid_body, wild_body
from tests.gateway.process import GatewayProcess
from tests.gateway.raw_frames import UPGRADE, frame, plain
from tests.gateway.world import ScriptedWorker
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.broker

REQUESTS = int(os.environ.get("HOSTILE_HTTP", "800"))
"""`make hostile-http` sends 20000."""
SEED = int(os.environ.get("HOSTILE_SEED", "9"))
CLIENTS = 4
MIB = 1024 * 1024

REFUSED = frozenset({400, 401, 403, 404, 405, 409, 413, 415, 429, 503, 504})


@pytest.fixture
def key() -> str:
    return new_key()


@pytest.fixture
def gateway(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, key: str) -> Iterator[GatewayProcess]:
    broker = start_mosquitto(verbose=False)
    worker = ScriptedWorker(broker.port, tmp_path / "worker", limits__queue_size=1000)
    write_keys(tmp_path / "keys.toml", {"alice": KeyEntry(sha256=hash_of(key), level="alice")})
    gateway = GatewayProcess(
        tmp_path / "gateway",
        broker.port,
        gateway__header_timeout_s=1.0,
        gateway__body_timeout_s=1.0,
        gateway__slow_reader_s=2.0,
        gateway__keys_file=str(tmp_path / "keys.toml"),
    )
    try:
        gateway.start()
        gateway.wait_ready()
        yield gateway
    finally:
        gateway.close()
        worker.stop()


def test_a_flood_of_hostile_requests_leaves_the_gateway_as_it_was(gateway: GatewayProcess, key: str) -> None:
    flood = Flood(gateway, key)
    flood.run(REQUESTS // 10)  # what a first round needs, later ones use again
    before = gateway.rss_bytes()
    flood.run(REQUESTS)
    grown = (gateway.rss_bytes() - before) / MIB
    print(f"\n{flood.sent.total()} sent: {dict(flood.sent)}; statuses {dict(flood.statuses)}; memory +{grown:.1f} MiB")
    assert gateway.alive()
    assert grown < 16
    log = gateway.log_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    assert "http.failed" not in log
    assert SECRET not in log
    assert key not in log
    assert key.removeprefix("lmd-") not in log


class Flood:
    """Hostile requests of every kind, of some clients at once; each hundredth of a client is a good one, which has to be answered."""

    def __init__(self, gateway: GatewayProcess, key: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.sent: Counter[str] = Counter()
        self._gateway = gateway
        self._key = key
        self._headers = {"authorization": f"Bearer {key}"}
        document = httpx.get(f"{gateway.url}/openapi.json").json()
        self._schemas: dict[str, Any] = {
            path: operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path, operations in document["paths"].items()
            if "post" in operations
        }
        assert {route.path for route in HTTP_ROUTES} <= set(self._schemas)
        self._rounds = 0
        self._counting = threading.Lock()

    def run(self, requests: int) -> None:
        self._rounds += 1
        with ThreadPoolExecutor(CLIENTS) as pool:
            seeds = [random.Random(f"{SEED}.{self._rounds}.{client}") for client in range(CLIENTS)]
            list(pool.map(self._client, seeds, [requests // CLIENTS] * CLIENTS))

    def _client(self, dice: random.Random, requests: int) -> None:
        kinds = [self._valid, self._broken, self._wild, self._mutated, self._frames, self._torn_frames]
        with httpx.Client(base_url=self._gateway.url, headers=self._headers, timeout=60) as http:
            for number in range(requests):
                if number % 100 == 0:
                    self._good(http)
                kind = dice.choices(kinds, weights=[4, 4, 4, 2, 1, 1])[0]
                kind(dice, http)
                with self._counting:
                    self.sent[kind.__name__.removeprefix("_")] += 1
            self._good(http)

    def _good(self, http: httpx.Client) -> None:
        assert http.post("/ask", content=f"a good question {SECRET}").text == f"a good question {SECRET}"

    # --- bodies ------------------------------------------------------------------------------------------------------

    def _valid(self, dice: random.Random, http: httpx.Client) -> None:
        path = dice.choice(list(self._schemas))
        body = valid_body(self._schemas[path], dice)
        response = self._post(http, path, json.dumps(body).encode())
        expected = {200, 400, 404} if path in ("/control", "/api/show") else {200, 404}
        assert response.status_code in expected, (path, response.text, body)

    def _broken(self, dice: random.Random, http: httpx.Client) -> None:
        path = dice.choice(list(self._schemas))
        self._post(http, path, broken_body(self._schemas[path], dice))

    def _wild(self, dice: random.Random, http: httpx.Client) -> None:
        path = dice.choice(list(self._schemas))
        self._post(http, path, wild_body(list(self._schemas[path]["properties"]), dice))

    def _post(self, http: httpx.Client, path: str, content: bytes) -> httpx.Response:
        response = http.post(path, content=content)
        assert response.status_code == 200 or response.status_code in REFUSED, (
            path,
            response.text[:500],
            content[:500],
        )
        with self._counting:
            self.statuses[response.status_code] += 1
        return response

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _mutated(self, dice: random.Random, http: httpx.Client) -> None:
        """A request with some bytes changed, doubled or left out: an answer, or a closed connection."""
        path = dice.choice(list(self._schemas))
        body = json.dumps(valid_body(self._schemas[path], dice)).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n\r\n"
        with contextlib.suppress(ConnectionError), plain(self._gateway.port, 60) as wire:
            wire.sendall(mutated(head.encode() + body, dice))
            if dice.random() < 0.9:
                wire.shutdown(socket.SHUT_WR)
            answer = wire.recv(65536)
            assert not answer or answer.startswith(b"HTTP/1.1 "), answer

    def _frames(self, dice: random.Random, http: httpx.Client) -> None:
        address = f"ws://127.0.0.1:{self._gateway.port}/ws"
        fields = ["type", "session", "request_id", "action", *self._schemas["/ask"]["properties"]]
        with (
            contextlib.suppress(WebSocketException),
            connect(address, close_timeout=1, additional_headers=self._headers) as ws,
        ):
            for _ in range(5):
                body = wild_body(fields, dice)
                ws.send(body if dice.random() < 0.5 else body.decode("utf-8", "replace"))

    def _torn_frames(self, dice: random.Random, http: httpx.Client) -> None:
        content = json.dumps({"type": "request", "prompt": SECRET}).encode()
        frames = b"".join(frame(dice.choice([0, 1, 2, 9, 10]), content, fin=dice.random() < 0.7) for _ in range(4))
        with contextlib.suppress(ConnectionError), plain(self._gateway.port, 60) as wire:
            wire.sendall(UPGRADE + f"Authorization: Bearer {self._key}\r\n\r\n".encode())
            assert wire.recv(4096).startswith(b"HTTP/1.1 101 ")
            wire.sendall(mutated(frames, dice))
            wire.shutdown(socket.SHUT_WR)
            while wire.recv(65536):
                pass


def mutated(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(changed))
        match dice.randrange(4):
            case 0:
                changed[at] = dice.randrange(256)
            case 1:
                del changed[at : at + dice.randint(1, 8)]
            case 2:
                changed[at:at] = changed[at : at + dice.randint(1, 40)]
            case _:
                changed[at:at] = dice.choice([b"\r\n", b"\0", b"\n\n", b"\xff", b": ", b"\r\n\r\n"])
        if not changed:
            return data
    return bytes(changed)


def test_connections_that_say_nothing_cost_nobody_a_place(gateway: GatewayProcess, key: str) -> None:
    idle = [plain(gateway.port) for _ in range(300)]
    headers = {"x-api-key": key}
    try:
        results: list[str] = []

        def ask() -> None:
            results.append(httpx.post(f"{gateway.url}/ask", content="still here", headers=headers, timeout=30).text)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == ["still here"] * 8
        for wire in idle:
            wire.settimeout(15)
            with contextlib.suppress(ConnectionError):
                assert wire.recv(1) == b""
    finally:
        for wire in idle:
            wire.close()
