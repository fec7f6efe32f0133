"""The reverse proxy of docs/gateway.md: a real nginx with that location in front of the gateway."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from tests.gateway.world import World
from tests.support.ports import free_port
from tests.support.services import require_program
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

PAGE = Path(__file__).parents[2] / "docs" / "gateway.md"


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(slots=2)


@pytest.fixture
def proxy(world: World, engine: ScriptedEngine, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of the proxy and a key."""
    nginx = require_program("nginx")
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {}})
    found = re.search(r"(?ms)^location / \{.*?^\}", PAGE.read_text())
    assert found
    location = found[0].replace("127.0.0.1:8089", f"127.0.0.1:{gateway.port}")
    port = free_port()
    temporary = "".join(
        f"{name}_temp_path {tmp_path}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary}\nserver {{ listen 127.0.0.1:{port};\n{location}\n}} }}\n"
    )
    process = subprocess.Popen([nginx, "-c", str(config), "-e", str(tmp_path / "error.log")], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "error.log").read_text()
            try:
                return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        eventually(answers, 20)
        yield url, gateway.keys["alice"]
    finally:
        process.terminate()
        process.wait(10)


def test_each_piece_comes_through_the_proxy_as_it_is_made(proxy: tuple[str, str], engine: ScriptedEngine) -> None:
    url, key = proxy
    gate = Gate()
    engine.play("one", gate, " two")
    body = {"messages": [{"role": "user", "content": "count"}], "stream": True}
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers={"x-api-key": key}, timeout=20
    ) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        assert next(json.loads(line[6:]) for line in lines if '"one"' in line)
        gate.open()
        assert any('" two"' in line for line in lines)


def test_who_leaves_the_proxy_leaves_the_worker(proxy: tuple[str, str], engine: ScriptedEngine) -> None:
    url, key = proxy
    engine.play("one", Silence())
    with httpx.stream("POST", f"{url}/ask", content="long", headers={"x-api-key": key}, timeout=20) as response:
        pieces = response.iter_text()  # kept: httpx hangs up when an iterator is dropped
        next(pieces)
        assert engine.busy == 1
    eventually(lambda: engine.busy == 0, 5)


def test_a_websocket_comes_through_the_proxy(proxy: tuple[str, str]) -> None:
    url, key = proxy
    protocols: list[str] = ["lmd", f"lmd.key.{key}"]
    with connect(url.replace("http", "ws") + "/ws", subprotocols=protocols, close_timeout=2) as socket:  # type: ignore[arg-type]
        socket.send(json.dumps({"session": "s", "request_id": "r", "prompt": "hello there"}))
        while (event := json.loads(socket.recv(timeout=10)))["type"] != "done":
            pass
        assert event["full_content"] == "hello there"
