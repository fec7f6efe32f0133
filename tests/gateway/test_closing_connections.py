"""A connection that is over costs no file descriptor for long, also when its client takes nothing any more."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from llamacpp_mqtt_deploy.gateway.bounded_http import BoundedHttp
from llamacpp_mqtt_deploy.gateway.bounded_socket import BoundedSocket
from llamacpp_mqtt_deploy.gateway.incoming_bytes import IncomingBytes
from llamacpp_mqtt_deploy.gateway.reading_turns import ReadingTurns
from tests.gateway.raw_frames import PING, PONG, UPGRADE, frame

PING_BYTE = 0x80 | PING
SOME = b"x" * 60_000  # less than what makes asyncio say that a client is slow


async def _speak(scope: Any, receive: Any, send: Any) -> None:
    """Say something and end."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "bytes": SOME})
        await send({"type": "websocket.close", "code": 1000})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": SOME})


def _websocket(config: uvicorn.Config) -> asyncio.Protocol:
    protocol = BoundedSocket(config, ServerState(), {})
    protocol.slow_reader_s = 0.2
    protocol.incoming, protocol.turns = IncomingBytes(total=1024, each=1024), ReadingTurns()
    protocol.close_timeout = 0.05
    return protocol


def _http(config: uvicorn.Config) -> asyncio.Protocol:
    protocol = BoundedHttp(config, ServerState(), {})
    protocol.turns = ReadingTurns()
    protocol.head_timeout_s, protocol.slow_reader_s = 0.2, 0.2
    return protocol


@pytest.mark.parametrize(
    "make, request_bytes",
    [(_websocket, UPGRADE + b"\r\n"), (_http, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")],
    ids=["websocket", "http"],
)
def test_a_client_that_takes_nothing_of_a_closed_connection_is_cut_in_the_end(
    make: Callable[[uvicorn.Config], asyncio.Protocol], request_bytes: bytes
) -> None:
    async def work() -> None:
        config = uvicorn.Config(_speak, lifespan="off", log_config=None)
        config.load()
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        lost = asyncio.Event()
        protocol = make(config)
        told = protocol.connection_lost

        def connection_lost(exc: Exception | None) -> None:
            told(exc)
            lost.set()

        setattr(protocol, "connection_lost", connection_lost)  # noqa: B010 - the type says that no object has its own
        with theirs:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, ours)
            theirs.sendall(request_bytes)
            async with asyncio.timeout(10):
                await lost.wait()
            assert transport.get_extra_info("socket").fileno() == -1

    asyncio.run(work())


def test_a_slow_reader_may_answer_a_ping_as_late_as_it_may_read() -> None:
    """The ping stands behind all that waits for it: it comes to it, and is answered, later than uvicorn waits."""

    async def listen(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()

    async def work() -> None:
        config = uvicorn.Config(listen, lifespan="off", log_config=None, ws_ping_interval=0.05, ws_ping_timeout=0.05)
        config.load()
        protocol = BoundedSocket(config, ServerState(), {})
        protocol.slow_reader_s = 30.0
        protocol.incoming, protocol.turns = IncomingBytes(total=1024, each=1024), ReadingTurns()
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, ours)
        reader, writer = await asyncio.open_connection(sock=theirs)
        async with asyncio.timeout(20):
            writer.write(UPGRADE + b"\r\n")
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(2):
                opcode, size = await reader.readexactly(2)
                assert opcode == PING_BYTE
                await asyncio.sleep(0.3)
                writer.write(frame(PONG, await reader.readexactly(size)))
        writer.close()
        await asyncio.sleep(0.1)

    asyncio.run(work())
