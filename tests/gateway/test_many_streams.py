"""Many clients at once: idle ones and active ones, whole texts in order, memory that does not grow."""

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
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

IDLE = int(os.environ.get("IDLE_STREAMS", "200"))
ACTIVE = int(os.environ.get("ACTIVE_STREAMS", "64"))
"""1000 and 256 are the full trial: IDLE_STREAMS=1000 ACTIVE_STREAMS=256."""

PIECES = 40


def test_idle_and_active_streams_at_once_get_whole_texts_in_order(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    gate = Gate()

    def script(call: EngineCall) -> Iterator[Step]:
        name = last_user_text(call)
        if name.startswith("idle"):
            yield f"{name} begins"
            yield gate
            return
        for number in range(PIECES):
            yield f"{name}:{number} "

    engine = ScriptedEngine(script, slots=64)
    broker = start_mosquitto(settings=["max_queued_messages 100000", "max_inflight_messages 100"], verbose=False)
    limits = {"limits__queue_size": 5000, "limits__max_queue_mib": 64, "limits__queue_share": 1}
    worker = ScriptedWorker(broker.port, tmp_path / "worker", engine, generation__timeout_s=600, **limits)
    gateway = GatewayProcess(
        tmp_path / "gateway",
        broker.port,
        gateway__max_streams=4096,
        gateway__max_streams_per_level=4096,
        gateway__heartbeat_s=2,
    )
    try:
        gateway.start()
        asyncio.run(_trial(gateway, gate))
    finally:
        gate.open()
        gateway.close()
        worker.stop()
    assert "Traceback" not in gateway.log_text()


async def _trial(gateway: GatewayProcess, gate: Gate) -> None:
    # Half of the slots are taken by idle ones, and the others wait in the queue: to a client both are silence.
    idle = [asyncio.create_task(_read(gateway.port, f"idle {number}")) for number in range(IDLE)]
    await asyncio.sleep(3)
    first = gateway.rss_bytes()
    gate.open()
    assert all(text.endswith("begins") for text in await asyncio.gather(*idle))
    sizes = []
    for _ in range(3):
        texts = await asyncio.gather(*(_read(gateway.port, f"a{number}") for number in range(ACTIVE)))
        for number, text in enumerate(texts):
            assert text == "".join(f"a{number}:{piece} " for piece in range(PIECES))
        sizes.append(gateway.rss_bytes())
    assert sizes[-1] < sizes[0] + 24 * 1024 * 1024, (first, sizes)
    await asyncio.to_thread(eventually, lambda: gateway.rss_bytes() < first + 200 * 1024 * 1024)


async def _read(port: int, name: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"messages": [{"role": "user", "content": name}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    text, whole = "", False
    async with asyncio.timeout(300):
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                whole = True
            elif line.startswith(b"data: "):
                piece = json.loads(line[6:])
                assert "error" not in piece, piece
                text += "".join(choice["delta"].get("content") or "" for choice in piece["choices"])
    writer.close()
    assert whole, (name, text)
    return text
