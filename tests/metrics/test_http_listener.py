"""Whoever connects to the metrics cannot hurt the worker: connections, times, sizes and work are bounded."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.config.listen_address import ListenAddress
from llamacpp_mqtt_deploy.metrics import http_listener
from llamacpp_mqtt_deploy.metrics.http_listener import MOST_CONNECTIONS, HttpListener
from llamacpp_mqtt_deploy.metrics.http_page import MOST_HEAD_BYTES
from tests.metrics.scraping import all_of, get, raw
from tests.support.waiting import eventually

LOOPBACK = ListenAddress(host="127.0.0.1")
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Pages:
    """Counts how often the metrics were asked for."""

    def __init__(self, text: bytes = b"lmd_slots 2\n") -> None:
        self.text = text
        self.asked = 0
        self.problem: Exception | None = None

    def page(self, _accept: str) -> tuple[bytes, str]:
        self.asked += 1
        if self.problem is not None:
            raise self.problem
        return self.text, TEXT


@contextlib.contextmanager
def listening(pages: Pages, address: ListenAddress = LOOPBACK) -> Iterator[HttpListener]:
    listener = HttpListener(address, pages.page)
    listener.start()
    try:
        eventually(lambda: listener.shown)
        yield listener
    finally:
        listener.close(5.0)
        assert not listener._thread.is_alive()


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def url(pages: Pages) -> Iterator[str]:
    with listening(pages) as listener:
        yield listener.shown


def test_a_get_is_answered_and_the_connection_ends(url: str) -> None:
    reply = get(url)
    assert (reply.status, reply.body) == (200, "lmd_slots 2\n")
    assert reply.headers["connection"] == "close"
    assert reply.headers["content-type"] == TEXT


def test_ipv6_is_served_where_the_address_says_so(pages: Pages) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with listening(pages, ListenAddress(host="::1")) as listener:
        assert listener.shown.startswith("http://[::1]:")
        assert get(listener.shown).status == 200


def test_a_head_is_answered_without_the_text(url: str) -> None:
    reply = get(url, method="HEAD")
    assert (reply.status, reply.body, reply.headers["content-length"]) == (200, "", "12")


@pytest.mark.parametrize(
    "request_bytes,status",
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"DELETE /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept : x\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: a\x00b\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: text\r\n folded\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * MOST_HEAD_BYTES + b"\r\n", 431),
    ],
)
def test_what_is_no_request_for_metrics_gets_one_answer_and_no_metrics(
    url: str, pages: Pages, request_bytes: bytes, status: int
) -> None:
    with raw(url) as sock:
        sock.sendall(request_bytes)
        received = all_of(sock)
    assert received.startswith(f"HTTP/1.1 {status} ".encode())
    assert received.count(b"Content-Length:") == 1
    assert pages.asked == 0


def test_a_second_request_on_the_same_connection_is_not_answered(url: str, pages: Pages) -> None:
    with raw(url) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" * 50)
        assert all_of(sock).count(b"HTTP/1.1 200") == 1
    assert pages.asked == 1


def test_a_request_that_drips_is_cut_off_in_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listener, "HEAD_S", 0.3)
    with raw(url) as sock:
        began, stop = time.monotonic(), threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(b"GET /metrics HTTP/1.1\r\n")
                while not stop.wait(0.02):
                    sock.sendall(b"X")

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert all_of(sock) == b""
        stop.set()
        dripping.join()
        assert time.monotonic() - began < 5


def test_a_reader_that_takes_nothing_is_cut_off_and_hinders_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listener, "ANSWER_S", 0.5)
    pages = Pages(b"x" * 20_000_000)
    with listening(pages) as listener, raw(listener.shown) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        eventually(lambda: pages.asked)
        pages.text = b"small\n"
        assert get(listener.shown).body == "small\n"
        eventually(lambda: not listener._connections)


def test_a_crowd_that_says_nothing_does_not_keep_prometheus_out(url: str) -> None:
    with contextlib.ExitStack() as crowd:
        for _ in range(MOST_CONNECTIONS + 5):
            crowd.enter_context(raw(url))
        assert get(url).status == 200


def test_a_flood_of_requests_is_held_back(url: str, pages: Pages) -> None:
    """Forty at once, then twenty in a second: whoever asks without end does not get the processor that tokens need."""
    ends_at = time.monotonic() + 1.0
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set() and time.monotonic() < ends_at:
            with contextlib.suppress(OSError, TimeoutError):
                get(url, timeout_s=1.0)

    askers = [threading.Thread(target=ask) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert pages.asked <= http_listener.ACCEPTS_AT_ONCE + 3 * http_listener.ACCEPTS_PER_S
    eventually(lambda: get(url).status == 200)


def test_resets_and_half_requests_leave_nothing_behind(pages: Pages) -> None:
    with listening(pages) as listener:
        for data in (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\n\r\n"):
            with raw(listener.shown) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.sendall(data)
        eventually(lambda: not listener._connections)
        assert get(listener.shown).status == 200


def test_metrics_that_cannot_be_read_are_an_error_of_http_and_one_line_of_the_log(url: str, pages: Pages) -> None:
    pages.problem = RuntimeError("a defect")
    with capture_logs() as lines:
        assert [get(url).status for _ in range(3)] == [500, 500, 500]
        pages.problem = None
        assert get(url).status == 200
    assert [line["event"] for line in lines] == ["metrics.page_failed"]


def test_a_port_that_is_taken_is_told_once_and_tried_again(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listener, "LISTEN_AGAIN_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other, capture_logs() as lines:
        listener = HttpListener(ListenAddress(host="127.0.0.1", port=other.getsockname()[1]), pages.page)
        listener.start()
        eventually(lambda: lines)
        threading.Event().wait(0.2)  # several tries
        assert [line["event"] for line in lines] == ["metrics.not_listening"]
        other.close()
        eventually(lambda: listener.shown)
        assert get(listener.shown).status == 200
        listener.close(5.0)


def test_without_file_descriptors_it_waits_instead_of_turning(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []

    def none_left(_: socket.socket) -> tuple[socket.socket, object]:
        tries.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    with listening(pages) as listener:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", none_left)
            with raw(listener.shown):
                eventually(lambda: tries)
                threading.Event().wait(0.3)
                assert len(tries) == 1
        eventually(lambda: get(listener.shown).status == 200)


def test_a_socket_file_of_a_dead_worker_is_replaced_and_a_living_one_is_not(pages: Pages, tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with listening(pages, ListenAddress(path=path)) as listener:
        assert get(listener.shown).status == 200
        with capture_logs() as lines:
            second = HttpListener(ListenAddress(path=path), pages.page)
            second.start()
            eventually(lambda: lines)
            second.close(5.0)
        assert "another program listens" in lines[0]["reason"]
        assert get(listener.shown).status == 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_is_no_socket_stays_as_it_is(pages: Pages, tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "m.sock", tmp_path / "precious"
    other.write_text("precious")
    match kind:
        case "file":
            path.write_text("precious")
        case "link":
            path.symlink_to(other)
        case "folder":
            path.mkdir()
    before = sorted(tmp_path.iterdir())
    with capture_logs() as lines:
        listener = HttpListener(ListenAddress(path=path), pages.page)
        listener.start()
        eventually(lambda: lines)
        listener.close(5.0)
    assert "is no socket" in lines[0]["reason"]
    assert sorted(tmp_path.iterdir()) == before
    assert other.read_text() == "precious"
