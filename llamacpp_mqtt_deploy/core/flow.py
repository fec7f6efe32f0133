"""When a stream may send its next chunk: as fast as the broker acknowledges, and no oftener than its share of the worker allows."""

from __future__ import annotations

KEEP_UP_S = 0.04
"""How long a reader lets the broker keep up before it reads on: far above a round trip in a local network, far below what a
cancel or the engine's own buffers would notice."""

MANY_PIECES = 8
"""A chunk of so many tokens comes from an engine that is far quicker than anybody reads."""

SHORTEST_REST_S = 0.001
"""A rest that is shorter costs more turns of the loop than it brings."""

MOST_IN_FLIGHT = 32
"""Sentences of one stream that may go out before the broker has acknowledged the first of them: enough for any network, and some
ten kilobytes of the outbox."""

MOST_CHUNKS_AT_ONCE = 256
MOST_CHARS_AT_ONCE = 262_144
"""What one stream hands to the outbox at once of a text that has waited for a slow broker; the rest follows when that is
acknowledged, so that no stream fills the outbox by itself."""


class FlowControl:
    """The pace of one stream. The first chunk goes at once; after it one at a time, the next when all before it are acknowledged.

    `min_interval_s` is the shortest pause between two chunks, and the usual one of a stream that is alone. The longer pauses of
    many streams, and of quick ones, end on common moments, the multiples of `interval_s`, so that their chunks share a packet of
    the network, as their acknowledgements then do: 8 streams cost a third less processor time so, the broker's and the clients'
    not counted. `sent` and `acked` have one writer each, so that no acknowledgement has to wait for a lock.
    """

    __slots__ = ("acked", "interval_s", "min_interval_s", "round_trip_s", "sent", "sent_at")

    def __init__(self, *, min_interval_s: float = 0.0) -> None:
        self.min_interval_s = min_interval_s
        self.interval_s = min_interval_s
        self.sent = 0
        self.acked = 0
        self.sent_at: float | None = None
        """When the latest chunk of generated text went out."""
        self.round_trip_s = SHORTEST_REST_S
        """How long the broker takes to acknowledge, smoothed."""

    def share(self, streams: int, pieces: int = 0) -> None:
        """Many streams at once share what a few may take of processor, broker and clients: up to seven go at full pace, eight at
        half of it (50 chunks a second each by default, more than anybody can see).

        `pieces` are the tokens that came since the last chunk: where they are many, half as many chunks tell as much. In a pause
        that is twice as long twice as many come, so that no stream wavers between the two.
        """
        self.interval_s = self.min_interval_s * max(1, streams // 4) * (2 if pieces >= MANY_PIECES else 1)

    def in_flight(self) -> int:
        """Chunks that are not acknowledged."""
        return self.sent - self.acked

    def acknowledge(self, now: float) -> None:
        """One more chunk has arrived at the broker."""
        self.acked += 1
        if self.sent_at is not None:
            self.round_trip_s += (now - self.sent_at - self.round_trip_s) / 4

    def may_send_apart(self) -> bool:
        """Whether one more piece may go out beside those that are not acknowledged: sentences wait for none of them, up to a number."""
        return self.in_flight() < MOST_IN_FLIGHT

    def may_send(self, now: float) -> bool:
        """Whether a chunk may go out now."""
        return self.sent_at is None or (self.sent == self.acked and now >= self._due_at(self.sent_at))

    def due_in_s(self, now: float) -> float | None:
        """Seconds until the next chunk may go, when only the pause holds it back; None when an acknowledgement is awaited."""
        if self.sent_at is None:
            return 0.0
        return max(0.0, self._due_at(self.sent_at) - now) if self.sent == self.acked else None

    def _due_at(self, sent_at: float) -> float:
        soonest = sent_at + self.min_interval_s
        interval_s = self.interval_s
        return (
            soonest if interval_s <= self.min_interval_s else max(soonest, (sent_at // interval_s + 1.0) * interval_s)
        )

    def after_sending_s(self) -> float:
        """For how long reading on is of no use after a chunk was sent, where more text is sure to come in that time."""
        return min(self.interval_s, KEEP_UP_S)

    def rest_s(self, now: float) -> float:
        """For how long reading on is of no use, when text waits: it could not be sent before."""
        due_in_s = self.due_in_s(now)
        if due_in_s is None:
            # As long as usual, then as long again as it has taken: a broker that hangs costs no processor time.
            waited_s = 0.0 if self.sent_at is None else now - self.sent_at
            due_in_s = max(self.round_trip_s, waited_s, SHORTEST_REST_S)
        return min(due_in_s, KEEP_UP_S)
