"""The events of one request: what is new in each, what is missing, and how it ends. Knows no clock, no network, no Home Assistant.

Home Assistant pins another version of the MQTT library than the worker's package needs, so this is a reader of its own. Tests hold
it to the readings of that package's reader and of the JavaScript client, under Python 3.11 and later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ANSWER_CHARS = 8 * 1024 * 1024
"""Text, thinking and arguments of tool calls together. A worker ends an answer at 4 MiB."""
MAX_TOOL_CALLS = 128


@dataclass(frozen=True, slots=True)
class News:
    """What one event brought that was new."""

    event: Mapping[str, Any]
    content: str = ""
    reasoning: str = ""


@dataclass(slots=True)
class AnswerReader:
    """`feed` takes decoded events in the order of arrival, repeated ones included, and returns the news of each, or None.

    While `lacks` is true a chunk is missing: the same request, sent again (same id, same bytes), brings a snapshot, the chunks
    once more, or the stored end. `end` is the terminal event, or a rejection of a request that was not heard of before.
    """

    request_id: str
    content: str = ""
    reasoning: str = ""
    next_seq: int = 0
    heard: bool = False
    end: Mapping[str, Any] | None = None
    cut_short: bool = False
    """The worker has ended the answer, and a part of its text is still missing here."""
    _hole: bool = False
    _omitted: bool = False
    _argument_chars: int = 0
    _calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def lacks(self) -> bool:
        """A chunk is missing that another delivery of the request may bring."""
        return self._hole and (self.cut_short or not self._omitted)

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls as OpenAI's assistant message holds them: the end's own, else those of the chunks."""
        message = (self.end or {}).get("message")
        told = message.get("tool_calls") if isinstance(message, Mapping) else None
        if isinstance(told, list):
            return [dict(call) for call in told[:MAX_TOOL_CALLS] if isinstance(call, Mapping)]
        return [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(self._calls.items())
        ]

    def feed(self, event: object) -> News | None:
        if not isinstance(event, Mapping) or event.get("request_id") != self.request_id or self.end is not None:
            return None
        news = self._feed(event)
        if len(self.content) + len(self.reasoning) + self._argument_chars > MAX_ANSWER_CHARS and self.end is None:
            self.end = {"type": "error", "code": "too_long", "message": "The answer is longer than any worker's limit."}
        return news

    def _feed(self, event: Mapping[str, Any]) -> News | None:
        kind = event.get("type")
        if kind == "rejected":
            if not self.heard:  # else it is about somebody's other delivery
                self.end = event
            return News(event)
        if kind not in ("queued", "start", "progress", "ping", "chunk", "snapshot", "done", "error"):
            return None
        self.heard = True
        match kind:
            case "chunk":
                return self._chunk(event)
            case "snapshot":
                return self._snapshot(event)
            case "done" | "error":
                return self._ended(event)
        return News(event)

    def _chunk(self, event: Mapping[str, Any]) -> News | None:
        seq = event.get("seq")
        if not isinstance(seq, int) or seq < self.next_seq:
            return None
        if seq > self.next_seq:
            self._hole = True
            return None
        self.next_seq = seq + 1
        self._hole = False
        deltas = event.get("tool_calls")
        for delta in deltas if isinstance(deltas, list) else ():
            if isinstance(delta, Mapping):
                self._merge(delta)
        return self._add(event, _text(event, "content"), _text(event, "reasoning"))

    def _merge(self, delta: Mapping[str, Any]) -> None:
        index = delta.get("index", 0)
        if not isinstance(index, int) or (index not in self._calls and len(self._calls) >= MAX_TOOL_CALLS):
            return
        call = self._calls.setdefault(index, {"id": None, "name": None, "arguments": ""})
        call["id"] = call["id"] or delta.get("id")
        call["name"] = call["name"] or delta.get("name")
        more = _text(delta, "arguments")
        call["arguments"] += more
        self._argument_chars += len(more)

    def _snapshot(self, event: Mapping[str, Any]) -> News | None:
        next_seq = event.get("next_seq")
        if not isinstance(next_seq, int) or next_seq < self.next_seq:
            return None
        if event.get("content_omitted"):
            # Too large to be told again: the chunks that follow it, or the end, fill what is missing.
            self._omitted = True
            return News(event)
        self.next_seq = next_seq
        self._hole = False
        return self._add(event, _beyond(self.content, event, "content"), _beyond(self.reasoning, event, "reasoning"))

    def _ended(self, event: Mapping[str, Any]) -> News | None:
        whole = "full_content" if "full_content" in event else "partial_content"
        if not isinstance(event.get(whole), str) and event.get("type") == "done" and self._lacks_text(event):
            self._hole = self.cut_short = True
            return None
        self.end = event
        self._hole = self.cut_short = False
        return self._add(event, _beyond(self.content, event, whole), _beyond(self.reasoning, event, "full_reasoning"))

    def _lacks_text(self, done: Mapping[str, Any]) -> bool:
        """Whether the text that this end leaves out is not wholly in the chunks that came before it."""
        chunks = done.get("seq")
        return not isinstance(chunks, int) or chunks > self.next_seq or chunks == 0

    def _add(self, event: Mapping[str, Any], content: str, reasoning: str) -> News:
        self.content += content
        self.reasoning += reasoning
        return News(event, content, reasoning)


def _text(event: Mapping[str, Any], name: str) -> str:
    value = event.get(name)
    return value if isinstance(value, str) else ""


def _beyond(known: str, event: Mapping[str, Any], name: str) -> str:
    """What the whole text has beyond the known one; nothing when it does not begin with it: another answer may not be mixed in."""
    whole = _text(event, name)
    return whole[len(known) :] if whole.startswith(known) else ""
