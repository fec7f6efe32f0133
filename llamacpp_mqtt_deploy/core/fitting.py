"""Makes a stored terminal event fit what the broker takes now: text that no chunk told goes out in chunks before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import orjson

from llamacpp_mqtt_deploy.core.events import EventWriter, shrunk, without_text

# Chunks made from an end have one of two sizes, whatever the limit is: the same request sent again after the limit changed
# a little gets them with the same borders, and a client that has some of them can go on with the others.
_SMALL_BYTES = 1024
_LARGE_BYTES = 16 * 1024

_Piece = tuple[Literal["content", "reasoning"], str] | tuple[Literal["tool_calls"], list[dict[str, Any]]]


def fitted(terminal: bytes, max_bytes: int) -> list[bytes]:
    """The events to publish for a stored end, in this order: the end alone, or chunks that tell its text and the end without.

    Text that chunks have told already (`seq` is over 0) is left out, and so is, at last, what the client knows anyway.
    """
    if len(terminal) <= max_bytes:
        return [terminal]
    event = orjson.loads(terminal)
    untold = _pieces(event) if event.get("seq") == 0 else []
    return _written(untold, 0, event, max_bytes)


def refitted(unsent: Sequence[bytes], first_seq: int, max_bytes: int) -> list[bytes]:
    """The rest of what `fitted` made, for a limit that shrank after the chunks below `first_seq` had gone."""
    *chunks, terminal = map(orjson.loads, unsent)
    untold: list[_Piece] = [(kind, chunk[kind]) for chunk in chunks for kind in _KINDS if kind in chunk]
    return _written(untold, first_seq, terminal, max_bytes)


_KINDS: tuple[Any, ...] = ("reasoning", "content", "tool_calls")


def _written(untold: Sequence[_Piece], first_seq: int, terminal: dict[str, Any], max_bytes: int) -> list[bytes]:
    if not untold:
        return [shrunk(terminal, max_bytes)]
    writer = EventWriter(
        request_id=terminal["request_id"],
        session_id=terminal["session_id"],
        max_bytes=_LARGE_BYTES if max_bytes >= _LARGE_BYTES else min(max_bytes, _SMALL_BYTES),
    )
    writer.next_seq = first_seq
    chunks: list[bytes] = []
    for piece in untold:
        chunks += writer.tool_calls(piece[1]) if piece[0] == "tool_calls" else writer.chunks(piece[0], piece[1])
    return [*chunks, shrunk(without_text(terminal) | {"seq": writer.next_seq}, max_bytes)]


def _pieces(event: dict[str, Any]) -> list[_Piece]:
    """The text of an end as chunks tell it: reasoning, then the answer, then the tool calls."""
    message = event["message"] if event["type"] == "done" and "message" in event else {}
    called = message.get("tool_calls") or ()
    calls = [{"index": index, "id": call["id"], **call["function"]} for index, call in enumerate(called)]
    content = event.get("full_content", event.get("partial_content")) or ""
    pieces: list[_Piece] = [("reasoning", event.get("full_reasoning") or ""), ("content", content)]
    return [piece for piece in (*pieces, ("tool_calls", calls)) if piece[1]]  # type: ignore[misc]
