"""A TCP proxy that cuts, delays, holds back, slows, splits and doubles what passes, and lies as an engine. One thread for all."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Way = Literal["up", "down"]
PUBLISH, PUBACK = 3, 4


@dataclass(slots=True)
class Bend:
    """What happens to the bytes; the default is nothing."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """From the near end to the far one only: a slow uplink."""
    down_bytes_per_s: float = 0.0
    bytewise: bool = False
    silent: bool = False
    refuse: bool = False
    eat_pubacks: int = 0
    """So many PUBACKs to the near end vanish."""
    double: bool = False
    """Each PUBLISH to the near end comes twice."""
    lie: str = ""


@dataclass(eq=False, slots=True)
class _Pair:
    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    packets: dict[Way, bytearray] = field(default_factory=lambda: {"up": bytearray(), "down": bytearray()})
    closed: bool = False


class Network:
    """The thread in which all proxies live."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._proxies: list[Proxy] = []

    def lay(self, target_port: int, *, mqtt: bool) -> Proxy:
        proxy = Proxy(self, target_port, mqtt=mqtt)
        self.call(proxy.open())
        self._proxies.append(proxy)
        return proxy

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def close(self) -> None:
        for proxy in self._proxies:
            self.call(proxy.close())
        self.call(self._settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _settle(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class Proxy:
    """Listens on `port` and forwards to the target as `bend` says."""

    def __init__(self, network: Network, target_port: int, *, mqtt: bool) -> None:
        self._network = network
        self._target_port = target_port
        self._mqtt = mqtt
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None
        self._loud = asyncio.Event()
        self._loud.set()
        self.bend = Bend()
        self.port = 0
        self.client_id = ""
        """The client id of the last CONNECT."""
        self.told = 0
        """How many lies, doubles and eaten packets there were."""

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=65536)
        self.port = self._server.sockets[0].getsockname()[1]

    def change(self, bend: Bend, *, cut: bool = False) -> None:
        """From now on; with `cut` all connections end first."""
        self._network.call(self._change(bend, cut=cut))

    async def _change(self, bend: Bend, *, cut: bool) -> None:
        self.bend = bend
        if cut:
            for pair in list(self._pairs):
                self._drop(pair)
        if bend.silent:
            self._loud.clear()
        else:
            self._loud.set()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for pair in list(self._pairs):
            self._drop(pair)

    def _drop(self, pair: _Pair) -> None:
        pair.closed = True
        self._pairs.discard(pair)
        for end in (pair.near, pair.far):
            with contextlib.suppress(Exception):
                end.transport.abort()

    async def _serve(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        if self.bend.refuse:
            near.transport.abort()
            return
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            near.transport.abort()
            return
        for end in (near, far):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.transport.set_write_buffer_limits(high=4096)  # a slow reader slows the writer behind us
        pair = _Pair(near, far)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pump(pair, near_reader, far, "up"), self._pump(pair, far_reader, near, "down"))
        except OSError:
            pass
        finally:
            self._drop(pair)

    async def _pump(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        while not pair.closed:
            block = await reader.read(16384)
            await self._loud.wait()
            if not block:
                break
            bend = self.bend
            if self._mqtt:
                block = self._packets(pair, block, way, bend)
            elif bend.lie and way == "down":
                block = self._lied(pair, block, bend.lie)
            if bend.delay_s:
                await asyncio.sleep(bend.delay_s)
            rate = bend.bytes_per_s if way == "up" else bend.down_bytes_per_s
            for part in _parts(block, bytewise=bend.bytewise, rate=rate):
                writer.write(part)
                await writer.drain()
                if rate:
                    await asyncio.sleep(len(part) / rate)
        with contextlib.suppress(OSError, RuntimeError):
            if self._mqtt:
                self._drop(pair)
            else:
                writer.write_eof()

    # --- MQTT ----------------------------------------------------------------------------------------------------------

    def _packets(self, pair: _Pair, block: bytes, way: Way, bend: Bend) -> bytes:
        """Whole packets of what came, with those that the bend eats or doubles; the rest waits for the next block."""
        held = pair.packets[way]
        held += block
        out = bytearray()
        while (size := packet_bytes(held)) and size <= len(held):
            packet = bytes(held[:size])
            del held[:size]
            kind = packet[0] >> 4
            if way == "up" and kind == 1:
                self.client_id = connect_client_id(packet)
            if way == "down" and kind == PUBACK and bend.eat_pubacks > 0:
                bend.eat_pubacks -= 1
                self.told += 1
                continue
            out += packet
            if way == "down" and kind == PUBLISH and bend.double and packet[0] & 0b110:
                out += bytes([packet[0] | 0b1000]) + packet[1:]  # DUP, as after a reconnect
                self.told += 1
        return bytes(out)

    # --- lies ----------------------------------------------------------------------------------------------------------

    def _lied(self, pair: _Pair, block: bytes, lie: str) -> bytes:
        if b"data: " not in block:
            return block
        changed = _LIES[lie](block)
        self.told += changed != block
        if lie == "mid_line":
            pair.near.write(changed)
            self._drop_soon(pair)
            return b""
        return changed

    def _drop_soon(self, pair: _Pair) -> None:
        pair.closed = True
        pair.near.close()
        pair.far.transport.abort()
        self._pairs.discard(pair)


def _garbage(block: bytes) -> bytes:
    return block.replace(b'"delta"', b'}{\xff\xfe"[[', 1)


def _half(block: bytes) -> bytes:
    return block[: len(block) // 2]


def _usage(block: bytes) -> bytes:
    """Counts of tokens that no machine makes, in as many bytes as the true ones had."""
    start = block.find(b'"completion_tokens":')
    end = block.find(b',"prompt_tokens_details"', start)
    if start < 0 or end < 0:
        return block
    false = b'"completion_tokens":1e30,"total_tokens":-9'
    return block[:start] + false.ljust(end - start) + block[end:] if len(false) <= end - start else block


_LIES: dict[str, Callable[[bytes], bytes]] = {"garbage": _garbage, "mid_line": _half, "usage": _usage}


def _parts(block: bytes, *, bytewise: bool, rate: float) -> list[bytes]:
    if bytewise:
        return [block[at : at + 1] for at in range(len(block))]
    if rate:
        return [block[at : at + 512] for at in range(0, len(block), 512)]
    return [block] if block else []


def packet_bytes(held: bytes | bytearray) -> int:
    """Length of the MQTT packet that begins here; 0 while its header is incomplete."""
    length, shift = 0, 0
    for at in range(1, min(5, len(held))):
        length |= (held[at] & 0x7F) << shift
        if not held[at] & 0x80:
            return 1 + at + length
        shift += 7
    return 0


def connect_client_id(packet: bytes) -> str:
    """The client id in a CONNECT packet of MQTT 3.1.1 or 5."""
    at = 1
    while packet[at] & 0x80:
        at += 1
    at += 1
    at += 2 + struct.unpack_from(">H", packet, at)[0]  # the protocol's name
    level = packet[at]
    at += 4  # level, flags, keep alive
    if level == 5:
        length, shift = 0, 0
        while True:
            byte = packet[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        at += length
    size = struct.unpack_from(">H", packet, at)[0]
    return packet[at + 2 : at + 2 + size].decode("utf-8", "replace")
