"""What an engine says while nobody reads: the system takes it in, and the end is noticed at once."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Text
from llamacpp_mqtt_deploy.engines.server import pump
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.stopping import StopSignal
from tests.support.sham_server import DONE, END, STREAM, ShamServer, chunk, delta

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not promise it")

PAUSE_S = 30.0
CALL = EngineCall(messages=[{"role": "user", "content": "hi"}], chunk_timeout_s=10)
_SIOCOUTQNSD = 0x894B
"""Linux: the bytes that a TCP socket was given and has not sent."""


@pytest.fixture
def sham() -> Iterator[ShamServer]:
    with ShamServer() as server:
        yield server


class Reader:
    """Takes what comes and rests for half a minute after each read."""

    def __init__(self, loop: IoLoop) -> None:
        self._loop = loop
        self.reads: list[str] = []
        self.took = threading.Semaphore(0)

    def feed(self, deltas: Sequence[Delta]) -> float:
        text = "".join(each.text for each in deltas if isinstance(each, Text))
        if text:
            self.reads.append(text)
            self.took.release()
        return PAUSE_S

    def rests(self) -> None:
        """Wait until it has read, and rests."""
        assert self.took.acquire(timeout=10), "it was not read"
        turned = threading.Event()
        self._loop.call_soon(turned.set)
        assert turned.wait(10)


def _pumped(sham: ShamServer, loop: IoLoop, reader: Reader, answer: Callable[[socket.socket], None]) -> str | None:
    sham.on("/v1/chat/completions", answer)
    engine = ServerEngine(EngineSettings(connect_timeout_s=5, url=sham.url, dialect="openai"), loop=loop)
    finished = engine.pump(CALL, stop=StopSignal(), on_wait=lambda reason: None, feed=reader.feed)
    return finished.finish_reason


def _token(text: str) -> bytes:
    return chunk(delta(content=text))


LAST = chunk(delta("stop")) + chunk(DONE) + END


def test_all_tokens_of_a_pause_are_taken_in_however_many_packets_they_are(
    sham: ShamServer, loop: IoLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "_LONGEST_PAUSE_S", PAUSE_S)
    reader = Reader(loop)
    unsent: list[int] = []

    def answer(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(STREAM + _token("first"))
        reader.rests()
        for number in range(100):
            connection.sendall(_token(f" {number:03}" + 50 * "."))
        unsent.append(struct.unpack("i", fcntl.ioctl(connection, _SIOCOUTQNSD, b"\0" * 4))[0])
        connection.sendall(LAST)

    assert _pumped(sham, loop, reader, answer) == "stop"
    assert unsent == [0], "a sender waits for acknowledgements that come when somebody reads"
    assert len(reader.reads) == 2, "the end is read with all that came before it"
    assert reader.reads[1].startswith(" 000")
    assert reader.reads[1].rstrip(".").endswith(" 099")


def test_a_pause_ends_when_much_has_come(sham: ShamServer, loop: IoLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "_LONGEST_PAUSE_S", PAUSE_S)
    reader = Reader(loop)

    def answer(connection: socket.socket) -> None:
        connection.sendall(STREAM + _token("first"))
        reader.rests()
        connection.sendall(_token("x" * 70_000))
        reader.rests()
        connection.sendall(LAST)

    assert _pumped(sham, loop, reader, answer) == "stop"
    assert "".join(reader.reads) == "first" + "x" * 70_000
