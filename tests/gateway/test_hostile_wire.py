"""Hostile HTTP on plain sockets: no request is smuggled in another one, and whatever is no request is refused and closed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway.process import GatewayProcess
from tests.gateway.raw_frames import plain, rest
from tests.gateway.world import ScriptedWorker
from tests.support.mosquitto import Mosquitto

pytestmark = pytest.mark.broker

POST = b"POST /ask HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder: Path = tmp_path_factory.mktemp("wire")
    broker = Mosquitto(folder / "broker")
    broker.start()
    worker = ScriptedWorker(broker.port, folder / "worker")
    gateway = GatewayProcess(
        folder / "gateway", broker.port, gateway__header_timeout_s=1.0, gateway__body_timeout_s=1.0
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


def exchange(gateway: GatewayProcess, data: bytes) -> bytes:
    """All that comes back for these bytes until the gateway closes the connection, which it has to."""
    with plain(gateway.port) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(data)
        return rest(wire)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", id="two lengths"),
        pytest.param(POST + b"Content-Length: 5, 6\r\n\r\n", id="two lengths in one"),
        pytest.param(POST + b"Content-Length: +5\r\n\r\n", id="a signed length"),
        pytest.param(POST + b"Content-Length: 0x5\r\n\r\n", id="a hexadecimal length"),
        pytest.param(POST + b"Content-Length: 5 5\r\n\r\n", id="a length with a blank"),
        pytest.param(POST + b"Content-Length:\r\n\r\n", id="an empty length"),
        pytest.param(POST + b"Content-Length : 5\r\n\r\n", id="a blank before the colon"),
        pytest.param(
            POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="length and chunks"
        ),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", id="chunks and length"
        ),
        pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="two encodings"),
        pytest.param(POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", id="another encoding"),
        pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="nearly chunks"),
        pytest.param(POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", id="chunks, a blank before the colon"),
        pytest.param(POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", id="chunks behind a control character"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", id="twice"),
    ],
)
def test_a_request_whose_end_can_be_read_in_two_ways_is_refused_with_all_that_follows(
    gateway: GatewayProcess, head: bytes
) -> None:
    answer = exchange(gateway, head + HIDDEN)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), answer
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    assert b'"ok"' not in answer


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n", id="NUL in the address"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", id="NUL in a header"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX\x00Y: b\r\n\r\n", id="NUL in a name"),
        pytest.param(b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", id="an address that is not ASCII"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n", id="a line that goes on"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", id="two hosts"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", id="another version"),
        pytest.param(b"\x00\x01\x02\x03\r\n\r\n", id="no text"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", id="a giant header"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", id="many headers"),
        pytest.param(b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", id="a giant address"),
        pytest.param(POST + b"Content-Length: 99999999999999999999\r\n\r\nx", id="a giant length"),
        pytest.param(POST + b"Content-Length: 9" + b"9" * 5000 + b"\r\n\r\nx", id="a length of 5000 digits"),
        pytest.param(POST + b"Content-Length: 3000000\r\n\r\n" + b"x" * 3_000_000, id="a giant body"),
        pytest.param(
            CHUNKED + b"100000\r\n" + b"x" * 0x100000 + b"\r\n200000\r\n" + b"x" * 0x200000, id="giant chunks"
        ),
        pytest.param(CHUNKED + b"ffffffffffffffffffffffff\r\nx", id="a chunk size of 24 digits"),
        pytest.param(CHUNKED + b"-1\r\nx", id="a negative chunk size"),
        pytest.param(CHUNKED + b"zz\r\nx", id="a chunk size that is none"),
        pytest.param(CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", id="a chunk size with a prefix"),
        pytest.param(CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n", id="a chunk size after a blank"),
        pytest.param(CHUNKED + b"\r\nhello\r\n0\r\n\r\n", id="no chunk size"),
        pytest.param(CHUNKED + b"5\r\nhelloXX0\r\n\r\n", id="a chunk without its end"),
        pytest.param(CHUNKED + b"5;" + b"x" * 1_000_000 + b"\r\nhello\r\n0\r\n\r\n", id="a giant chunk extension"),
        pytest.param(CHUNKED + b"5\r\nhello\r\n0\r\n" + b"X: y\r\n" * 200_000 + b"\r\n", id="many trailers"),
    ],
)
def test_what_is_no_request_is_refused_and_its_connection_closed(gateway: GatewayProcess, head: bytes) -> None:
    answer = exchange(gateway, head)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert answer.count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize(
    "path", [b"/../../etc/passwd", b"/%2e%2e/%2e%2e/etc/passwd", b"//etc/passwd", b"/%00%ff", b"/page/..%5c..%5cx"]
)
def test_an_address_leads_nowhere_outside(gateway: GatewayProcess, path: bytes) -> None:
    answer = exchange(gateway, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]
    assert b"root:" not in answer


def test_requests_sent_without_waiting_are_answered_in_turn_and_cost_bounded_memory(gateway: GatewayProcess) -> None:
    asked = [b"POST /ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n\r\ntext-%02d" % n for n in range(30)]
    closing = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = exchange(gateway, b"".join(asked) + closing)
    assert answer.count(b"HTTP/1.1 200 ") == 31
    places = [answer.index(b"text-%02d" % n) for n in range(30)]
    assert places == sorted(places)
    before = gateway.rss_bytes()
    with plain(gateway.port, 2) as wire, contextlib.suppress(OSError):
        for _ in range(300):
            wire.sendall(HIDDEN * 3000)  # and never reads
    assert gateway.rss_bytes() < before + 12 * MIB


@pytest.mark.parametrize(
    "begin, more",
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1\r\nX: ", b"y", id="a head that never ends"),
        pytest.param(b"", b"\r\n", id="empty lines"),
        pytest.param(POST + b"Content-Length: 1000\r\n\r\n", b"x", id="a body that never ends"),
        pytest.param(CHUNKED, b"1\r\nx\r\n", id="chunks that never end"),
        pytest.param(
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", b"x", id="a body nobody reads"
        ),
    ],
)
def test_whoever_sends_byte_by_byte_is_cut_off(gateway: GatewayProcess, begin: bytes, more: bytes) -> None:
    with plain(gateway.port, 0.2) as wire:
        wire.sendall(begin)
        for _ in range(40):  # 8 s; the limits are 1 s each
            try:
                if not wire.recv(65536):
                    return
            except TimeoutError:
                pass
            except ConnectionError:
                return
            with contextlib.suppress(ConnectionError):
                wire.sendall(more)
    pytest.fail("the connection is still open")


@pytest.mark.parametrize("cut", range(1, len(POST) + 30, 7))
def test_a_request_cut_anywhere_leaves_no_trace(gateway: GatewayProcess, cut: int) -> None:
    whole = POST + b"Content-Length: 20\r\n\r\nhalf of a question.."
    with plain(gateway.port) as wire:
        wire.sendall(whole[:cut])
    assert not gateway.log("http.failed")
