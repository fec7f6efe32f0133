"""The events of the reply topic as models; tests hold what the worker emits against them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llamacpp_mqtt_deploy.core.errors import BY_CODE


class Emitted(BaseModel):
    """Something that the worker publishes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def _known_code(code: str) -> str:
    if code not in BY_CODE:
        msg = f"{code} is not a code of the protocol"
        raise ValueError(msg)
    return code


REJECTIONS = ("duplicate_request", "reply_topic_forbidden")
"""Codes of `rejected`, which end no request."""


def _counted_code(code: str) -> str:
    return code if code in REJECTIONS else _known_code(code)


Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]
ErrorCode = Annotated[str, AfterValidator(_known_code), Field(json_schema_extra={"enum": sorted(BY_CODE)})]
CountedCode = Annotated[
    str, AfterValidator(_counted_code), Field(json_schema_extra={"enum": sorted([*BY_CODE, *REJECTIONS])})
]
FaultyFields = dict[str, str]
EngineStateName = Literal["starting", "loading", "ready", "asleep", "restarting", "unreachable", "failed", "closed"]


# --- parts of events -------------------------------------------------------------------------------------------------


class Usage(Emitted):
    """Tokens of one generation."""

    prompt_tokens: Count
    """Tokens of the context."""
    completion_tokens: Count
    """Tokens of the answer, thinking included."""
    total_tokens: Count
    """Both together."""
    cached_tokens: Count = 0
    """Tokens of the context that needed no work."""
    reasoning_tokens: Count | None = None
    """Tokens of the thinking, where the engine tells."""


class Timings(Emitted):
    """Where the time went, in milliseconds."""

    queue_ms: Number
    """From arrival to a slot."""
    first_token_ms: Number | None = None
    """From arrival to the first piece of the answer."""
    total_ms: Number
    """From arrival to this event."""
    tokens_per_second: Number | None = None
    """Speed of the answer without the prompt."""
    cancel_ms: Number | None = None
    """From the cancel to the freed slot."""


class ToolCallDelta(Emitted):
    """A piece of a tool call; the pieces of `arguments` are joined."""

    index: Count
    """Which call of the answer."""
    id: str | None = None
    """Comes once."""
    name: str | None = None
    """Comes once."""
    arguments: str = ""
    """The next piece of a JSON text."""


class CalledFunctionOut(Emitted):
    """The called function."""

    name: str
    """One of the offered tools."""
    arguments: str
    """A JSON text, whole unless `finish_reason` is `length` or `cancelled`."""


class ToolCallOut(Emitted):
    """A whole tool call."""

    id: str
    """Comes back as `tool_call_id`."""
    type: Literal["function"]
    """Always `function`."""
    function: CalledFunctionOut
    """Name and arguments."""


class AssistantMessageOut(Emitted):
    """The answer as a message that can be put into `messages` unchanged."""

    role: Literal["assistant"]
    """Always `assistant`."""
    content: str | None
    """The text."""
    reasoning_content: str | None = None
    """The thinking."""
    tool_calls: Annotated[list[ToolCallOut], Field(min_length=1)] | None = None
    """The calls, in order."""


# --- events on the reply topic ---------------------------------------------------------------------------------------


class Event(Emitted):
    request_id: NonEmpty
    """Name of the stream."""
    session_id: NonEmpty
    """Session path."""


class Queued(Event):
    """The request has to wait; comes again when position or reason change."""

    type: Literal["queued"]
    """Always `queued`."""
    position: Count
    """Its place in the queue, 1 is next; 0 when it has left the queue and waits for the engine. Where more than 1 000 wait, its place by arrival."""
    reason: Literal["waiting", "loading", "engine_restarting"]
    """What it waits for."""


class Start(Event):
    """The request has a slot."""

    type: Literal["start"]
    """Always `start`."""
    protocol: Literal[1]
    """Version of this contract."""
    model: str | None = None
    """The model that answers."""
    worker: NonEmpty
    """Worker id."""
    created: Number
    """Seconds since the epoch."""
    warnings: list[str] | None = None
    """What was ignored or lowered."""
    metadata: dict[str, Any] | None = None
    """As sent."""


class Progress(Event):
    """The prompt is being processed."""

    type: Literal["progress"]
    """Always `progress`."""
    processed: Count
    """Tokens done."""
    total: Count
    """Tokens of the prompt."""
    cached: Count
    """Tokens that needed no work."""


class Chunk(Event):
    """New output; exactly one of content, reasoning and tool_calls."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [name]} for name in ("content", "reasoning", "tool_calls")]}
    )

    type: Literal["chunk"]
    """Always `chunk`."""
    seq: Count
    """Counts the chunks of a request from 0 without a hole."""
    content: NonEmpty | None = None
    """New text."""
    reasoning: NonEmpty | None = None
    """New thinking."""
    tool_calls: Annotated[list[ToolCallDelta], Field(min_length=1)] | None = None
    """New pieces of tool calls."""

    @model_validator(mode="after")
    def _one_kind(self) -> Chunk:
        if [self.content, self.reasoning, self.tool_calls].count(None) != 2:
            msg = "a chunk has exactly one of content, reasoning and tool_calls"
            raise ValueError(msg)
        return self


class Ping(Event):
    """A heartbeat after a while without another event."""

    type: Literal["ping"]
    """Always `ping`."""
    state: Literal["queued", "prompt", "generating"]
    """What the request is doing."""


class Snapshot(Event):
    """The request was sent again while it runs; live chunks go on from `next_seq`."""

    type: Literal["snapshot"]
    """Always `snapshot`."""
    content: str
    """The text so far."""
    reasoning: str | None = None
    """The thinking so far."""
    next_seq: Count
    """Number of the next chunk."""
    content_omitted: Literal[True] | None = None
    """The text so far is too large for an event."""


class Done(Event):
    """The terminal event of a request that ended well."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [name]} for name in ("full_content", "content_omitted")]}
    )

    type: Literal["done"]
    """Always `done`."""
    seq: Count
    """How many chunks there were."""
    final: Literal[True]
    """Nothing follows."""
    full_content: str | None = None
    """The text of all chunks."""
    content_omitted: Literal[True] | None = None
    """The text was not wanted, or is too large for an event."""
    full_reasoning: str | None = None
    """The thinking of all chunks."""
    message: AssistantMessageOut | None = None
    """The answer in OpenAI's shape; absent with `content_omitted`."""
    finish_reason: Literal["stop", "length", "tool_calls", "cancelled"]
    """Why it ended."""
    stop_sequence: str | None = None
    """The stop text that ended it, where the engine tells."""
    usage: Usage
    """Tokens."""
    timings: Timings
    """Milliseconds."""
    dropped_messages: Count = 0
    """Messages of the history that were left out to fit."""
    warnings: list[str] | None = None
    """What was ignored or lowered."""
    metadata: dict[str, Any] | None = None
    """As sent."""

    @model_validator(mode="after")
    def _text_or_not(self) -> Done:
        if (self.full_content is None) == (self.content_omitted is None):
            msg = "done has either full_content or content_omitted"
            raise ValueError(msg)
        return self


class Error(Event):
    """The terminal event of a request that failed."""

    type: Literal["error"]
    """Always `error`."""
    seq: Count | None = None
    """How many chunks there were; absent when the worker that counted them died."""
    final: Literal[True]
    """Nothing follows."""
    code: ErrorCode
    """What happened, for programs."""
    message: NonEmpty
    """What happened and what to do, for people."""
    retryable: bool
    """Whether the same request may succeed later."""
    fields: FaultyFields | None = None
    """The fields at fault, each with what was expected."""
    retry_after_s: Number | None = None
    """When to try again, in seconds."""
    n_prompt_tokens: Count | None = None
    """Tokens of the context that did not fit."""
    n_ctx: Count | None = None
    """Tokens that fit."""
    partial_content: str | None = None
    """The text of all chunks."""
    content_omitted: Literal[True] | None = None
    """The text is too large for an event."""
    usage: Usage | None = None
    """Tokens, where known."""
    timings: Timings | None = None
    """Milliseconds, where known."""
    warnings: list[str] | None = None
    """What was ignored or lowered."""
    metadata: dict[str, Any] | None = None
    """As sent."""

    @model_validator(mode="after")
    def _as_the_code_says(self) -> Error:
        if self.retryable != BY_CODE[self.code].retryable:
            msg = f"retryable must be {BY_CODE[self.code].retryable} with {self.code}"
            raise ValueError(msg)
        return self


class Rejected(Event):
    """Answers a delivery and ends nothing."""

    type: Literal["rejected"]
    """Always `rejected`."""
    code: Literal["duplicate_request", "reply_topic_forbidden"]
    """The id belongs to another request, or the Response Topic is not the derived one."""
    message: NonEmpty
    """The same for people."""


class Ack(Emitted):
    """The answer to a control message."""

    type: Literal["ack"]
    """Always `ack`."""
    session_id: NonEmpty
    """Session path."""
    action: str | None
    """As sent; null when it could not be read."""
    status: Literal["ok", "error"]
    """Whether it was done."""
    code: ErrorCode | None = None
    """Why not, for programs."""
    message: str | None = None
    """Why not, for people."""
    fields: FaultyFields | None = None
    """The fields at fault, each with what was expected."""
    retry_after_s: float | None = None
    """`busy`, `rate_limited`: seconds until sending it again may help."""
    transaction: str | None = None
    """As sent."""
    request_id: str | None = None
    """As sent with `cancel`."""
    state: Literal["running", "queued", "ended", "unknown", "online", "draining"] | None = None
    """`cancel`: where the request was; `unknown` is kept for 60 s. `ping`: the worker's state."""
    cancelled: Count | None = None
    """`cancel`, `reset`, `delete`: how many requests were told to stop."""
    messages: list[dict[str, Any]] | None = None
    """`history`: the messages of the session."""
    prompt_tokens: Count | None = None
    """`count_tokens`: tokens of the prompt as the model would get it."""
    worker: str | None = None
    """`ping`: worker id."""
    engine: EngineStateName | None = None
    """`ping`: state of the engine."""
    queue: Count | None = None
    """`ping`: requests that wait."""


ReplyEvent = Annotated[
    Queued | Start | Progress | Chunk | Ping | Snapshot | Done | Error | Rejected | Ack, Field(discriminator="type")
]
"""Anything that comes on a reply topic."""
