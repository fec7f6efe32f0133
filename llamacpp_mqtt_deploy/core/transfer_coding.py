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

    def parts(self, raw: bytes) -> list[bytes]:
        """The same in one part, or none."""
        body = self.feed(raw)
        return [body] if body else []


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
        return b"".join(self.parts(raw))

    def parts(self, raw: bytes) -> list[bytes]:
        """The same in the chunks, or ends of chunks, in which they came."""
        if not (self._line or self._left or self._closing or self.ended):
            start = raw.find(b"\r\n") + 2
            if _SIZES.get(raw[: start - 2]) == len(raw) - start - 2 and raw.endswith(b"\r\n"):
                return [raw[start:-2]]  # one whole chunk: a token as soon as it was made
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
        return parts


_SIZES: dict[bytes, int] = {b"%x" % size: size for size in range(1, 1024)}
"""What a size means as nearly everybody writes it; an empty chunk is the last, which has its own way."""


def _whole_chunks(raw: bytes) -> list[bytes] | None:
    """The bodies of `raw` where it is nothing but whole chunks in their plainest form; None where it is not so plain."""
    pieces = raw.split(b"\r\n")
    if len(pieces) % 2 == 0 or pieces.pop():
        return None
    bodies = pieces[1::2]
    # Where a body holds a line feed, what follows it is taken for a size and is none, or not that of what follows then.
    return bodies if list(map(_SIZES.get, pieces[::2])) == list(map(len, bodies)) else None


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    # int() would take signs, blanks and underscores as well.
    if not digits or len(digits) > 16 or digits.translate(None, _HEX_DIGITS):
        raise BadChunk("no size of a chunk")
    return int(digits, 16)
