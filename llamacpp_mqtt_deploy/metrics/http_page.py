"""The HTTP of the metrics: one GET without a body, one answer, then the connection ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from http import HTTPStatus

PATH = "/metrics"
MOST_HEAD_BYTES = 8192
END_OF_HEAD = b"\r\n\r\n"
_REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (\S+) HTTP/1\.[01]")
_PLAIN = "text/plain; charset=utf-8"

Page = Callable[[str], tuple[bytes, str]]
"""The text and its content type, for what an Accept header says."""


def answer(head: bytes, page: Page) -> bytes:
    """The whole response to a request with this head (without the empty line at its end)."""
    line, *fields = head.decode("latin-1").split("\r\n")
    request = _REQUEST_LINE.fullmatch(line)
    headers = _headers(fields)
    if request is None or headers is None:
        return refusal(HTTPStatus.BAD_REQUEST, "This is no HTTP/1.1 request.")
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        return refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A request for metrics has no body.")
    method, target = request.groups()
    if target.partition("?")[0] != PATH:
        return refusal(HTTPStatus.NOT_FOUND, f"The metrics are at {PATH}.")
    if method not in ("GET", "HEAD"):
        return refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Metrics can only be read.", "Allow: GET, HEAD")
    body, content_type = page(headers.get("accept", ""))
    return _response(HTTPStatus.OK, body, content_type, with_body=method == "GET")


def refusal(status: HTTPStatus, sentence: str, *headers: str) -> bytes:
    return _response(status, f"{sentence}\n".encode(), _PLAIN, *headers)


def _headers(fields: list[str]) -> dict[str, str] | None:
    """Names in lower case; fields of one name joined. None when a line is none of HTTP's (RFC 9112, section 5)."""
    headers: dict[str, str] = {}
    for field in fields:
        name, colon, value = field.partition(":")
        if (
            not colon
            or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name)
            or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value)
        ):
            return None
        key, value = name.lower(), value.strip()
        headers[key] = f"{headers[key]}, {value}" if key in headers else value
    return headers


def _response(status: HTTPStatus, body: bytes, content_type: str, *headers: str, with_body: bool = True) -> bytes:
    head = "\r\n".join(
        (
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {content_type}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            *headers,
            "Connection: close",
        )
    )
    return head.encode("latin-1", "replace") + END_OF_HEAD + (body if with_body else b"")
