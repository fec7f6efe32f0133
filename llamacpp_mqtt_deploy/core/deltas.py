"""What goes between the worker and an engine: the call with the prompt in, the deltas of the answer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
"""An OpenAI chat message: `role`, `content` (string or list of parts), `tool_calls`, `tool_call_id`."""

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCall:
    """One generation as the engine gets it; checked and complete, the engine adds nothing from the wire.

    `sampling` holds only the names of `SAMPLING_FIELDS`, in OpenAI's and llama.cpp's spelling. `chunk_timeout_s` bounds the
    silence between two deltas; the overall limit is the caller's and arrives through the stop signal.
    """

    messages: Sequence[Message]
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: Mapping[str, Any] | None = None
    thinking: bool | None = None
    thinking_budget: int | None = None
    chunk_timeout_s: float = 60.0
    once: bool = False
    """Not to be given to an engine a second time when it died: this call may be what it dies of."""

    def with_messages(self, messages: Sequence[Message]) -> EngineCall:
        """The same call with other messages. It runs for each request: `dataclasses.replace` takes five times as long."""
        return EngineCall(
            messages=messages,
            model=self.model,
            sampling=self.sampling,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format,
            thinking=self.thinking,
            thinking_budget=self.thinking_budget,
            chunk_timeout_s=self.chunk_timeout_s,
            once=self.once,
        )


SAMPLING_FIELDS: tuple[str, ...] = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "logit_bias",
)


@dataclass(frozen=True, slots=True)
class Opened:
    """The request has its slot. `streams` is false when the whole answer will come in one piece; `warnings` say what the
    engine changed in the request."""

    model: str | None = None
    streams: bool = True
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The prompt is being processed; all three are tokens, `cached` of them needed no work."""

    processed: int
    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class Text:
    """New text of the answer; never empty, never part of a UTF-8 character. `pieces`: in how many deltas it came."""

    text: str
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class Reasoning:
    """New text of the model's thinking; never part of the answer. `pieces` as in `Text`."""

    text: str
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A piece of the tool call number `index`; `id` and `name` come once, `arguments` are joined."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens of one generation, as the protocol's `usage` names them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last delta of a stream that ended well; `tokens_per_second` is the engine's own figure where it has one."""

    finish_reason: FinishReason
    usage: TokenUsage
    tokens_per_second: float | None = None
    stop_sequence: str | None = None


Delta = Opened | PromptProgress | Text | Reasoning | ToolCall | Finished
