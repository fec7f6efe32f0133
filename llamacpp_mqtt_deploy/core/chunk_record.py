"""The chunks of an answer as they are kept: what each one said, so that they can be published again as they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import orjson

from llamacpp_mqtt_deploy.core.events import encode

ChunkKind = Literal["content", "reasoning", "tool_calls"]
Chunk = tuple[ChunkKind, Any]
"""A kind and its text or deltas. Its place in the record is its number."""

_KINDS: tuple[ChunkKind, ...] = ("content", "reasoning", "tool_calls")


def recorded(kind: ChunkKind, value: Any, payloads: Sequence[bytes]) -> list[Chunk]:
    """What these chunk events, written for one value, say one by one."""
    if len(payloads) == 1:
        return [(kind, value)]
    return [(kind, orjson.loads(payload)[kind]) for payload in payloads]


def written(chunks: Sequence[Chunk], *, request_id: str, session_id: str) -> list[bytes]:
    """The chunk events, byte for byte as they were published."""
    head = {"type": "chunk", "request_id": request_id, "session_id": session_id}
    return [encode(head | {"seq": seq, kind: value}) for seq, (kind, value) in enumerate(chunks)]


def packed(chunks: Iterable[Chunk]) -> bytes:
    """The record as the journal keeps it."""
    return encode({"chunks": [(_KINDS.index(kind), value) for kind, value in chunks]})


def unpacked(record: bytes) -> list[Chunk]:
    """The mirror of `packed`; raises ValueError for what is no record."""
    try:
        return [(_KINDS[kind], value) for kind, value in orjson.loads(record)["chunks"]]
    except (KeyError, IndexError, TypeError) as error:
        message = "this is no record of chunks"
        raise ValueError(message) from error


def omits_text(terminal: bytes) -> bool:
    """Whether a terminal event says that it comes without the answer. Quotes in a text are escaped, so that none can say so."""
    return b'"content_omitted":true' in terminal
