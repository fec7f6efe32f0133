"""A flood of messages at QoS 0: most of it is dropped unread, so that all else comes through.

A client can publish as many at QoS 0 as its broker takes, ten times what is read here in that time. What is not read stays with the
broker, PUBACKs and everybody's requests behind it; and mosquitto drops from a queue that is full, PUBACKs too: then nothing goes out
any more until the connection is given up.
"""

from __future__ import annotations

from collections import Counter

_PUBLISH_QOS_0 = 0x30
_TYPE_QOS_RETAIN = 0xF7
"""Of a packet's first byte all but DUP, which says nothing at QoS 0. A message that the broker has kept is none of a flood."""

FREE_MESSAGES = 1000
FREE_BYTES = 16 * 1024 * 1024
"""So much passes when it begins: a burst that the inbox has places for."""
CALM_MESSAGES = 64
"""A read that brings no more of them does not prolong it."""
CALM_S = 1.0
"""It is over when for so long no read brought more of them, or as much as it may."""
WINDOW_S = 0.1
IN_WINDOW = 64
BYTES_IN_WINDOW = 4 * 1024 * 1024
OF_OWNER_IN_WINDOW = 4
BYTES_OF_OWNER_IN_WINDOW = 1024 * 1024
"""What passes in so many seconds: of all, and of each owner, whose first message passes whatever its size."""


class Thinning:
    """Notices a flood by what is read, and thins it out. Pure; the caller brings the time (monotonic seconds).

    Messages at QoS 0 that are not retained are dropped, but for some of each owner, who is named by so many topic levels. Every other
    packet is kept. A read that brings as much as it may is the sign that more comes than is read.
    """

    def __init__(self, owner_levels: int) -> None:
        self._owner_levels = owner_levels
        self.is_on = False
        """Whether there is a flood; to be read only."""
        self._until = 0.0
        self._free = self._free_bytes = 0
        self._window_ends = 0.0
        self._passed: Counter[bytes] = Counter()
        self._bytes: Counter[bytes] = Counter()
        self._passed_in_all = self._bytes_in_all = 0
        self.dropped = 0
        """How many messages since `told` was asked last."""
        self._example = b""

    def note_read(self, *, full: bool, now: float) -> None:
        """The socket was read, and `full` says whether that brought as much as it may."""
        if self.is_on and full:
            self._until = now + CALM_S
        elif self.is_on:
            self.is_on = now < self._until
        elif full:
            self.is_on, self._until = True, now + CALM_S
            self._free, self._free_bytes = FREE_MESSAGES, FREE_BYTES

    def told(self) -> tuple[int, bytes]:
        """How many messages were dropped since this was asked last, and the topic of one of them."""
        dropped, self.dropped = self.dropped, 0
        return dropped, self._example

    def thinned(self, raw: bytes, now: float) -> tuple[bytes, int]:
        """What is left of these packets, the first of which begins where the bytes do, and how many of the bytes that follow belong to
        a message that was dropped and is not whole."""
        if now >= self._window_ends:
            self._window_ends = now + WINDOW_S
            self._passed.clear()
            self._bytes.clear()
            self._passed_in_all = self._bytes_in_all = 0
        kept: list[bytes] = []
        size, at, from_, seen, gone = len(raw), 0, 0, 0, 0
        last = (0, 0)
        while at + 2 <= size:
            body = _body(raw, at)
            if body is None:
                break
            start, end = body
            if end > size and not _has_topic(raw, start):
                break
            if raw[at] & _TYPE_QOS_RETAIN == _PUBLISH_QOS_0:
                seen += 1
                if not self._passes(raw, start, end):
                    gone += 1
                    kept.append(raw[from_:at])
                    from_ = end
                    last = start, end
            at = end
        if seen > CALM_MESSAGES:
            self._until = now + CALM_S
        if not gone:
            return raw, 0
        self.dropped += gone
        self._example = _topic(raw, *last)
        kept.append(raw[from_:])
        return b"".join(kept), max(0, from_ - size)

    def _passes(self, raw: bytes, start: int, end: int) -> bool:
        size = end - start
        if self._free and self._free_bytes >= size:
            self._free -= 1
            self._free_bytes -= size
            return True
        if self._passed_in_all >= IN_WINDOW or self._bytes_in_all >= BYTES_IN_WINDOW:
            return False
        owner = b"/".join(_topic(raw, start, end).split(b"/", self._owner_levels)[: self._owner_levels])
        before = self._passed[owner]
        if before and (before >= OF_OWNER_IN_WINDOW or self._bytes[owner] + size > BYTES_OF_OWNER_IN_WINDOW):
            return False
        self._passed[owner] += 1
        self._bytes[owner] += size
        self._passed_in_all += 1
        self._bytes_in_all += size
        return True


def _body(raw: bytes, at: int) -> tuple[int, int] | None:
    """Where the packet's body begins and ends, which may be beyond the bytes; None where its length is not there, or is none."""
    length, start = raw[at + 1], at + 2
    if length >= 0x80:
        length &= 0x7F
        for shift in (7, 14, 21):
            if start >= len(raw):
                return None
            more = raw[start]
            length |= (more & 0x7F) << shift
            start += 1
            if more < 0x80:
                break
        else:
            return None
    return start, start + length


def _has_topic(raw: bytes, start: int) -> bool:
    """Whether the topic of a PUBLISH with this body is there, though its end is not."""
    return start + 2 <= len(raw) and start + 2 + (raw[start] << 8 | raw[start + 1]) <= len(raw)


def _topic(raw: bytes, start: int, end: int) -> bytes:
    """The topic of the PUBLISH with this body, as far as it is there."""
    topic_end = start + 2 + (raw[start] << 8 | raw[start + 1]) if start + 2 <= end else start
    return raw[start + 2 : min(topic_end, end)]
