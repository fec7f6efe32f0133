"""How HTTP frames a body: raw bytes in at any cut, the body out (RFC 9112, sections 6.3 and 7.1)."""

from __future__ import annotations

MAX_LINE_BYTES = 8192
"""Longest line with a chunk's size; extensions and trailers that nobody sends would be the rest of it."""


_LAST_CHUNK = b"0\r\n\r\n"
_HEX_DIGITS = b"0123456789abcdefABCDEF"


class BadChunk(ValueError):
    """The bytes are no chunked body."""


class PlainBody:
    """A body of `length` bytes, or (None) one that the end of the connection ends."""

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.ended = length == 0

    @property
    def ends_with_connection(self) -> bool:
        return self._left is None

    def feed(self, raw: bytes) -> bytes:
        """The body bytes in these raw bytes."""
        if self._left is None:
            return raw
        body = raw[: self._left]
        self._left -= len(body)
        self.ended = not self._left
        return body


class ChunkedDecoder:
    """Takes the framing off. llama.cpp sends each token as a chunk of its own; many in a read are taken together."""

    ends_with_connection = False

    def __init__(self) -> None:
        self.ended = False
        """The last chunk came; its trailer is left unread, as the connection is not used again."""
        self._line = b""
        self._left = 0  # bytes of the current chunk that are still to come
        self._closing = False  # the CRLF after a chunk's bytes is still to come

    def feed(self, raw: bytes) -> bytes:
        """The body bytes in these raw bytes. Raises BadChunk."""
        if not (self._line or self._left or self._closing or self.ended):
            ends = raw.endswith(_LAST_CHUNK)
            whole = _whole_chunks(raw[: -len(_LAST_CHUNK)] if ends else raw)
            if whole is not None:
                self.ended = ends
                return whole
        parts: list[bytes] = []
        at = 0
        if self._line:
            raw, self._line = self._line + raw, b""
        while at < len(raw) and not self.ended:
            if self._left:
                part = raw[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                self._closing = not self._left
                continue
            end = raw.find(b"\n", at)
            if end < 0:
                self._line = raw[at:]
                if len(self._line) > MAX_LINE_BYTES:
                    raise BadChunk("a chunk's size without end")
                break
            line = raw[at:end].strip()
            at = end + 1
            if self._closing:
                if line:
                    raise BadChunk("more bytes than a chunk said")
                self._closing = False
                continue
            self._left = _size(line)
            self.ended = not self._left
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _whole_chunks(raw: bytes) -> bytes | None:
    """The bodies of `raw` where it is nothing but whole chunks in their plainest form; None where it is not so plain."""
    pieces = raw.split(b"\r\n")
    if len(pieces) % 2 == 0 or pieces.pop():
        return None
    sizes, bodies = pieces[::2], pieces[1::2]
    if b"".join(sizes).translate(None, _HEX_DIGITS):
        return None  # with an extension; or a body holds a line feed, and what it was taken for is no size
    try:
        # An empty one is the last, which has its own way.
        plain = all(bodies) and [int(size, 16) for size in sizes] == list(map(len, bodies))
    except ValueError:
        return None
    return b"".join(bodies) if plain else None


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    # int() would take signs, blanks and underscores as well.
    if not digits or len(digits) > 16 or digits.translate(None, _HEX_DIGITS):
        raise BadChunk("no size of a chunk")
    return int(digits, 16)
