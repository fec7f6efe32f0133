"""The events of one request: their legal order as one table, the writer that keeps to it, and its mirror, the reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

PROTOCOL = 1

Phase = Literal["new", "waiting", "open", "streaming", "ended"]
EventType = Literal["queued", "start", "progress", "chunk", "ping", "snapshot", "done", "error"]

ORDER: Mapping[Phase, Mapping[EventType, Phase]] = {
    # A chunk as the first event: the answer to `stream: false` that does not fit into its `done`, told in front of it.
    "new": {"queued": "waiting", "start": "open", "chunk": "streaming", "done": "ended", "error": "ended"},
    "waiting": {"queued": "waiting", "ping": "waiting", "start": "open", "done": "ended", "error": "ended"},
    "open": {
        # The engine went away before the first chunk: the request waits and starts again, unnoticed.
        "queued": "waiting",
        "start": "open",
        "progress": "open",
        "ping": "open",
        "snapshot": "open",
        "chunk": "streaming",
        "done": "ended",
        "error": "ended",
    },
    "streaming": {
        "chunk": "streaming",
        "ping": "streaming",
        "snapshot": "streaming",
        "done": "ended",
        "error": "ended",
    },
    "ended": {},
}
"""What may follow what. Code, tests and docs/protocol.md read this table; there is no other."""

_TEXT_FIELDS = {"done": ("full_content", "full_reasoning", "message"), "error": ("partial_content",)}

# Room in a chunk for everything but its text: type, ids of up to 64 + 129 characters, seq and punctuation.
_CHUNK_OVERHEAD_BYTES = 400


class OutOfOrder(Exception):
    """An event that may not follow the ones before it: a defect of the caller."""


def encode(event: Mapping[str, Any]) -> bytes:
    """One line of compact JSON; lone surrogates become U+FFFD, numbers beyond 64 bits null: no engine should send them."""
    try:
        return orjson.dumps(event)
    except TypeError:
        return orjson.dumps(_scrubbed(event))


def _scrubbed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(item) for item in value]
    return None if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


class EventWriter:
    """Numbers the events of one request and refuses an illegal order; knows nothing of topics or brokers.

    Every method returns the encoded event (`chunk` a list of them). `max_bytes` bounds each event: chunks are cut on
    character borders, a terminal event that is too large comes without the text (`content_omitted`).
    """

    def __init__(self, *, request_id: str, session_id: str, max_bytes: int) -> None:
        self.request_id = request_id
        self.session_id = session_id
        self.max_bytes = max_bytes
        self.phase: Phase = "new"
        self.next_seq = 0

    def _step(self, kind: EventType) -> dict[str, Any]:
        following = ORDER[self.phase].get(kind)
        if following is None:
            msg = f"{kind} may not follow in phase {self.phase} (request {self.request_id})"
            raise OutOfOrder(msg)
        self.phase = following
        return {"type": kind, "request_id": self.request_id, "session_id": self.session_id}

    def allows(self, kind: EventType) -> bool:
        return kind in ORDER[self.phase]

    def queued(self, *, position: int, reason: str) -> bytes:
        return encode(self._step("queued") | {"position": position, "reason": reason})

    def start(self, fields: Mapping[str, Any]) -> bytes:
        event = self._step("start") | {"protocol": PROTOCOL} | dict(fields)
        payload = encode(event)
        return payload if len(payload) <= self.max_bytes else encode(_without_echo(event))

    def progress(self, *, processed: int, total: int, cached: int) -> bytes:
        return encode(self._step("progress") | {"processed": processed, "total": total, "cached": cached})

    def ping(self, *, state: str) -> bytes:
        return encode(self._step("ping") | {"state": state})

    def snapshot(self, *, content: str, reasoning: str) -> bytes:
        """What was published so far; live chunks go on from `next_seq`."""
        event = self._step("snapshot") | {"content": content, "next_seq": self.next_seq}
        if reasoning:
            event["reasoning"] = reasoning
        payload = encode(event)
        if len(payload) > self.max_bytes:
            event.pop("reasoning", None)
            event |= {"content": "", "content_omitted": True}
            payload = encode(event)
        return payload

    def chunks(self, kind: Literal["content", "reasoning"], text: str) -> list[bytes]:
        """The text as one chunk, or as several when it is over `max_bytes`; none when it is empty."""
        if not text:
            return []
        if len(text) * 6 + _CHUNK_OVERHEAD_BYTES <= self.max_bytes:  # 6 bytes: \u0000, the longest escape
            return [self._chunk(kind, text)]
        room = max(16, self.max_bytes - _CHUNK_OVERHEAD_BYTES)
        return [self._chunk(kind, part) for part in split_to_bytes(text, room)]

    def tool_calls(self, deltas: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """The deltas as one chunk, or as several with the arguments cut when they are over `max_bytes`."""
        room = max(16, self.max_bytes - _CHUNK_OVERHEAD_BYTES)
        if len(encode({"": deltas})) <= room:
            return [self._chunk("tool_calls", list(deltas))]
        chunks = []
        for delta in deltas:
            # Id and name are the engine's: a few dozen bytes, said once.
            named = len(encode({**delta, "arguments": ""}))
            parts = split_to_bytes(delta["arguments"], max(16, room - named)) or [""]
            chunks.append(self._chunk("tool_calls", [{**delta, "arguments": parts[0]}]))
            index = delta["index"]
            chunks += [self._chunk("tool_calls", [{"index": index, "arguments": part}]) for part in parts[1:]]
        return chunks

    def _chunk(self, kind: str, value: Any) -> bytes:
        if self.phase != "streaming":
            self._step("chunk")
        event = {
            "type": "chunk",
            "request_id": self.request_id,
            "session_id": self.session_id,
            "seq": self.next_seq,
            kind: value,
        }
        self.next_seq += 1
        return encode(event)

    def done(self, fields: Mapping[str, Any], *, whole: bool = False) -> bytes:
        """The end; `whole` keeps the text of an answer that no chunk told, however long (`fitting` cuts it)."""
        return self._end(self._step("done") | {"seq": self.next_seq, "final": True} | dict(fields), whole=whole)

    def error(
        self, *, code: str, message: str, retryable: bool, details: Mapping[str, Any], whole: bool = False
    ) -> bytes:
        """As `done`."""
        event = self._step("error") | {
            "seq": self.next_seq,
            "final": True,
            "code": code,
            "message": message,
            "retryable": retryable,
            **details,
        }
        return self._end(event, whole=whole)

    def _end(self, event: dict[str, Any], *, whole: bool) -> bytes:
        return encode(event) if whole else shrunk(event, self.max_bytes)


def shrunk(event: dict[str, Any], max_bytes: int) -> bytes:
    """A terminal event that leaves out as much as it has to: its text, the client's own words, long explanations."""
    steps = [without_text, _without_echo, _without_explanation]
    if not any(event.get(name) for name in ("full_content", "full_reasoning", "partial_content")):
        steps[:2] = [_without_echo, without_text]  # an answer without text is complete as long as it says so itself
    payload = encode(event)
    for step in steps:
        if len(payload) <= max_bytes:
            break
        event = step(event)
        payload = encode(event)
    return payload


def without_text(event: dict[str, Any]) -> dict[str, Any]:
    """A terminal event without the answer."""
    text_fields = _TEXT_FIELDS[event["type"]]
    return {name: value for name, value in event.items() if name not in text_fields} | {"content_omitted": True}


def _without_explanation(event: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in event.items() if name != "fields"}
    return kept | ({"message": kept["message"][:200]} if isinstance(kept.get("message"), str) else {})


def _without_echo(event: dict[str, Any]) -> dict[str, Any]:
    """The event for a broker that takes small packets only: what the client has told us it knows already."""
    return {name: value for name, value in event.items() if name not in ("metadata", "warnings")}


def split_to_bytes(text: str, room: int) -> list[str]:
    """Cut text so that each part needs at most `room` bytes as a JSON string, on character borders."""
    parts: list[str] = []
    start = 0
    while start < len(text):
        end = min(len(text), start + room)
        while end - start > 1 and len(orjson.dumps(text[start:end])) - 2 > room:
            excess = len(orjson.dumps(text[start:end])) - 2 - room
            end = max(start + 1, end - max(1, excess // 6))
        parts.append(text[start:end])
        start = end
    return parts


def interrupted(
    *, request_id: str, session_id: str, code: str, message: str, retryable: bool, metadata: Mapping[str, Any] | None
) -> bytes:
    """The end of a request whose worker died: it has no `seq`, because the count of the chunks was lost with it."""
    event: dict[str, Any] = {
        "type": "error",
        "request_id": request_id,
        "session_id": session_id,
        "final": True,
        "code": code,
        "message": message,
        "retryable": retryable,
    }
    if metadata is not None:
        event["metadata"] = dict(metadata)
    return encode(event)


def rejected(*, request_id: str, session_id: str, code: str, message: str) -> bytes:
    """Answers a delivery and ends nothing: the id belongs to another request, or the Response Topic is forbidden."""
    return encode(
        {"type": "rejected", "request_id": request_id, "session_id": session_id, "code": code, "message": message}
    )


# --- the client's side -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Reading:
    """What one event brought that was new to the reader."""

    event: Mapping[str, Any]
    content: str = ""
    reasoning: str = ""
    tool_calls: Sequence[Mapping[str, Any]] = ()


@dataclass(slots=True)
class EventReader:
    """Follows the client rules of the protocol (section 5) for one request.

    `feed` takes decoded events in the order of their arrival, repeated ones included, and returns what is new, or None.
    `hole` becomes true when a chunk is missing: publish the same request again (same id, same bytes); the `snapshot`, the
    repeated chunks or the terminal event that follow fill it. Joined `content` of all readings is the answer. A `done` whose
    text is neither in it nor in the chunks before it ends nothing (`cut_short`): the request is to be published again, too.
    """

    request_id: str
    expects_text: bool = True
    """False where the request asked for an end without text and without chunks."""
    next_seq: int = 0
    content: str = ""
    reasoning: str = ""
    terminal: Mapping[str, Any] | None = None
    hole: bool = False
    cut_short: bool = False
    rejected: Mapping[str, Any] | None = None
    _tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.terminal is not None

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The tool calls so far as OpenAI's assistant message holds them."""
        return [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(self._tool_calls.items())
        ]

    def feed(self, event: Mapping[str, Any]) -> Reading | None:
        if event.get("request_id") != self.request_id or self.ended:
            return None
        match event.get("type"):
            case "chunk":
                return self._chunk(event)
            case "snapshot":
                return self._snapshot(event)
            case "done" | "error":
                return self._end(event)
            case "rejected":
                self.rejected = event
                return Reading(event)
            case "queued" | "start" | "progress" | "ping":
                return Reading(event)
            case _:
                return None

    def _chunk(self, event: Mapping[str, Any]) -> Reading | None:
        seq = event.get("seq")
        if not isinstance(seq, int) or seq < self.next_seq:
            return None
        if seq > self.next_seq:
            self.hole = True
            return None
        self.next_seq = seq + 1
        self.hole = False
        deltas = event.get("tool_calls")
        reading = Reading(
            event,
            content=_text(event, "content"),
            reasoning=_text(event, "reasoning"),
            tool_calls=[delta for delta in deltas if isinstance(delta, Mapping)] if isinstance(deltas, list) else (),
        )
        self.content += reading.content
        self.reasoning += reading.reasoning
        for delta in reading.tool_calls:
            self._merge(delta)
        return reading

    def _merge(self, delta: Mapping[str, Any]) -> None:
        index = delta.get("index", 0)
        if not isinstance(index, int):
            return
        call = self._tool_calls.setdefault(index, {"id": None, "name": None, "arguments": ""})
        call["id"] = call["id"] or delta.get("id")
        call["name"] = call["name"] or delta.get("name")
        call["arguments"] += _text(delta, "arguments")

    def _snapshot(self, event: Mapping[str, Any]) -> Reading | None:
        next_seq = event.get("next_seq")
        if not isinstance(next_seq, int) or next_seq < self.next_seq:
            return None
        if event.get("content_omitted"):
            # Too large to be told again: what is missing stays missing until the terminal event, if it brings the text.
            return Reading(event)
        reading = Reading(
            event,
            content=_news(self.content, _text(event, "content")),
            reasoning=_news(self.reasoning, _text(event, "reasoning")),
        )
        self.content += reading.content
        self.reasoning += reading.reasoning
        self.next_seq = next_seq
        self.hole = False
        return reading

    def _end(self, event: Mapping[str, Any]) -> Reading | None:
        full = event.get("full_content", event.get("partial_content"))
        if not isinstance(full, str) and event.get("type") == "done" and self._lacks_text(event):
            self.hole = self.cut_short = True
            return None
        self.terminal = event
        self.hole = self.cut_short = False
        reading = Reading(event)
        if isinstance(full, str):
            reading.content = _news(self.content, full)
            self.content += reading.content
        full_reasoning = event.get("full_reasoning")
        if isinstance(full_reasoning, str):
            reading.reasoning = _news(self.reasoning, full_reasoning)
            self.reasoning += reading.reasoning
        return reading

    def _lacks_text(self, done: Mapping[str, Any]) -> bool:
        """Whether the text that this end leaves out is not wholly in the chunks that came before it."""
        chunks = done.get("seq")
        if not isinstance(chunks, int) or chunks > self.next_seq:
            return True
        return self.expects_text and chunks == 0


def _text(event: Mapping[str, Any], name: str) -> str:
    """A field that should be text; what another worker made of it must not end the reader's thread."""
    value = event.get(name)
    return value if isinstance(value, str) else ""


def _news(known: str, full: str) -> str:
    """What `full` has beyond `known`; nothing when it does not begin with it (another answer may not be mixed in)."""
    return full[len(known) :] if full.startswith(known) else ""
