"""The body of a streamed chat completion: bytes in at any cut, deltas out."""

from __future__ import annotations

from collections.abc import Sequence

from llamacpp_mqtt_deploy.core.completions import CompletionReader
from llamacpp_mqtt_deploy.core.deltas import Delta
from llamacpp_mqtt_deploy.core.sse import SseDecoder
from llamacpp_mqtt_deploy.core.thinking import ThinkingSplitter
from llamacpp_mqtt_deploy.core.token_lines import TokenLines


class CompletionStream:
    """Joins the decoding of events with their reading. `reader` knows what the stream has said of itself.

    Raises a `RequestError` for an error event, `EventTooLong` for an event without end.
    """

    def __init__(self, *, thinking: ThinkingSplitter | None = None) -> None:
        self.reader = CompletionReader(thinking=thinking)
        self._events = SseDecoder()
        self._tokens = TokenLines()

    def feed(self, body: bytes) -> list[Delta]:
        """The deltas that these bytes bring."""
        if not self.reader.is_plain:
            return self._read(self._events.feed(body))
        tokens = self._tokens.read(body) if self._events.between_events else None
        if tokens is not None:
            self.reader.count(tokens.pieces)
            return [tokens]
        found = self._tokens.find(body)
        if found is None:
            return self._read(self._events.feed(body))
        # The first read of an answer, and the last: tokens with other events around them, or with the half of one.
        start, end = found
        deltas = self._read(self._events.feed(body[:start]))
        tokens = self._tokens.read(body[start:end]) if self._events.between_events and self.reader.is_plain else None
        if tokens is None:
            return deltas + self._read(self._events.feed(body[start:]))
        self.reader.count(tokens.pieces)
        return [*deltas, tokens, *self._read(self._events.feed(body[end:]))]

    def feed_parts(self, parts: Sequence[bytes]) -> list[Delta]:
        """As `feed` of all of them; quicker where each part is an event."""
        if not self.reader.is_plain:
            return self.feed(b"".join(parts))
        if len(parts) == 1:
            token = self._tokens.read_one(parts[0]) if self._events.between_events else None
            if token is None:
                return self.feed(parts[0])
            self.reader.count(1)
            return [token]
        start, end = self._tokens.among(parts)
        if start == end:
            return self.feed(b"".join(parts))
        deltas = self._read(self._events.feed(b"".join(parts[:start]))) if start else []
        ready = self._events.between_events and self.reader.is_plain
        tokens = self._tokens.read_parts(parts[start:end]) if ready else None
        if tokens is None:
            return deltas + self.feed(b"".join(parts[start:]))
        self.reader.count(tokens.pieces)
        deltas.append(tokens)
        return deltas + self._read(self._events.feed(b"".join(parts[end:]))) if end < len(parts) else deltas

    def end(self) -> list[Delta]:
        """The deltas of what a server left without the blank line that ends an event, and of what was held back."""
        # What a broken connection left of an event is no JSON object any more and says nothing.
        left = [data.rstrip() for data in self._events.end()]
        deltas = self._read([data for data in left if data == b"[DONE]" or (data[:1] == b"{" and data[-1:] == b"}")])
        return deltas + self.reader.rest()

    def _read(self, events: list[bytes]) -> list[Delta]:
        deltas: list[Delta] = []
        for data in events:
            deltas += self.reader.read(data)
        return deltas
