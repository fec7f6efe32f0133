"""A flood of frames on some sockets holds up nobody else of the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import uvicorn
from uvicorn.server import ServerState

from llamacpp_mqtt_deploy.gateway.bounded_http import BoundedHttp
from llamacpp_mqtt_deploy.gateway.bounded_socket import BoundedSocket
from llamacpp_mqtt_deploy.gateway.incoming_bytes import IncomingBytes
from llamacpp_mqtt_deploy.gateway.reading_turns import ReadingTurns
from tests.gateway.raw_frames import BINARY, CONT, PONG, TEXT, UPGRADE, frame

ONE_READ = 256 * 1024
"""As much as asyncio takes from a socket at once."""


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 - what is waited for is counted at each turn of the loop
            await asyncio.sleep(0)


async def _connect(protocol: asyncio.Protocol, sock: socket.socket) -> None:
    await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, sock)


P = TypeVar("P", BoundedSocket, BoundedHttp)


@asynccontextmanager
async def _opened(kind: type[P], app: Any, number: int) -> AsyncIterator[list[tuple[P, socket.socket]]]:
    """Connections of one loop, each with its client's end."""
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    turns, state = ReadingTurns(), ServerState()
    opened: list[tuple[P, socket.socket]] = []
    for _ in range(number):
        ours, theirs = socket.socketpair()
        protocol = kind(config, state, {})
        protocol.turns = turns
        if isinstance(protocol, BoundedSocket):
            protocol.incoming = IncomingBytes(total=4 * ONE_READ, each=4 * ONE_READ)
        await _connect(protocol, ours)
        theirs.setblocking(False)
        opened.append((protocol, theirs))
    try:
        yield opened
    finally:
        for protocol, theirs in opened:
            theirs.close()
            protocol.transport.abort()
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await asyncio.gather(*state.tasks)


class _Counter:
    """How much is counted at one turn of the loop at the most."""

    def __init__(self) -> None:
        self.events = self.turns = self.most = self._before = 0
        self._over = False
        self._look()

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any) -> Any:
            self.events += 1
            return call(*given)

        return counting

    def stop(self) -> None:
        self._over = True

    def _look(self) -> None:
        self.most, self.turns, self._before = max(self.most, self.events - self._before), self.turns + 1, self.events
        if not self._over:
            asyncio.get_running_loop().call_soon(self._look)


# --- turns ---------------------------------------------------------------------------------------------------------------


def test_one_slice_is_read_at_each_turn_of_the_loop_and_owners_take_turns() -> None:
    async def work() -> None:
        turns, read, at, turn = ReadingTurns(), [], [], 0

        def count() -> None:
            nonlocal turn
            turn += 1
            loop.call_soon(count)

        def slices(owner: str, left: int) -> None:
            read.append(owner)
            at.append(turn)
            if left > 1:
                turns.take(owner, lambda: slices(owner, left - 1))

        loop = asyncio.get_running_loop()
        loop.call_soon(count)
        for _ in range(3):
            turns.take("many", lambda: slices("many", 2))
        turns.take("other", lambda: slices("other", 1))
        assert read == ["many"], "the first one waits for nobody"
        await _until(lambda: len(read) == 7)
        assert read[:3] == ["many", "many", "other"]
        assert max(Counter(at).values()) <= 2, "its own turn may begin before `count` and end after it"
        assert at[-1] - at[0] >= 5
        await asyncio.sleep(0)
        turns.take("later", lambda: slices("later", 1))
        assert read[-1] == "later"

    asyncio.run(work())


# --- sockets -------------------------------------------------------------------------------------------------------------


class _App:
    """Accepts, and keeps what it hears of each socket."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.accepted = 0
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["lmd.notes"] = {"owner": "somebody"}
        await receive()
        await send({"type": "websocket.accept"})
        self.accepted += 1
        while (message := await receive())["type"] == "websocket.receive":
            self.heard.append(message.get("text") or message.get("bytes"))
            await self.goes_on.wait()


@asynccontextmanager
async def _sockets(app: _App, number: int) -> AsyncIterator[list[tuple[BoundedSocket, socket.socket]]]:
    async with _opened(BoundedSocket, app, number) as opened:
        for _, wire in opened:
            wire.sendall(UPGRADE + b"\r\n")
        await _until(lambda: app.accepted == number)
        yield opened


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(frame(PONG), id="pongs"),
        pytest.param(frame(TEXT, b"{"), id="messages"),
        pytest.param(frame(CONT, fin=False), id="fragments"),
    ],
)
def test_others_have_a_turn_after_some_hundred_frames_however_many_came_on_however_many_sockets(frames: bytes) -> None:
    async def work() -> None:
        app = _App()
        async with _sockets(app, 4) as opened:
            counter = _Counter()
            for protocol, _ in opened:
                if frames[0] == CONT:
                    protocol.data_received(frame(TEXT, b"", fin=False))
                for name in ("handle_pong", "handle_text", "handle_cont"):
                    setattr(protocol, name, counter.counted(getattr(protocol, name)))
            number = ONE_READ // len(frames)
            for protocol, _ in opened:
                protocol.data_received(frames * number)
                assert not protocol.transport.is_reading(), "nothing more comes before this is read"
            await _until(lambda: counter.events == len(opened) * number)
            counter.stop()
            assert counter.most <= 2 * 2048 // len(frames)
            assert counter.turns >= len(opened) * ONE_READ // 2048 / 2
            await asyncio.sleep(0.01)
            if frames[0] & 15 == TEXT:
                await _until(lambda: len(app.heard) == len(opened) * number)
            assert all(protocol.transport.is_reading() for protocol, _ in opened)

    asyncio.run(work())


def test_messages_are_the_same_wherever_they_are_cut() -> None:
    async def work() -> None:
        app = _App()
        async with _sockets(app, 1) as ((_, wire),):
            sent = [
                bytes([number]) * size for number, size in enumerate((1, 2040, 2047, 2048, 2049, 60_000, 3, 500_000))
            ]
            stream = b"".join(frame(BINARY, message) for message in sent)
            rest, step = memoryview(stream), 1
            while rest:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[wire.send(rest[:step]) :]
                    step = step * 3 % 70_001
                await asyncio.sleep(0)
            await _until(lambda: len(app.heard) == len(sent))
            assert app.heard == sent

    asyncio.run(work())


def test_a_client_that_leaves_amid_its_flood_is_gone() -> None:
    async def work() -> None:
        app = _App()
        async with _sockets(app, 2) as ((left, wire), (stays, _)):
            counter = _Counter()
            setattr(left, "handle_pong", counter.counted(left.handle_pong))  # noqa: B010 - as below
            left.data_received(frame(PONG) * 40_000)
            wire.close()
            left.transport.abort()
            await asyncio.sleep(0.05)
            counter.stop()
            assert 0 < counter.events < 2_000, "the rest is for nobody"
            assert left.disconnected
            stays.data_received(frame(TEXT, b"still here"))
            await _until(lambda: bool(app.heard))

    asyncio.run(work())


def test_of_messages_that_nobody_takes_a_few_are_read() -> None:
    async def work() -> None:
        app = _App()
        async with _sockets(app, 1) as ((protocol, _),):
            app.goes_on.clear()
            protocol.data_received(frame(TEXT, b"first"))
            await _until(lambda: len(app.heard) == 1)
            protocol.data_received(frame(TEXT, b"{") * 10_000)
            for _ in range(200):
                await asyncio.sleep(0)
            assert 0 < protocol.queue.qsize() <= 2048 // 7
            assert not protocol.transport.is_reading()
            app.goes_on.set()
            await _until(lambda: len(app.heard) == 10_001)

    asyncio.run(work())


# --- HTTP ----------------------------------------------------------------------------------------------------------------

POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


async def _sizes(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size of the body, and its sum."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    answer = f"<{len(body)} {sum(body)}>".encode()
    length = str(len(answer)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": answer})


async def _answered(wire: socket.socket, number: int) -> list[str]:
    """What stands in the bodies of so many answers."""
    seen = bytearray()

    def all_there() -> bool:
        with contextlib.suppress(BlockingIOError):
            seen.extend(wire.recv(65536))
        return seen.count(b">") == number

    await _until(all_there)
    return re.findall(r"<(.*?)>", seen.decode())


def test_others_have_a_turn_after_some_hundred_chunks_however_many_came_on_however_many_connections() -> None:
    async def work() -> None:
        async with _opened(BoundedHttp, _sizes, 4) as opened:
            counter = _Counter()
            for protocol, _ in opened:
                parse = counter.counted(protocol.conn.next_event)
                setattr(protocol.conn, "next_event", parse)  # noqa: B010 - the type says that no object has its own
            chunk = b"1\r\nx\r\n"
            number = ONE_READ // len(chunk)
            for protocol, _ in opened:
                # The second request waits for the first one's answer with all that has come of it.
                protocol.data_received(
                    CHUNKED + chunk * number + b"0\r\n\r\n" + CHUNKED + chunk * number + b"0\r\n\r\n"
                )
                assert not protocol.transport.is_reading(), "nothing more comes before this is read"
            for _, wire in opened:
                assert await _answered(wire, 2) == [f"{number} {number * ord('x')}"] * 2
            counter.stop()
            assert counter.most <= 2 * (2048 // len(chunk) + 8)
            await asyncio.sleep(0.01)
            assert all(protocol.transport.is_reading() for protocol, _ in opened)

    asyncio.run(work())


@pytest.mark.parametrize("step", [1, 7, 2047, 2048, 2049, 5000, 65_536, 10_000_000])
def test_requests_are_the_same_wherever_they_are_cut(step: int) -> None:
    bodies = [b"", b"x", b"y" * 1990, b"z" * 2048, bytes(range(256)) * 300, b"end"] * (1 if step < 2000 else 4)
    stream = b"".join(
        CHUNKED
        + b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 100]), body[at : at + 100]) for at in range(0, len(body), 100))
        + b"0\r\n\r\n"
        if number % 2
        else POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        for number, body in enumerate(bodies)
    )

    async def work() -> None:
        async with _opened(BoundedHttp, _sizes, 1) as ((_, wire),):

            async def write() -> None:
                rest = memoryview(stream)
                while rest:
                    with contextlib.suppress(BlockingIOError):
                        rest = rest[wire.send(rest[:step]) :]
                    await asyncio.sleep(0)

            writing = asyncio.create_task(write())
            assert await _answered(wire, len(bodies)) == [f"{len(body)} {sum(body)}" for body in bodies]
            await writing

    asyncio.run(work())
