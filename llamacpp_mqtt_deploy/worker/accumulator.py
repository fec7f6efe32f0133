"""An answer as it grows, and the fields of the terminal event that it ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.deltas import Finished, FinishReason, Message, PromptProgress, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineFailed
from llamacpp_mqtt_deploy.core.toolcalls import MAX_ARGUMENTS_CHARS, MAX_CALLS, checked_call

# An answer that came in less than this came in one piece: its speed cannot be told from outside the engine.
_MEASURABLE_S = 0.001


@dataclass(frozen=True, slots=True)
class Told:
    """What a client has been told of an answer when its stream closes."""

    content: str
    reasoning: str
    calls: bool
    """Its tool calls too."""


@dataclass(slots=True)
class AnswerAccumulator:
    """What the engine has said so far; times are monotonic seconds."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    model: str | None = None
    progress: PromptProgress | None = None
    pieces: int = 0
    first_at: float | None = None
    last_at: float | None = None
    finished: Finished | None = None
    dropped_messages: int = 0
    warnings: tuple[str, ...] = ()
    size: int = 0
    """UTF-8 bytes of content and reasoning."""
    _arguments_chars: int = 0

    def add_text(self, text: str, now: float, pieces: int = 1) -> None:
        self.content.append(text)
        self.size += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        self.pieces += pieces
        self.last_at = now
        if self.first_at is None:
            self.first_at = now

    def add_reasoning(self, text: str, now: float, pieces: int = 1) -> None:
        self.reasoning.append(text)
        self.size += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        self._count(now, pieces)

    def add_call(self, delta: ToolCall, now: float) -> dict[str, Any]:
        """Merge a piece of a tool call; returns it as the `chunk` event tells it. Raises EngineFailed for what is no call."""
        delta = checked_call(delta.index, delta.id, delta.name, delta.arguments)
        self._arguments_chars += len(delta.arguments)
        if self._arguments_chars > MAX_ARGUMENTS_CHARS:
            raise EngineFailed(f"The engine called tools with more than {MAX_ARGUMENTS_CHARS} characters of arguments.")
        if delta.index not in self.calls and len(self.calls) >= MAX_CALLS:
            raise EngineFailed(f"The engine called more than {MAX_CALLS} tools in one answer.")
        call = self.calls.setdefault(delta.index, {"id": None, "name": None, "arguments": []})
        call["id"] = call["id"] or delta.id
        call["name"] = call["name"] or delta.name
        call["arguments"].append(delta.arguments)
        self._count(now)
        event: dict[str, Any] = {"index": delta.index}
        if delta.id:
            event["id"] = delta.id
        if delta.name:
            event["name"] = delta.name
        event["arguments"] = delta.arguments
        return event

    def _count(self, now: float, pieces: int = 1) -> None:
        self.pieces += pieces
        self.last_at = now
        if self.first_at is None:
            self.first_at = now

    @property
    def begun(self) -> bool:
        return self.first_at is not None

    def text(self) -> str:
        return "".join(self.content)

    def thoughts(self) -> str:
        return "".join(self.reasoning)

    def tool_calls(self) -> list[dict[str, Any]]:
        """As an OpenAI assistant message holds them."""
        return [
            {
                "id": call["id"] or f"call_{index}",
                "type": "function",
                "function": {"name": call["name"] or "", "arguments": "".join(call["arguments"])},
            }
            for index, call in sorted(self.calls.items())
        ]

    def without_arguments(self) -> list[int]:
        """The numbers of the calls that name a tool and have no arguments; some servers send nothing where a tool takes none."""
        return [
            index
            for index, call in sorted(self.calls.items())
            if call["name"] and not "".join(call["arguments"]).strip()
        ]

    def message(self, content: str, *, with_calls: bool) -> Message:
        """An OpenAI assistant message that can be put into `messages` unchanged, with as much as was told.

        A call that was cut off is left out: half of a JSON text as arguments makes chat templates fail for ever.
        """
        calls = [call for call in self.tool_calls() if with_calls and _is_json(call["function"]["arguments"])]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        if calls:
            message["tool_calls"] = calls
        return message

    def usage(self) -> TokenUsage:
        """The engine's own figures; without them (a cancelled answer) the prompt's progress and the pieces counted."""
        if self.finished is not None:
            return self.finished.usage
        return TokenUsage(
            prompt_tokens=self.progress.total if self.progress else 0,
            completion_tokens=self.pieces,
            cached_tokens=self.progress.cached if self.progress else 0,
        )

    def tokens_per_second(self) -> float | None:
        if self.finished is not None and self.finished.tokens_per_second:
            return round(self.finished.tokens_per_second, 2)
        if self.first_at is None or self.last_at is None or self.last_at - self.first_at < _MEASURABLE_S:
            return None
        # An engine that tells no usage leaves the pieces to count.
        tokens = self.usage().completion_tokens or self.pieces
        return round(max(0, tokens - 1) / (self.last_at - self.first_at), 2)


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def usage_fields(usage: TokenUsage) -> dict[str, int]:
    fields = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    }
    if usage.reasoning_tokens is not None:
        fields["reasoning_tokens"] = usage.reasoning_tokens
    return fields


def done_fields(
    answer: AnswerAccumulator,
    *,
    told: Told,
    finish_reason: FinishReason,
    with_text: bool,
    timings: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The fields of `done` beyond the common ones; `told` may be less than the answer (cancelled while paced)."""
    fields: dict[str, Any] = {}
    if with_text:
        fields["full_content"] = told.content
        if told.reasoning:
            fields["full_reasoning"] = told.reasoning
        fields["message"] = answer.message(told.content, with_calls=told.calls)
    else:
        fields["content_omitted"] = True
    fields["finish_reason"] = finish_reason
    if answer.finished is not None and answer.finished.stop_sequence:
        fields["stop_sequence"] = answer.finished.stop_sequence
    fields["usage"] = usage_fields(answer.usage())
    fields["timings"] = {name: value for name, value in timings.items() if value is not None}
    fields["dropped_messages"] = answer.dropped_messages
    if warnings:
        fields["warnings"] = list(warnings)
    if metadata is not None:
        fields["metadata"] = dict(metadata)
    return fields
