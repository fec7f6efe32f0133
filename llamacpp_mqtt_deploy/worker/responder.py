"""Numbers the events of one request and publishes them on its reply topic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.chunk_record import Chunk, omits_text, packed, recorded, written
from llamacpp_mqtt_deploy.core.coalescer import ALL, Coalescer, TextKind
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.flow import MOST_CHARS_AT_ONCE, MOST_CHUNKS_AT_ONCE, FlowControl
from llamacpp_mqtt_deploy.io_loop import Timer
from llamacpp_mqtt_deploy.ports import Outbox, Published, Share
from llamacpp_mqtt_deploy.worker.accumulator import Told

# A reader that rests comes back just before whoever was to send what waits, and brings more.
_AFTER_READER_S = 0.001

# A text this short fits into an event of any broker: its limit need not be asked for each token.
_SURELY_FITS_CHARS = 100

_CHUNK = b'{"type":"chunk",'
"""How the event of a chunk begins."""


class Responder:
    """The event stream of one request, from `queued` to the terminal event; may be called from any thread.

    `silent` (requests with `stream: false`, routes with mode `off`) publishes the terminal event alone. Text given to `text`
    is coalesced: `wake(call)` has to run `call` soon in another thread than the link's, when an acknowledgement lets waiting
    text go. `active_streams` tells how many streams there are just now, `max_event_bytes` what the broker takes just now. When
    the outbox does not take an event, `on_overflow` runs once, and only the terminal event is left to be said: after a hole
    no chunk is of use to its client.
    """

    def __init__(
        self,
        *,
        outbox: Outbox,
        topic: str,
        writer: EventWriter,
        correlation: bytes | None,
        silent: bool,
        wake: Callable[[float, Callable[[], None]], Timer | None],
        coalesce_min_s: float = 0.0,
        active_streams: Callable[[], int] = lambda: 1,
        coalesce_max_chars: int = 8000,
        max_event_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.topic = topic
        self.silent = silent
        self.chunks = 0
        self.first_chunk_at: float | None = None
        self.last_event_at: float | None = None
        """Monotonic seconds of the latest event, for heartbeats; None before the first."""
        self.on_overflow: Callable[[], object] = lambda: None
        self._outbox = outbox
        self._writer = writer
        self._correlation = correlation
        self._max_event_bytes = max_event_bytes or (lambda: writer.max_bytes)
        self._wake = wake
        self._max_chars = coalesce_max_chars
        self._most_chars = min(MOST_CHARS_AT_ONCE, MOST_CHUNKS_AT_ONCE * coalesce_max_chars)
        self._coalescer = Coalescer()
        self._flow = FlowControl(min_interval_s=coalesce_min_s)
        self._active_streams = active_streams
        self._lock = threading.Lock()
        self._published: dict[TextKind, list[str]] = {"content": [], "reasoning": []}
        self._chunks: list[Chunk] = []
        self._told_calls = False
        self._settles = False
        self._alarm: Timer | None = None
        self.overflowed = False
        """The outbox did not take an event: the chunks end there, whatever the engine has said since."""
        self.withheld = False
        """No chunk is told; see `withhold_text`."""
        self._closed = False
        self._holds = 0
        self._held: list[tuple[bytes, Callable[[bool], None] | None, Share]] = []

    # --- what waits for the journal ------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Keep events back until `release`: the journal has to have something first. May be called several times."""
        with self._lock:
            self._holds += 1

    def release(self) -> None:
        """The journal has it: what was kept back goes out, in order."""
        with self._lock:
            self._holds -= 1
            if self._holds == 0:
                held, self._held = self._held, []
                for place, (payload, on_done, share) in enumerate(held):
                    if self._hand_over(payload, on_done, share) != "queued" and self.overflowed:
                        self._untell([payload for payload, _, _ in held[place:]])
                        return

    def withdraw(self) -> None:
        """The journal does not have it, and nobody has heard of this request: what was kept back is forgotten."""
        with self._lock:
            self._closed = True
            self._held.clear()
            self._writer.next_seq = self.chunks = self._flow.sent = self._flow.acked = 0
            self._published = {"content": [], "reasoning": []}
            self._chunks.clear()
            self._told_calls = False
            self.first_chunk_at = None

    def withhold_text(self) -> None:
        """The journal could not note that the stream begins: after a crash the request would start again, and another text
        follow on the first. So no chunk is told, and the terminal event tells everything."""
        with self._lock:
            if self._writer.next_seq and not self._holds:
                return  # too late
            self.withheld = True
            chunks = [held for held in self._held if held[0].startswith(_CHUNK)]
            self._held = [held for held in self._held if not held[0].startswith(_CHUNK)]
            self._untell([payload for payload, *_ in chunks])

    # --- what is not a chunk -------------------------------------------------------------------------------------------

    def queued(self, *, position: int, reason: str, again: bool = False, share: Share = "event") -> None:
        """Say that the request waits; `again` when it waits after its start, because the engine went away."""
        with self._lock:
            if self._may("queued") and (again or self._writer.phase in ("new", "waiting")):
                self._publish(self._writer.queued(position=position, reason=reason), share=share)

    def start(self, fields: Mapping[str, Any]) -> None:
        with self._lock:
            if self._may("start"):
                self._look_at_limit()
                self._publish(self._writer.start(fields))

    def progress(self, *, processed: int, total: int, cached: int) -> None:
        with self._lock:
            if self._may("progress"):
                self._publish(self._writer.progress(processed=processed, total=total, cached=cached))

    def ping(self, *, state: str) -> None:
        with self._lock:
            if self._may("ping"):
                self._publish(self._writer.ping(state=state))

    def snapshot(self) -> bool:
        """Tell what was published so far to a client that sent its request again; False when nothing may be told now.

        What does not fit into one event is told in the chunks that it was told in.
        """
        with self._lock:
            if not self._may("snapshot"):
                return False
            content, reasoning = ("".join(self._published[kind]) for kind in ("content", "reasoning"))
            self._look_at_limit()
            snapshot = self._writer.snapshot(content=content, reasoning=reasoning)
            if omits_text(snapshot) and self._chunks:
                self._repeat_chunks()
            else:
                self._publish(snapshot, share="answer")
            return True

    def _repeat_chunks(self) -> None:
        """Publish all chunks again, as far as there is place for them: whoever misses the rest asks again."""
        if self._holds:
            return  # the first of them are only about to go out
        ids = {"request_id": self._writer.request_id, "session_id": self._writer.session_id}
        for payload in written(self._chunks, **ids):
            published = self._outbox.publish(self.topic, payload, correlation=self._correlation, share="answer")
            if published != "queued":
                return

    def chunk_record(self) -> bytes | None:
        """What the chunks said and where one ended, for the journal; None when there were none."""
        with self._lock:
            return packed(self._chunks) if self._chunks else None

    def _may(self, kind: Any) -> bool:
        return self._tells() and self._writer.allows(kind)

    def _tells(self) -> bool:
        return not (self.silent or self._closed or self.overflowed)

    # --- chunks --------------------------------------------------------------------------------------------------------

    def text(self, kind: TextKind, text: str) -> None:
        """New text as it is generated: published at once, or as soon as the broker has taken the pieces before it."""
        with self._lock:
            self._coalescer.feed(kind, text)
            if not self._settles:
                self._send_waiting(time.monotonic())

    def tool_call(self, delta: dict[str, Any]) -> None:
        """A new piece of a tool call; as `text`."""
        with self._lock:
            self._coalescer.feed_call(delta)
            if not self._settles:
                self._send_waiting(time.monotonic())

    def settle(self, *, pieces: int = 0) -> float:
        """What came together may go out as one; gives the seconds for which reading on is of no use.

        What the engine says meanwhile collects in its socket, where it costs nothing: it could not be published before the
        broker has acknowledged anyway, and one read then takes all of it. Once called, `text` only collects.
        `pieces` are the tokens that came with the last read: where there are several, the engine is so quick that its next text is
        there before it may go.
        """
        with self._lock:
            self._settles = True
            self._flow.share(self._active_streams(), pieces)
            now = time.monotonic()
            if not self._send_waiting(now):
                return self._flow.rest_s(now)
            # Of a slow engine the next token may go at once.
            return self._flow.after_sending_s() if pieces > 1 else 0.0

    def piece(self, kind: TextKind, text: str) -> None:
        """A piece that is published as it is (paced and sentence modes), after what was generated before it: now, unless the
        broker has left too many before it unacknowledged."""
        with self._lock:
            self._coalescer.feed_apart(kind, text)
            if self._flow.may_send_apart():  # else an acknowledgement lets it go
                self._flush(time.monotonic(), self._most_chars, MOST_CHUNKS_AT_ONCE)

    def tool_calls(self, deltas: Sequence[Mapping[str, Any]]) -> None:
        """Whole tool calls, published as they are, now (paced modes)."""
        with self._lock:
            self._tell_calls(deltas)

    def flush(self) -> None:
        """Publish whatever text waits, before the terminal event."""
        with self._lock:
            self._flush(time.monotonic())

    def close_text(self, *, content: str, reasoning: str, catch_up: bool) -> Told:
        """The end of all chunks; returns what was told, which is what the terminal event and the history may hold.

        `catch_up`: what the answer has beyond the pieces so far is published first (a sentence that was cut short, an answer
        that was to be paced). Where there are no chunks, the terminal event tells everything.
        """
        with self._lock:
            self._flush(time.monotonic())
            if self.silent or self.withheld:
                told = Told(content, reasoning, calls=True)
            else:
                if catch_up:
                    self._tell("reasoning", reasoning[sum(map(len, self._published["reasoning"])) :])
                    self._tell("content", content[sum(map(len, self._published["content"])) :])
                told = Told(
                    "".join(self._published["content"]), "".join(self._published["reasoning"]), self._told_calls
                )
            self._closed = True
            return told

    def unacknowledged(self) -> int:
        return self._flow.in_flight()

    def _send_waiting(self, now: float) -> bool:
        """Publish what waits, if it may go; True when nothing is left."""
        coalescer = self._coalescer
        if not coalescer.waiting:
            return True
        if self._flow.may_send(now):
            self._flush(now, self._most_chars, MOST_CHUNKS_AT_ONCE)
            return not coalescer.waiting
        due_in_s = self._flow.due_in_s(now)
        if due_in_s is not None and self._alarm is None:
            self._alarm = self._wake(due_in_s + _AFTER_READER_S, self._send_later)
        return False

    def _send_later(self) -> None:
        with self._lock:
            self._alarm = None
            self._send_waiting(time.monotonic())

    def _flush(self, now: float, most_chars: int = ALL, most_pieces: int = ALL) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        pieces = self._coalescer.take(most_chars, most_pieces)
        if pieces:
            self._flow.sent_at = now
        for piece in pieces:
            if piece[0] == "tool_calls":
                self._tell_calls(piece[1])
                continue
            kind, text = piece
            for start in range(0, len(text), self._max_chars):
                self._tell(kind, text[start : start + self._max_chars])

    def _tell(self, kind: TextKind, text: str) -> None:
        if not text or self.silent or self._closed or self.overflowed or self.withheld:
            return
        if len(text) > _SURELY_FITS_CHARS:
            self._look_at_limit()
        payloads = self._writer.chunks(kind, text)
        self._published[kind].append(text)
        if len(payloads) == 1:
            self._chunks.append((kind, text))
        else:
            self._chunks += recorded(kind, text, payloads)
        self._publish_chunks(payloads)

    def _tell_calls(self, deltas: Sequence[Mapping[str, Any]]) -> None:
        if self._tells() and not self.withheld:
            self._look_at_limit()
            self._told_calls = True
            payloads = self._writer.tool_calls(deltas)
            self._chunks += recorded("tool_calls", list(deltas), payloads)
            self._publish_chunks(payloads)

    def _look_at_limit(self) -> None:
        # Not once for each request: a broker may come back with a smaller limit.
        self._writer.max_bytes = self._max_event_bytes()

    def _publish_chunks(self, payloads: Sequence[bytes]) -> None:
        self._flow.sent += len(payloads)
        self.chunks = self._writer.next_seq
        for place, payload in enumerate(payloads):
            if self._publish(payload, self._chunk_done) != "queued":
                self._untell(payloads[place:])
                return
            if self.first_chunk_at is None:
                self.first_chunk_at = self.last_event_at

    def _untell(self, payloads: Sequence[bytes]) -> None:
        """The outbox took none of these: their chunks have no number, and what they say was not told."""
        events = map(orjson.loads, payloads)
        chunks = [event for event in events if event["type"] == "chunk"]
        self._flow.sent -= len(chunks)
        self._writer.next_seq -= len(chunks)
        del self._chunks[self._writer.next_seq :]
        self.chunks = self._writer.next_seq
        if not self.chunks:
            self.first_chunk_at = None
        for kind, told in self._published.items():
            lost = sum(len(chunk.get(kind, "")) for chunk in chunks)
            text = "".join(told)
            self._published[kind] = [text[: len(text) - lost]]
        if any("tool_calls" in chunk for chunk in chunks):
            self._told_calls = False

    def _chunk_done(self, _delivered: bool) -> None:
        # The link's thread: count, and leave the work to another one.
        self._flow.acknowledge(time.monotonic())
        if self._coalescer.waiting:
            self._wake(0.0, self._send_later)

    def close(self) -> None:
        """Publish nothing more."""
        with self._lock:
            self._closed = True

    # --- the end -------------------------------------------------------------------------------------------------------

    def done(self, fields: Mapping[str, Any]) -> bytes:
        """Close the stream with `done`; returns the event, to be stored and then published.

        The text of an answer without chunks is whole in it, however long.
        """
        with self._lock:
            self._end()
            return self._writer.done(fields, whole=self.silent or self.withheld)

    def error(self, *, code: str, message: str, retryable: bool, details: Mapping[str, Any]) -> bytes:
        """Close the stream with `error`; as `done`."""
        with self._lock:
            self._end()
            return self._writer.error(
                code=code, message=message, retryable=retryable, details=details, whole=self.silent or self.withheld
            )

    def _end(self) -> None:
        self._flush(time.monotonic())
        self._closed = True
        self._look_at_limit()

    def _publish(
        self, payload: bytes, on_done: Callable[[bool], None] | None = None, share: Share = "event"
    ) -> Published:
        self.last_event_at = time.monotonic()
        if self._holds:
            self._held.append((payload, on_done, share))
            return "queued"
        return self._hand_over(payload, on_done, share)

    def _hand_over(self, payload: bytes, on_done: Callable[[bool], None] | None, share: Share) -> Published:
        published = self._outbox.publish(
            self.topic, payload, correlation=self._correlation, on_done=on_done, share=share
        )
        # What answers a request that was sent again may get lost: its client asks once more. In the stream it would be a hole.
        if published != "queued" and share == "event" and not self.overflowed:
            self.overflowed = True
            self.on_overflow()
        return published
