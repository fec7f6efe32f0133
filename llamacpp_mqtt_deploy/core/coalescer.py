"""Joins the deltas of a stream that wait to go out: fewer chunks, no character lost, every kind in its order."""

from __future__ import annotations

from typing import Any, Literal

TextKind = Literal["content", "reasoning"]
ChunkKind = Literal["content", "reasoning", "tool_calls"]
Piece = tuple[TextKind, str] | tuple[Literal["tool_calls"], list[dict[str, Any]]]
"""What goes out as one chunk (a text over the limits as several)."""

ALL = 1 << 62
"""No limit to what is taken."""


class Coalescer:
    """Collects deltas of one stream until they may go out (`core/flow.py`): fewer, larger chunks instead of a growing queue.

    Text of another kind (reasoning, then content) is kept apart, in order.
    """

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: list[tuple[ChunkKind, list[Any]]] = []
        """What waits, in order; to be read only. Texts are joined when they are taken, or each piece would copy all before it."""

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def feed(self, kind: TextKind, text: str) -> None:
        if self.waiting and self.waiting[-1][0] == kind:
            self.waiting[-1][1].append(text)
        else:
            self.waiting.append((kind, [text]))

    def feed_apart(self, kind: TextKind, text: str) -> None:
        """Text that is not joined to what was fed before it: a sentence."""
        self.waiting.append((kind, [text]))

    def feed_call(self, delta: dict[str, Any]) -> None:
        """A piece of a tool call, as its chunk tells it; arguments of the same call are joined."""
        if not self.waiting or self.waiting[-1][0] != "tool_calls":
            self.waiting.append(("tool_calls", [(delta, [delta["arguments"]])]))
            return
        calls = self.waiting[-1][1]
        opened, arguments = calls[-1]
        if opened["index"] == delta["index"] and not ("id" in delta or "name" in delta):
            arguments.append(delta["arguments"])
        else:
            calls.append((delta, [delta["arguments"]]))

    def take(self, most_chars: int = ALL, most_pieces: int = ALL) -> list[Piece]:
        """What waits, in order, up to so much of it: the rest stays, and a text is cut only when it is too long by itself."""
        pieces: list[Piece] = []
        left = most_chars
        for place, (kind, items) in enumerate(self.waiting):
            if len(pieces) >= most_pieces:
                del self.waiting[:place]
                return pieces
            if kind == "tool_calls":
                pieces.append((kind, [call | {"arguments": "".join(arguments)} for call, arguments in items]))
                continue
            text = items[0] if len(items) == 1 else "".join(items)
            if len(text) > left:
                if not pieces:
                    pieces.append((kind, text[:left]))
                    text = text[left:]
                self.waiting[: place + 1] = [(kind, [text])]
                return pieces
            left -= len(text)
            pieces.append((kind, text))
        self.waiting.clear()
        return pieces
