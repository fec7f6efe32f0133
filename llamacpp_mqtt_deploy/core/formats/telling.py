"""What of an answer was not told yet, event by event, and the whole of it from its `done`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall


@dataclass(slots=True)
class _ToldCall:
    """A tool call as far as it was told; `waiting` is what came before its name. `id` is never None once it was told."""

    fallback_id: str
    id: str | None = None
    name: str | None = None
    told: str = ""
    waiting: str = ""
    number: int | None = None


class Untold:
    """Turns the events of one request into what is new in them.

    Text that a `snapshot` or a `done` holds beyond the chunks counts as new; so does an answer that came without chunks. Tool
    calls are numbered from 0 without a hole in the order of their appearance, each begins with its id and name, and after a
    `snapshot`, which tells none of their arguments, the rest of them waits for the `done`.
    """

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _ToldCall] = {}
        self._lost_arguments = False

    def feed(self, event: Mapping[str, Any]) -> list[Spoken]:
        match event.get("type"):
            case "chunk":
                return self._chunk(event)
            case "snapshot":
                self._lost_arguments = True
                return self._texts(event.get("reasoning"), event.get("content"))
            case "done":
                news = self._texts(event.get("full_reasoning"), event.get("full_content"))
                return news + self._whole_calls(event)
            case _:
                return []

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def _chunk(self, event: Mapping[str, Any]) -> list[Spoken]:
        news: list[Spoken] = []
        if reasoning := _text(event.get("reasoning")):
            self._reasoning.append(reasoning)
            news.append(Reasoning(reasoning))
        if content := _text(event.get("content")):
            self._content.append(content)
            news.append(Text(content))
        deltas = event.get("tool_calls")
        for delta in deltas if isinstance(deltas, list) else ():
            if isinstance(delta, Mapping) and not self._lost_arguments:
                news += self._call(delta)
        return news

    def _texts(self, reasoning: Any, content: Any) -> list[Spoken]:
        """What these texts hold beyond what was told."""
        news: list[Spoken] = []
        if more := _beyond(self.reasoning, _text(reasoning)):
            self._reasoning.append(more)
            news.append(Reasoning(more))
        if more := _beyond(self.content, _text(content)):
            self._content.append(more)
            news.append(Text(more))
        return news

    def _call(self, delta: Mapping[str, Any]) -> list[Spoken]:
        index = delta.get("index", 0)
        if not isinstance(index, int):
            return []
        call = self._calls.setdefault(index, _ToldCall(f"call_{index}"))
        call.id = call.id or _text(delta.get("id")) or None
        call.name = call.name or _text(delta.get("name")) or None
        call.waiting += _text(delta.get("arguments"))
        return self._tell(call) if call.name is not None else []

    def _tell(self, call: _ToldCall) -> list[Spoken]:
        more, call.waiting = call.waiting, ""
        call.told += more
        if call.number is not None:
            return [ToolCall(call.number, None, None, more)] if more else []
        call.number = sum(each.number is not None for each in self._calls.values())
        call.id = call.id or call.fallback_id
        return [ToolCall(call.number, call.id, call.name, more)]

    def _whole_calls(self, done: Mapping[str, Any]) -> list[Spoken]:
        """What the message of the end holds of its calls beyond the deltas."""
        known = {call.id or call.fallback_id: call for call in self._calls.values()}
        news: list[Spoken] = []
        for whole in calls_of(done):
            call = known.get(whole.id)
            if call is None:
                call = self._calls[max(self._calls, default=-1) + 1] = _ToldCall(whole.id)
            call.name = call.name or whole.name
            call.waiting = _beyond(call.told, whole.arguments)
            news += self._tell(call)
        return news


@dataclass(frozen=True, slots=True)
class WholeCall:
    """A tool call of a finished answer; `arguments` is a JSON text."""

    id: str
    name: str
    arguments: str

    @property
    def input(self) -> dict[str, Any]:
        """The arguments as an object; empty when they are none."""
        return json_object(self.arguments) or {}


def calls_of(done: Mapping[str, Any]) -> list[WholeCall]:
    """The tool calls of the message that a `done` holds."""
    message = done.get("message")
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    found = []
    for place, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            told_id = _text(call.get("id")) or f"call_{place}"
            found.append(WholeCall(told_id, _text(function.get("name")), _text(function.get("arguments"))))
    return found


def text_of(done: Mapping[str, Any]) -> str:
    """The answer that a `done` holds."""
    return _text(done.get("full_content"))


def reasoning_of(done: Mapping[str, Any]) -> str:
    """The thinking that a `done` holds."""
    return _text(done.get("full_reasoning"))


@dataclass(frozen=True, slots=True)
class Tokens:
    """The `usage` of an end, where it tells one."""

    prompt: int
    completion: int
    cached: int
    reasoning: int

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Tokens:
        usage = event.get("usage")
        told = usage if isinstance(usage, Mapping) else {}
        names = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
        return cls(*(_count(told.get(name)) for name in names))


def finish_of(done: Mapping[str, Any]) -> str:
    """`stop`, `length`, `tool_calls` or `cancelled`."""
    return _text(done.get("finish_reason")) or "stop"


def json_object(text: str) -> dict[str, Any] | None:
    """The object that this JSON text is; None when it is none, or not whole."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _beyond(known: str, full: str) -> str:
    """What `full` has beyond `known`; nothing when it does not begin with it (another answer may not be mixed in)."""
    return full[len(known) :] if full.startswith(known) else ""
