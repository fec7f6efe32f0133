"""Hostile HTTP, bodies and frames at the gateway, with good requests among them: nothing falls, nothing is told twice, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.gateway.openapi import document
from tests.gateway.process import GatewayProcess
from tests.gateway.world import ScriptedWorker
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

REQUESTS = int(os.environ.get("HOSTILE_HTTP", "600"))
"""20000 take some minutes: HOSTILE_HTTP=20000."""

HEADS = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\r\n\r\n",
    b"\x00\x01\x02\x03\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x",
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\nx",
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /%00%ff%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
]

WILD: list[Any] = [
    None, True, 0, -1, 1e308, 2**63, "", "x", "\x00", "\ud7ff\U0001f600", "<|im_end|>", "a" * 20_000, [], {}, [[]], [{}], [None],
    {"a": {"b": {"c": []}}}, [{"role": "user", "content": None}], [{"role": "robot", "content": "x"}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
]  # fmt: skip

BROKEN = [b"", b" ", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 3000, b'{"a":"\\ud800"}', b'{"a":' * 40 + b"1" + b"}" * 40]  # fmt: skip


def wild_body(dice: random.Random, fields: list[str]) -> bytes:
    if dice.random() < 0.2:
        return dice.choice(BROKEN)
    names = dice.sample(fields, k=min(len(fields), dice.randint(0, 5))) + dice.choices(
        ["x", "__proto__", "id_slot"], k=1
    )
    return json.dumps({name: dice.choice(WILD) for name in names}).encode("utf-8", "surrogatepass")


def known_fields() -> dict[str, list[str]]:
    found = {}
    for path, operations in document(with_keys=False)["paths"].items():
        if "post" in operations:
            schema = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
            extra = [
                "messages",
                "prompt",
                "stream",
                "tools",
                "response_format",
                "stop",
                "model",
                "timeout_s",
                "metadata",
            ]
            found[path] = [*schema["properties"], *extra]
    return found


@pytest.fixture
def gateway(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> Iterator[GatewayProcess]:
    broker = start_mosquitto()
    worker = ScriptedWorker(broker.port, tmp_path / "worker", limits__queue_size=1000)
    gateway = GatewayProcess(
        tmp_path / "gateway", broker.port, gateway__header_timeout_s=3.0, gateway__body_timeout_s=1.0
    )
    try:
        gateway.start()
        eventually(lambda: httpx.get(f"{gateway.url}/readyz", timeout=5).status_code == 200, 20)
        yield gateway
    finally:
        gateway.close()
        worker.stop()


def test_a_flood_of_hostile_requests_leaves_the_gateway_as_it_was(gateway: GatewayProcess) -> None:
    dice = random.Random(9)
    fields = known_fields()
    assert {route.path for route in HTTP_ROUTES} <= set(fields)
    with httpx.Client(base_url=gateway.url, timeout=30) as http:
        good(http)
        before = gateway.rss_bytes()
        for number in range(REQUESTS):
            match number % 10:
                case 0:
                    raw(gateway.port, dice.choice(HEADS))
                case 1:
                    frames(gateway, dice, fields["/ask"])
                case _:
                    path = dice.choice(list(fields))
                    response = http.post(path, content=wild_body(dice, fields[path]))
                    assert response.status_code in (200, 400, 401, 403, 404, 405, 409, 413, 429, 503), (
                        path,
                        response.text,
                    )
            if number % 100 == 99:
                good(http)
        good(http)
    assert gateway.rss_bytes() < before + 64 * 1024 * 1024
    log = gateway.log_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
    assert "http.failed" not in log


def good(http: httpx.Client) -> None:
    assert http.post("/ask", content="a good question").text == "a good question"


def raw(port: int, head: bytes) -> None:
    """Bytes on a plain socket: an answer that is an error, or a closed connection."""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 10) as wire:
        wire.settimeout(10)
        wire.sendall(head)
        answer = wire.recv(65536)
        assert not answer or answer.startswith(b"HTTP/1.1 ")
        assert b"root:" not in answer


def frames(gateway: GatewayProcess, dice: random.Random, fields: list[str]) -> None:
    with contextlib.suppress(WebSocketException), connect(f"ws://127.0.0.1:{gateway.port}/ws", close_timeout=1) as ws:
        for _ in range(5):
            body = wild_body(dice, ["type", "session", "request_id", "action", *fields])
            ws.send(body if dice.random() < 0.5 else body.decode("utf-8", "replace"))


def test_connections_that_say_nothing_cost_nobody_a_place(gateway: GatewayProcess) -> None:
    idle = [socket.create_connection(("127.0.0.1", gateway.port), 10) for _ in range(300)]
    try:
        results: list[str] = []

        def ask() -> None:
            results.append(httpx.post(f"{gateway.url}/ask", content="still here", timeout=30).text)

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
