"""The head of an HTTP/1 response: raw bytes in at any cut, its status and what frames its body out (RFC 9112)."""

from __future__ import annotations

from dataclasses import dataclass

from llamacpp_mqtt_deploy.core.transfer_coding import ChunkedDecoder, PlainBody

MAX_HEAD_BYTES = 65_536
"""Longest head, interim responses before it included; real ones have a few hundred bytes."""

_WITHOUT_BODY = (204, 304)


class BadHead(ValueError):
    """The bytes are no head of an HTTP/1 response."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What of a head is of use; header names are in lower case, values of repeated ones are joined by commas."""

    status: int
    headers: dict[str, str]

    @property
    def content_type(self) -> str:
        """In lower case, without parameters; empty where there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def body(self) -> ChunkedDecoder | PlainBody:
        """Takes the framing off the body that follows. Raises BadHead where it cannot be told how the body ends."""
        if self.status in _WITHOUT_BODY:
            return PlainBody(0)
        coding = self.headers.get("transfer-encoding", "").strip().lower()
        if coding == "chunked":
            return ChunkedDecoder()
        if coding:
            raise BadHead(f"a transfer coding that was not asked for: {coding[:40]}")
        lengths = {each.strip() for each in self.headers.get("content-length", "").split(",")}
        length = lengths.pop()
        if lengths or (length and not (length.isascii() and length.isdigit() and len(length) <= 18)):
            raise BadHead("no length of a body")
        return PlainBody(int(length) if length else None)


class HeadReader:
    """Collects raw bytes until the head is whole; interim responses (100 to 199) before it are left out."""

    def __init__(self) -> None:
        self._raw = b""
        self._taken = 0

    def feed(self, raw: bytes) -> tuple[ResponseHead, bytes] | None:
        """The head and the bytes that came behind it; None while it is not whole. Raises BadHead."""
        self._raw += raw
        while (end := _end_of(self._raw)) is not None:
            head, self._raw = _parsed(self._raw[: end[0]]), self._raw[end[1] :]
            self._taken += end[1]
            if not 100 <= head.status < 200:
                return head, self._raw
        if not self._raw.startswith(b"HTTP/"[: len(self._raw)]):
            raise BadHead("no HTTP")
        if self._taken + len(self._raw) > MAX_HEAD_BYTES:
            raise BadHead("headers without end")
        return None


def _end_of(raw: bytes) -> tuple[int, int] | None:
    """Where the lines of the head end, and where the bytes behind it begin."""
    found = [(at, at + len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := raw.find(mark)) >= 0]
    return min(found, default=None)


def _parsed(raw: bytes) -> ResponseHead:
    first, *lines = raw.decode("latin-1").split("\n")
    version, _, rest = first.partition(" ")
    status = rest.strip().partition(" ")[0]
    if not version.startswith("HTTP/1.") or len(status) != 3 or not (status.isascii() and status.isdigit()):
        raise BadHead("no HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not name or name != name.strip():
            raise BadHead("a header without a name")
        value = value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return ResponseHead(int(status), headers)
