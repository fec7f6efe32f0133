"""A server that answers byte by byte holds no question up for longer than it may take altogether."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import EngineCall
from llamacpp_mqtt_deploy.core.errors import EngineUnavailable, IdleTimeout
from llamacpp_mqtt_deploy.engines.server import describing, questions, server_engine
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.stopping import StopSignal
from tests.engines.members import io_loop
from tests.support.sham_server import ShamServer
from tests.support.waiting import eventually

LIMIT_S = 0.4
CALL = EngineCall(messages=[{"role": "user", "content": "hi"}], chunk_timeout_s=LIMIT_S)


@pytest.fixture
def sham() -> Iterator[ShamServer]:
    with ShamServer() as server:
        yield server


class _Drip:
    """Sends a byte every 50 ms until the other side has had enough: never silent, and never done."""

    def __init__(self, head: bytes, drop: bytes) -> None:
        self._head = head
        self._drop = drop

    def __call__(self, connection: socket.socket) -> None:
        connection.sendall(self._head)

        def drips() -> bool:
            connection.sendall(self._drop)
            return False

        eventually(drips, 20, every_s=0.05)


DRIPS = {
    "headers": _Drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "a header": _Drip(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    "the body": _Drip(b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{"a": "', b"y"),
    "chunks": _Drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}
SLOW = pytest.mark.parametrize("what", DRIPS)


@SLOW
def test_a_server_that_describes_itself_byte_by_byte_is_given_up(
    sham: ShamServer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(describing, "ANSWER_WITHIN_S", LIMIT_S)
    sham.on("/props", DRIPS[what])
    began = time.monotonic()
    assert ServerEngine(EngineSettings(connect_timeout_s=0.2, url=sham.url)).probe().state == "unreachable"
    assert time.monotonic() - began < 5 * LIMIT_S


@SLOW
def test_tokens_that_are_counted_byte_by_byte_are_not_counted(
    sham: ShamServer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(questions, "COUNT_WITHIN_S", LIMIT_S)
    engine = ServerEngine(EngineSettings(connect_timeout_s=0.2, url=sham.url, dialect="llamacpp"))
    sham.on("/v1/chat/completions/input_tokens", DRIPS[what])
    began = time.monotonic()
    assert engine.count_tokens(CALL, stop=StopSignal()) is None
    assert time.monotonic() - began < 5 * LIMIT_S


@pytest.fixture(params=["read by a thread", "read by the loop"])
def loop(request: pytest.FixtureRequest) -> IoLoop | None:
    return io_loop() if request.param == "read by the loop" else None


def _ask(sham: ShamServer, loop: IoLoop | None) -> None:
    engine = ServerEngine(EngineSettings(connect_timeout_s=0.2, url=sham.url, dialect="llamacpp"), loop=loop)
    engine.pump(CALL, stop=StopSignal(), on_wait=lambda _: None, feed=lambda _: 0.0)


@pytest.mark.parametrize("what", ["headers", "a header"])
def test_an_answer_whose_headers_never_end_is_given_up(sham: ShamServer, what: str, loop: IoLoop | None) -> None:
    sham.on("/v1/chat/completions", DRIPS[what])
    began = time.monotonic()
    with pytest.raises(IdleTimeout):
        _ask(sham, loop)
    assert time.monotonic() - began < 5 * LIMIT_S


def test_a_refusal_whose_text_never_ends_is_given_up(
    sham: ShamServer, monkeypatch: pytest.MonkeyPatch, loop: IoLoop | None
) -> None:
    monkeypatch.setattr(server_engine, "COUNT_WITHIN_S", LIMIT_S)
    sham.on("/v1/chat/completions", _Drip(b"HTTP/1.1 401 X\r\nContent-Length: 100000\r\n\r\n", b"y"))
    began = time.monotonic()
    with pytest.raises(EngineUnavailable):
        _ask(sham, loop)
    assert time.monotonic() - began < 5 * LIMIT_S


def test_whoever_waits_is_told_when_a_server_does_not_answer_within_some_milliseconds(
    sham: ShamServer, loop: IoLoop | None
) -> None:
    told = threading.Event()

    def answer(connection: socket.socket) -> None:
        assert told.wait(10), "the headers were waited for without a word"
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
            b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        )

    sham.on("/v1/chat/completions", answer)
    engine = ServerEngine(EngineSettings(connect_timeout_s=5, url=sham.url, dialect="openai"), loop=loop)
    call = replace(CALL, chunk_timeout_s=10)
    finished = engine.pump(
        call, stop=StopSignal(), on_wait=lambda reason: None, feed=lambda deltas: 0.0, on_slow=told.set
    )
    assert finished.finish_reason == "stop"
