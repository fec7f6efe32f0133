"""Hostile WebSocket frames and handshakes at the gateway: each socket ends as RFC 6455 says, and costs bounded memory."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.gateway.process import GatewayProcess
from tests.gateway.raw_frames import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    UPGRADE,
    close_code,
    frame,
    plain,
    rest,
    until,
    upgraded,
)
from tests.gateway.world import ScriptedWorker
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

MIB = 1024 * 1024
MAX_BODY = 64 * 1024


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(slots=4)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, engine: ScriptedEngine) -> Iterator[GatewayProcess]:
    folder: Path = tmp_path_factory.mktemp("sockets")
    broker = Mosquitto(folder / "broker")
    broker.start()
    worker = ScriptedWorker(broker.port, folder / "worker", engine)
    gateway = GatewayProcess(
        folder / "gateway",
        broker.port,
        gateway__header_timeout_s=1.0,
        gateway__body_timeout_s=20.0,
        gateway__slow_reader_s=1.0,
        gateway__max_body_bytes=MAX_BODY,
    )
    try:
        gateway.start()
        gateway.wait_ready()
        yield gateway
    finally:
        gateway.close()
        worker.stop()
        broker.close()


@pytest.fixture(autouse=True)
def as_before(gateway: GatewayProcess) -> Iterator[None]:
    """After each test a good request is answered, and the log tells of no defect."""
    yield
    assert httpx.post(f"{gateway.url}/ask", content="a good question", timeout=20).text == "a good question"
    assert "Traceback" not in gateway.log_text()


@pytest.mark.parametrize(
    "request_head",
    [
        pytest.param(UPGRADE + b"Cookie: " + b"x" * 10_000 + b"\r\n\r\n", id="a header line of 10 KB"),
        pytest.param(UPGRADE + b"".join(b"X-%d: a\r\n" % n for n in range(150)) + b"\r\n", id="150 headers"),
        pytest.param(UPGRADE.replace(b"GET", b"POST", 1) + b"\r\n", id="a POST"),
        pytest.param(UPGRADE + b"Content-Length: 5\r\n\r\nhello", id="a body"),
        pytest.param(UPGRADE.replace(b"Version: 13", b"Version: 12") + b"\r\n", id="another version"),
        pytest.param(UPGRADE.replace(b"Sec-WebSocket-Key", b"X-Key") + b"\r\n", id="no key"),
        pytest.param(UPGRADE.replace(b"/ws", b"/nothing", 1) + b"\r\n", id="another address"),
    ],
)
def test_a_handshake_that_is_none_is_refused_and_its_connection_closed(
    gateway: GatewayProcess, request_head: bytes
) -> None:
    with plain(gateway.port, 5) as wire:
        wire.sendall(request_head)
        answer = rest(wire)
    assert answer.startswith(b"HTTP/1.1 4"), answer


@pytest.mark.parametrize(
    "frames, code",
    [
        pytest.param(frame(TEXT, b"{}", masked=False), 1002, id="not masked"),
        pytest.param(frame(TEXT, b"{}", rsv=4), 1002, id="a reserved bit"),
        pytest.param(frame(3, b"x"), 1002, id="an unknown opcode"),
        pytest.param(frame(CONT, b"x"), 1002, id="a continuation of nothing"),
        pytest.param(frame(TEXT, b"{", fin=False) + frame(TEXT, b"{}"), 1002, id="a message in a message"),
        pytest.param(frame(PING, b"x", fin=False), 1002, id="a ping in parts"),
        pytest.param(frame(PING, b"x" * 126), 1002, id="a ping too long"),
        pytest.param(frame(TEXT, b"\xff\xfe"), 1007, id="a text that is not UTF-8"),
        pytest.param(frame(TEXT, b"\xe2\x82", fin=False) + frame(CONT, b"\x28"), 1007, id="a torn character"),
        pytest.param(frame(CLOSE, b"\x00"), 1002, id="half a close code"),
        pytest.param(frame(CLOSE, b"\x00\x05"), 1002, id="a close code out of range"),
        pytest.param(frame(CLOSE, b"\x03\xed"), 1002, id="a close code that is not to be sent"),
        pytest.param(frame(CLOSE, b"\x03\xe8\xff\xfe"), 1002, id="a close reason that is not UTF-8"),
        pytest.param(b"\x81\xff" + (1 << 62).to_bytes(8, "big") + b"\0\0\0\0", 1009, id="a frame of 4 EiB"),
        pytest.param(b"\x81\xff" + b"\xff" * 8 + b"\0\0\0\0", 1009, id="a negative length"),
        pytest.param(frame(BINARY, b"x" * (MAX_BODY + 1)), 1009, id="a frame too large"),
        pytest.param(
            frame(TEXT, b"x" * MAX_BODY, fin=False) + frame(CONT, b"x"), 1009, id="parts that are too large together"
        ),
    ],
)
def test_a_frame_that_breaks_the_protocol_ends_its_socket_with_the_code_for_it(
    gateway: GatewayProcess, frames: bytes, code: int
) -> None:
    with upgraded(gateway.port) as wire:
        wire.sendall(frames)
        answer = rest(wire)
    told = close_code(answer)
    assert told == code or (code == 1002 and told == 1007), (told, answer)


def test_frames_that_no_request_is_made_of_are_told_and_the_socket_lives_on(gateway: GatewayProcess) -> None:
    with upgraded(gateway.port) as wire:
        for content in (b"", b"\0", b"null", b"[]", b"{", b'{"type":1}', b'{"type":"control"}', b'{"a":1,"a":2}'):
            wire.sendall(frame(TEXT, content) + frame(BINARY, content))
        wire.sendall(frame(PONG, b"nobody asked") + frame(PING, b"still there?"))
        seen = b""
        while b"still there?" not in seen:
            part = wire.recv(65536)
            assert part, seen
            seen += part
        assert b"internal" not in seen


def test_a_flood_of_pings_whose_answers_nobody_reads_costs_bounded_memory(gateway: GatewayProcess) -> None:
    before = gateway.rss_bytes()
    with upgraded(gateway.port) as wire:
        wire.settimeout(3)
        pings = frame(PING, b"p" * 125) * 1000
        with contextlib.suppress(OSError):
            for _ in range(400):
                wire.sendall(pings)
        assert gateway.rss_bytes() < before + 12 * MIB
        eventually(lambda: ended(wire), 10)  # within slow_reader_s


def test_fragments_without_an_end_cost_no_more_than_their_bytes(gateway: GatewayProcess) -> None:
    def fragmented() -> socket.socket:
        wire = upgraded(gateway.port)
        wire.sendall(frame(TEXT, b"{", fin=False))
        for data in (b"",) * 12 + (b" ",) * 5:
            wire.sendall(frame(CONT, data, fin=False) * 10_000)
        wire.sendall(frame(CONT, b"}", fin=False) + frame(PING, b"read so far"))
        until(wire, b"read so far")
        return wire

    first = fragmented()
    before = gateway.rss_bytes()  # with what one read of many small frames needs for a moment
    wires = [first, *(fragmented() for _ in range(2))]
    assert gateway.rss_bytes() < before + 4 * MIB
    for wire in wires:
        wire.sendall(frame(CONT, b" "))
        until(wire, b'"type":"error"')
        wire.close()


def test_a_message_in_parts_is_one_message(gateway: GatewayProcess) -> None:
    whole = json.dumps({"type": "request", "prompt": "an ünusual question"}, ensure_ascii=False).encode()
    with upgraded(gateway.port) as wire:
        for opcode in (TEXT, BINARY):
            parts = [whole[at : at + 1] for at in range(len(whole))]
            wire.sendall(
                frame(opcode, parts[0], fin=False)
                + b"".join(frame(CONT, part, fin=False) + frame(PING) for part in parts[1:])
                + frame(CONT)
            )
            seen = b""
            while b'"type":"done"' not in seen:
                part = wire.recv(65536)
                assert part, seen
                seen += part
            assert "an ünusual question".encode() in seen


def test_a_socket_that_is_cut_without_a_close_frame_may_come_back_to_its_request(
    gateway: GatewayProcess, engine: ScriptedEngine
) -> None:
    gate = Gate()
    engine.play("one", gate, " two")
    request = frame(TEXT, json.dumps({"type": "request", "session": "s", "request_id": "cut", "prompt": "x"}).encode())
    ends = sockets_ended(gateway)
    with upgraded(gateway.port) as wire:
        wire.sendall(request)
        until(wire, b'"type":"chunk"')
    eventually(lambda: sockets_ended(gateway) > ends, 10)
    with upgraded(gateway.port) as wire:
        wire.sendall(request)
        until(wire, b'"content":"one"')
        gate.open()
        assert b"cancelled" not in until(wire, b'"type":"done"')


def sockets_ended(gateway: GatewayProcess) -> int:
    return sum(line["method"] == "WS" for line in gateway.log("http.answered"))


def ended(wire: socket.socket) -> bool:
    """Whether the other side has closed; what it sent before is not read on purpose."""
    try:
        wire.send(frame(PING))
    except TimeoutError:
        return False
    except OSError:
        return True
    return False


def test_connections_cut_in_every_state_leave_no_trace(gateway: GatewayProcess) -> None:
    """Half a body, half a head, half a frame, a half-closed connection."""
    whole = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    for path in (b"/ask", b"/api/show", b"/control", b"/v1/messages", b"/api/chat", b"/nothing"):
        with plain(gateway.port) as wire:
            wire.sendall(whole % path)
        with plain(gateway.port) as wire:
            wire.sendall(whole % path)
            wire.shutdown(socket.SHUT_WR)
            answer = rest(wire)
            assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), answer
    for part in (b"", b"G", b"GET /", UPGRADE):
        with plain(gateway.port) as wire:
            wire.sendall(part)
    with upgraded(gateway.port) as wire:
        wire.sendall(frame(TEXT, b"x" * 100)[:20])
    assert not gateway.log("http.failed")
