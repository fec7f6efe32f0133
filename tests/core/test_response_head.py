"""The head of an HTTP response, cut anywhere: as Python's own client reads it, and bounded."""

from __future__ import annotations

import http.client
import io
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.response_head import MAX_HEAD_BYTES, BadHead, HeadReader, ResponseHead
from llamacpp_mqtt_deploy.core.transfer_coding import ChunkedDecoder, PlainBody

LLAMA = (
    b"HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: \r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Server: llama.cpp\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)


def read(*parts: bytes) -> tuple[ResponseHead, bytes] | None:
    reader = HeadReader()
    for part in parts:
        found = reader.feed(part)
        if found is not None:
            return found
    return None


class _Reads:
    """What `http.client` needs of a socket."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._raw)


def of_python(raw: bytes) -> http.client.HTTPResponse:
    response = http.client.HTTPResponse(cast("Any", _Reads(raw)))
    response.begin()
    return response


_NAMES = st.sampled_from(["Content-Type", "X-A", "server", "Connection"])
_VALUES = st.text(st.characters(codec="latin-1", exclude_categories=("Cc", "Zl", "Zp", "Zs")), max_size=20)


@given(
    status=st.integers(200, 599).filter(lambda status: status not in (204, 304)),
    reason=st.text("abcXYZ ", max_size=10),
    headers=st.dictionaries(_NAMES, _VALUES, max_size=4),
    framing=st.sampled_from(
        [{}, {"Transfer-Encoding": "chunked"}, {"Transfer-Encoding": "Chunked"}, {"Content-Length": "12"}]
    ),
    line_end=st.sampled_from([b"\r\n", b"\n"]),
    rest=st.binary(max_size=12),
    cut=st.integers(0, 400),
)
def test_a_head_cut_anywhere_is_read_as_pythons_client_reads_it(
    status: int, reason: str, headers: dict[str, str], framing: dict[str, str], line_end: bytes, rest: bytes, cut: int
) -> None:
    lines = [f"HTTP/1.1 {status} {reason}".encode()]
    lines += [f"{name}: {value}".encode("latin-1") for name, value in {**headers, **framing}.items()]
    raw = line_end.join([*lines, b"", b""]) + rest
    found = read(raw[:cut], raw[cut:])
    assert found is not None
    head, left = found
    assert left == rest or rest.startswith(left)  # the first piece may have held all of the head
    own = of_python(raw)
    assert head.status == own.status
    assert head.headers.get("content-type", "") == (own.headers.get("Content-Type") or "").strip()
    body = head.body()
    assert isinstance(body, ChunkedDecoder) == bool(own.chunked)
    if isinstance(body, PlainBody):
        assert body.ends_with_connection == (own.length is None)


def test_what_llamas_server_says_is_understood_in_one_byte_at_a_time() -> None:
    found = read(*(LLAMA[at : at + 1] for at in range(len(LLAMA))))
    assert found is not None
    head, left = found
    assert (head.status, head.content_type, left) == (200, "text/event-stream", b"")
    assert isinstance(head.body(), ChunkedDecoder)
    assert read(LLAMA + b"5\r\nhello") == (head, b"5\r\nhello")


def test_interim_responses_are_left_out() -> None:
    found = read(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n", b"\r\nHTTP/1.1 404 No\r\n\r\nbody"
    )
    assert found is not None
    assert (found[0].status, found[0].headers, found[1]) == (404, {}, b"body")


def test_headers_that_come_twice_are_joined() -> None:
    found = read(b"HTTP/1.1 200 OK\r\nVary: a\r\nvary: b\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n")
    assert found is not None
    assert found[0].headers["vary"] == "a, b"
    body = found[0].body()
    assert (body.feed(b"abcdef"), body.ended) == (b"abc", True)


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"h",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: nameless\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nName : spaced\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
    ],
)
def test_what_is_no_head_is_refused(raw: bytes) -> None:
    with pytest.raises(BadHead):
        read(raw)


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: -1",
        b"Content-Length: 1_0",
        b"Content-Length: +5",
        b"Content-Length: 5, 6",
        b"Content-Length: 9999999999999999999",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    ],
)
def test_a_body_whose_end_cannot_be_told_is_refused(headers: bytes) -> None:
    found = read(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n")
    assert found is not None
    with pytest.raises(BadHead):
        found[0].body()


def test_headers_without_end_are_given_up() -> None:
    lines = b"X: " + b"y" * 995 + b"\r\n"
    with pytest.raises(BadHead, match="without end"):
        read(b"HTTP/1.1 200 OK\r\n", *[lines] * (MAX_HEAD_BYTES // 1000 + 1))
    hint = b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"
    with pytest.raises(BadHead, match="without end"):
        read(*[hint] * (MAX_HEAD_BYTES // len(hint) + 2))


def test_a_response_without_content_has_no_body() -> None:
    found = read(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n")
    assert found is not None
    assert found[0].body().ended
