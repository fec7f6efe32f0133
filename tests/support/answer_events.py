"""Every legal order of events of one request, for whoever renders them: drawn with hypothesis, written by the worker's own writer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.errors import BY_CODE
from llamacpp_mqtt_deploy.core.events import EventWriter
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.rendering import Occasion

NASTY = '\n\r\u2028\u2029\x85\x0b\x0c\x1c\x00"\\{}[]:data event <|im_end|> 😀é\ufeff'
TEXTS = st.text(st.one_of(st.sampled_from(NASTY), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=12)
NAMES = st.text("abcXYZ_-.0", min_size=1, max_size=8)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), TEXTS)


@dataclass
class Answered:
    """The events, and what they tell in the end. `error` is set when they end with one, or were cancelled."""

    events: list[dict[str, Any]]
    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"
    error: str | None = None

    @property
    def done(self) -> dict[str, Any]:
        return self.events[-1]


def occasion(request_id: str = "r1", session: str = "web/s1", model: str = "demo") -> Occasion:
    return Occasion(
        request_id=request_id, session=session, model=model, now=lambda: datetime(2026, 11, 21, 17, 30, tzinfo=UTC)
    )


def asked(**echo: Any) -> Asked:
    return Asked(request={"messages": []}, streams=True, echo=echo)


def answered(
    *pieces: tuple[str, Any],
    finish: str = "stop",
    error: dict[str, Any] | None = None,
    start: bool = True,
    **done: Any,
) -> Answered:
    """An answer of these pieces: ("content", text), ("reasoning", text), ("tool_calls", deltas)."""
    writer = _Written(start=start)
    for kind, value in pieces:
        writer.piece(kind, value)
    return writer.end(finish=finish, error=error, **done)


class _Written:
    """Writes events and keeps what they tell."""

    def __init__(self, *, start: bool = True, model: str = "demo") -> None:
        self._writer = EventWriter(request_id="r1", session_id="web/s1", max_bytes=131072)
        self.told = Answered([])
        self._calls: dict[int, dict[str, Any]] = {}
        if start:
            self.add(self._writer.start({"model": model, "worker": "w", "created": 1}))

    @property
    def writer(self) -> EventWriter:
        return self._writer

    def add(self, *payloads: bytes) -> None:
        self.told.events += [json.loads(payload) for payload in payloads]

    def piece(self, kind: str, value: Any) -> None:
        if kind == "tool_calls":
            for delta in value:
                call = self._calls.setdefault(delta["index"], {"id": None, "name": None, "arguments": ""})
                call["id"] = call["id"] or delta.get("id")
                call["name"] = call["name"] or delta.get("name")
                call["arguments"] += delta["arguments"]
            self.add(*self._writer.tool_calls(value))
        else:
            setattr(self.told, kind, getattr(self.told, kind) + value)
            self.add(*self._writer.chunks(kind, value))  # type: ignore[arg-type]

    def snapshot(self, lost: int) -> None:
        """A reader that lost the last events was told the text so far instead."""
        if lost:
            del self.told.events[-lost:]
        self.add(self._writer.snapshot(content=self.told.content, reasoning=self.told.reasoning))

    def end(self, *, finish: str, error: dict[str, Any] | None = None, chunks: bool = True, **fields: Any) -> Answered:
        told = self.told
        told.finish = finish
        told.error = error["code"] if error is not None else "cancelled" if finish == "cancelled" else None
        told.calls = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(self._calls.items())
        ]
        if error is not None:
            self.add(self._writer.error(**error))
        else:
            self.add(self._writer.done(self._done(finish, **fields)))
        if not chunks:
            told.events = [event for event in told.events if event["type"] not in ("chunk", "snapshot")]
        return told

    def _done(self, finish: str, *, omitted: bool = False, **fields: Any) -> dict[str, Any]:
        told = self.told
        message: dict[str, Any] = {"role": "assistant", "content": told.content or (None if told.calls else "")}
        if told.calls:
            message["tool_calls"] = told.calls
        text: dict[str, Any] = {"full_content": told.content, "message": message}
        if told.reasoning:
            text["full_reasoning"] = told.reasoning
        return {
            **({"content_omitted": True} if omitted else text),
            "finish_reason": finish,
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, "cached_tokens": 4},
            "timings": {"queue_ms": 1.5, "first_token_ms": 20.0, "total_ms": 50.25},
            "dropped_messages": 0,
            **fields,
        }


# --- every legal order -----------------------------------------------------------------------------------------------


@st.composite
def _call_deltas(draw: st.DrawFn, index: int) -> list[dict[str, Any]]:
    """One call: its id and name first, its arguments (an object) cut anywhere."""
    arguments = json.dumps(draw(st.dictionaries(TEXTS, VALUES, max_size=2)), ensure_ascii=draw(st.booleans()))
    cuts = sorted(draw(st.lists(st.integers(0, len(arguments)), max_size=4)))
    parts = [arguments[a:b] for a, b in zip([0, *cuts], [*cuts, len(arguments)], strict=True)]
    first = {"index": index, "id": f"call{index}", "name": draw(NAMES), "arguments": parts[0]}
    return [first, *({"index": index, "arguments": part} for part in parts[1:])]


@st.composite
def _pieces(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Text, thinking and calls in any mixture; what belongs to one call keeps its order."""
    kinds = st.sampled_from(["content", "content", "reasoning"])
    texts: list[tuple[str, Any]] = draw(st.lists(st.tuples(kinds, TEXTS), max_size=8))
    calls = [draw(_call_deltas(index)) for index in range(draw(st.integers(0, 3)))]
    queues: list[list[tuple[str, Any]]] = [texts, *([("tool_calls", [delta]) for delta in call] for call in calls)]
    mixed: list[tuple[str, Any]] = []
    while any(queues):
        chosen = draw(st.sampled_from([queue for queue in queues if queue]))
        mixed.append(chosen.pop(0))
    return mixed


_ERRORS = st.builds(
    lambda code, message, details: {
        "code": code,
        "message": message,
        "retryable": BY_CODE[code].retryable,
        "details": details,
    },
    st.sampled_from(sorted(BY_CODE)),
    TEXTS,
    st.sampled_from(
        [{}, {"retry_after_s": 2.5}, {"fields": {"max\ntokens": "a number"}}, {"n_prompt_tokens": 9000, "n_ctx": 4096}]
    ),
)


@st.composite
def answers(draw: st.DrawFn) -> Answered:
    """Any answer: queued or not, started or not, begun anew, with pings anywhere, with lost chunks made good by a snapshot or by
    the end, ended well or not."""
    written = _Written(start=False)
    writer = written.writer
    waits = draw(st.lists(st.sampled_from(["queued", "ping", "start", "progress"]), max_size=5))
    for kind in waits:
        _wait(written, kind)
    pieces = draw(_pieces())
    if pieces and not writer.allows("chunk"):
        _wait(written, "start")
    error = draw(st.one_of(st.none(), st.none(), _ERRORS))
    if error is not None:
        pieces = pieces[: draw(st.integers(0, len(pieces)))]
    for kind, value in pieces:
        written.piece(kind, value)
        if draw(st.integers(0, 5)) == 0 and writer.allows("ping"):
            _wait(written, "ping")
        if draw(st.integers(0, 9)) == 0 and writer.allows("snapshot"):
            written.snapshot(lost=draw(st.integers(0, _chunks_at_end(written.told.events))))
    called = any(kind == "tool_calls" for kind, _ in pieces)
    finish = "tool_calls" if called else draw(st.sampled_from(["stop", "stop", "length", "cancelled"]))
    lost = any(event["type"] == "snapshot" for event in written.told.events)
    omitted = not lost and draw(st.booleans())
    chunks = omitted or draw(st.booleans())
    return written.end(finish=finish, error=error, omitted=omitted, chunks=chunks)


def _wait(written: _Written, kind: str) -> None:
    writer = written.writer
    if not writer.allows(kind):  # type: ignore[arg-type]
        return
    match kind:
        case "queued":
            written.add(writer.queued(position=1, reason="waiting"))
        case "ping":
            written.add(writer.ping(state="generating"))
        case "start":
            written.add(writer.start({"model": "demo", "worker": "w", "created": 1}))
        case "progress":
            written.add(writer.progress(processed=3, total=11, cached=4))


def _chunks_at_end(events: Sequence[dict[str, Any]]) -> int:
    count = 0
    for event in reversed(events):
        if event["type"] != "chunk":
            break
        count += 1
    return count
