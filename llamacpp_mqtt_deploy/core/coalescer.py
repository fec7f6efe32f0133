"""Fewer pieces out, no character lost: text waits while an earlier piece has not been acknowledged."""

from __future__ import annotations

from typing import Any, Literal

TextKind = Literal["content", "reasoning"]
ChunkKind = Literal["content", "reasoning", "tool_calls"]
Piece = tuple[TextKind, str] | tuple[Literal["tool_calls"], list[dict[str, Any]]]
"""What goes out as one chunk (a text over the limits as several)."""


class Coalescer:
    """Collects deltas of one stream and says when they may go out.

    The first piece goes at once. After it one piece at a time: while `in_flight` pieces are unacknowledged the text
    collects, so that a slow broker gets fewer, larger chunks instead of a growing queue. `min_interval_s` adds a pause
    between pieces. Text of another kind (reasoning, then content) is kept apart, in order.
    """

    __slots__ = ("_parts", "in_flight", "last_sent", "min_interval_s")

    def __init__(self, *, min_interval_s: float = 0.0) -> None:
        self.min_interval_s = min_interval_s
        self.in_flight = 0
        self.last_sent: float | None = None
        self._parts: list[tuple[ChunkKind, list[Any]]] = []

    def __bool__(self) -> bool:
        """True while text waits."""
        return bool(self._parts)

    def feed(self, kind: TextKind, text: str) -> None:
        if self._parts and self._parts[-1][0] == kind:
            self._parts[-1][1].append(text)
        else:
            self._parts.append((kind, [text]))

    def feed_call(self, delta: dict[str, Any]) -> None:
        """A piece of a tool call, as its chunk tells it; arguments of the same call are joined."""
        if not self._parts or self._parts[-1][0] != "tool_calls":
            self._parts.append(("tool_calls", [delta]))
            return
        deltas = self._parts[-1][1]
        if deltas[-1]["index"] == delta["index"] and not ("id" in delta or "name" in delta):
            deltas[-1] = deltas[-1] | {"arguments": deltas[-1]["arguments"] + delta["arguments"]}
        else:
            deltas.append(delta)

    def ready(self, now: float) -> bool:
        """Whether the waiting text may go out now."""
        if not self._parts:
            return False
        if self.last_sent is None:
            return True
        return self.in_flight == 0 and now - self.last_sent >= self.min_interval_s

    def due_in_s(self, now: float) -> float | None:
        """Seconds until the pause is over, when only the pause holds the text back; else None."""
        if not self._parts or self.in_flight or self.last_sent is None:
            return None
        return max(0.0, self.last_sent + self.min_interval_s - now)

    def pause_s(self, now: float) -> float:
        """Seconds until the next piece may go, as far as the minimum interval says."""
        return 0.0 if self.last_sent is None else max(0.0, self.last_sent + self.min_interval_s - now)

    def take(self, now: float) -> list[Piece]:
        """All that waits, in order; the caller publishes it and counts the pieces into `in_flight`."""
        pieces: list[Piece] = []
        for kind, items in self._parts:
            if kind == "tool_calls":
                pieces.append((kind, items))
            else:
                pieces.append((kind, items[0] if len(items) == 1 else "".join(items)))
        self._parts.clear()
        if pieces:
            self.last_sent = now
        return pieces
