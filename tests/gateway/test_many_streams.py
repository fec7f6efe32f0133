"""Many clients at once: idle ones beside active ones, whole texts in order, memory and threads that stay what they were."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Step, last_user_text
from tests.gateway.process import GatewayProcess
from tests.gateway.world import ScriptedWorker
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.broker

IDLE = int(os.environ.get("IDLE_STREAMS", "100"))
ACTIVE = int(os.environ.get("ACTIVE_STREAMS", "32"))
ROUNDS = int(os.environ.get("ACTIVE_ROUNDS", "4"))
"""`make gateway-load` is the full trial: 1000, 256 and 8."""

PIECES = 40
SLOTS = 64
"""For the active ones; each idle one has a slot of its own."""
MIB = 1024 * 1024


def test_idle_and_active_streams_at_once_get_whole_texts_in_order(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    gate = Gate()

    def script(call: EngineCall) -> Iterator[Step]:
        name = last_user_text(call)
        if name.startswith("idle"):
            yield f"{name} begins"
            yield gate
            yield f", {name} ends"
            return
        for number in range(PIECES):
            yield f"{name}:{number} "

    engine = ScriptedEngine(script, slots=IDLE + SLOTS)
    broker = start_mosquitto(settings=["max_queued_messages 100000", "max_inflight_messages 100"], verbose=False)
    limits = {"limits__queue_size": 5000, "limits__max_queue_mib": 64, "limits__queue_share": 1}
    worker = ScriptedWorker(
        broker.port,
        tmp_path / "worker",
        engine,
        generation__timeout_s=1200,
        engine__chunk_timeout_s=1200,
        **limits,
    )
    gateway = GatewayProcess(
        tmp_path / "gateway",
        broker.port,
        gateway__max_streams=4096,
        gateway__max_streams_per_level=4096,
        gateway__heartbeat_s=1,
    )
    try:
        gateway.start()
        gateway.wait_ready()
        asyncio.run(_trial(gateway, gate))
    finally:
        gate.open()
        gateway.close()
        worker.stop()
    assert "Traceback" not in gateway.log_text()


async def _trial(gateway: GatewayProcess, gate: Gate) -> None:
    idle = [_Client(gateway.port, f"idle {number}") for number in range(IDLE)]
    idling = [asyncio.create_task(client.read()) for client in idle]
    async with asyncio.timeout(300):
        await asyncio.gather(*(client.begun.wait() for client in idle))
    sizes, threads = [gateway.rss_bytes()], {gateway.threads()}
    for _ in range(ROUNDS):
        active = [_Client(gateway.port, f"a{number}") for number in range(ACTIVE)]
        await asyncio.gather(*(client.read() for client in active))
        for client in active:
            assert client.text == "".join(f"{client.name}:{piece} " for piece in range(PIECES))
        sizes.append(gateway.rss_bytes())
        threads.add(gateway.threads())
        assert not any(task.done() for task in idling)
    async with asyncio.timeout(60):  # all are told that their answers go on
        await asyncio.gather(*(client.alive.wait() for client in idle))
    gate.open()
    await asyncio.gather(*idling)
    assert [client.text for client in idle] == [f"idle {n} begins, idle {n} ends" for n in range(IDLE)]
    print(f"\n{IDLE} idle, {ACTIVE} active; threads {threads}; MiB:", *(f"{size / MIB:.1f}" for size in sizes))
    assert len(threads) == 1, threads
    assert sizes[-1] < sizes[1] + 8 * MIB, sizes  # the first round brings what each later one uses again
    assert sizes[-1] < sizes[0] + (16 + ACTIVE // 4) * MIB, sizes


class _Client:
    """A reader of one stream, on a connection of its own."""

    def __init__(self, port: int, name: str) -> None:
        self.name = name
        self.text = ""
        self.begun = asyncio.Event()
        self.alive = asyncio.Event()
        self._port = port

    async def read(self) -> None:
        """All of the answer, to its mark of a whole one."""
        body = {"messages": [{"role": "user", "content": self.name}], "stream": True}
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.timeout(900):
                writer.write(_request(json.dumps(body).encode()))
                whole = False
                async for line in reader:
                    assert not whole or not line.startswith(b"data: "), (self.name, line)
                    whole = whole or self._take(line)
        finally:
            writer.close()
        assert whole, (self.name, self.text)

    def _take(self, line: bytes) -> bool:
        """One line; whether it is the mark of the end."""
        if line.startswith(b":"):
            self.alive.set()
        if not line.startswith(b"data: "):
            return False
        if line.startswith(b"data: [DONE]"):
            return True
        piece = json.loads(line[6:])
        assert "error" not in piece, (self.name, piece)
        self.text += "".join(choice["delta"].get("content") or "" for choice in piece["choices"])
        self.begun.set()
        return False


def _request(body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
