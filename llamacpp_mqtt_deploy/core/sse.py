"""Server-sent events: bytes in at any cut, the data of finished events out."""

from __future__ import annotations

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""Longest event that is kept; a token's event has some hundred bytes, a whole answer in one event rarely a megabyte."""

_BOM = b"\xef\xbb\xbf"


class EventTooLong(ValueError):
    """A line or an event grew over the limit; the decoder is of no use afterwards."""


class SseDecoder:
    """Decodes a `text/event-stream` (HTML standard, section 9.2.6) as far as engines use it.

    Only `data` lines count, and `error` lines, whose value older llama.cpp servers send instead of data. An event that holds
    nothing but blanks, which proxies send so that a connection stays open, is none. Works on bytes,
    so that neither a cut inside a UTF-8 character nor a U+2028 inside a JSON string is ever taken for the end of a line.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_event_bytes
        self._line = bytearray()  # the line that is not finished yet
        self._data: list[bytes] = []  # the values of the event that is not finished yet
        self._data_bytes = 0
        self._after_cr = False  # the last byte was a CR: a LF that follows belongs to it
        self._at_start = True  # a byte order mark may still come

    @property
    def between_events(self) -> bool:
        """Nothing of an event is held: what comes next begins a line."""
        return not (self._line or self._data or self._after_cr)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that these bytes finish. Raises `EventTooLong`."""
        if not chunk:
            return []
        if not self._line and not self._data and chunk.startswith(b"data: ") and chunk.endswith(b"\n\n"):
            # What llama.cpp sends with nearly every read: whole events of one line each.
            events = chunk[6:-2].split(b"\n\ndata: ")
            simple = chunk.count(b"\n") == 2 * len(events) and b"\r" not in chunk
            if simple and len(chunk) <= self._max_bytes:
                self._at_start = self._after_cr = False
                return [event for event in events if _says_something(event)]
        return self._feed_lines(chunk)

    def end(self) -> list[bytes]:
        """The event that the end of the stream leaves without its blank line, which the standard drops.

        Some servers close right after `data: [DONE]`. What a broken connection leaves is no valid JSON and is the
        reader's to refuse.
        """
        self._end_line(bytes(self._line))
        self._line.clear()
        return self._take_event()

    def _feed_lines(self, chunk: bytes) -> list[bytes]:
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        else:
            self._after_cr = False
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        first, *others = chunk.split(b"\n")
        self._line += first
        events: list[bytes] = []
        for following in others:
            line = bytes(self._line)
            self._line[:] = following
            self._check(len(line))
            if line:
                self._end_line(line)
            else:
                self._at_start = False
                events += self._take_event()
        self._check(len(self._line))
        return events

    def _end_line(self, line: bytes) -> None:
        if self._at_start:
            line = line.removeprefix(_BOM)
            self._at_start = False
        name, _, value = line.partition(b":")
        if name in (b"data", b"error"):
            value = value.removeprefix(b" ")
            self._data_bytes += len(value)
            self._check(self._data_bytes)
            self._data.append(value)

    def _take_event(self) -> list[bytes]:
        if not self._data:
            return []
        event = b"\n".join(self._data)
        self._data = []
        self._data_bytes = 0
        return [event] if _says_something(event) else []

    def _check(self, length: int) -> None:
        if length > self._max_bytes:
            raise EventTooLong(f"an event of more than {self._max_bytes} bytes")


def _says_something(event: bytes) -> bool:
    return bool(event) and not event.isspace()
