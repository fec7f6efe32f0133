"""The fields of requests, control and admin messages: type, bounds and, in words, what was expected."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, WithJsonSchema

from llamacpp_mqtt_deploy.core.conversation import (
    MAX_TOOLS,
    TOOL_CHOICES,
    ChatMessage,
    ResponseFormat,
    Tool,
    ToolChoice,
    ToolResult,
)
from llamacpp_mqtt_deploy.core.routes import SESSION
from llamacpp_mqtt_deploy.core.validation import Expect, FirstFault, Id, Integer, WireModel, fault

MAX_MESSAGES = 2048
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
_BIASES = f"an object of at most {MAX_LOGIT_BIAS} token ids (digits), each with a number from -100 to 100"
MAX_METADATA_BYTES = 4096
LEAST_REPEAT_PENALTY = 0.01  # engines divide by it, and what is much less is 0 in their 32 bits
MAX_AWAKE_S = 7 * 86400  # for longer there is no limit at all

Lane = Literal["interactive", "normal", "batch"]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


# Made a text before it is checked: `FieldNames.id_text`.
_SESSION_NUMBER = {"minimum": 0, "maximum": 2**64 - 1, "type": "integer"}


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    if len(orjson.dumps(value)) > MAX_METADATA_BYTES:
        raise fault(f"an object of at most {MAX_METADATA_BYTES} bytes as JSON")
    return value


def _few_biases(value: Any) -> Any:
    # Before any of them is looked at: for each wrong one pydantic writes an error, of which eight are told.
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise fault(_BIASES)
    return value


def _distinct_results(value: list[ToolResult]) -> list[ToolResult]:
    if len({result.tool_call_id for result in value}) != len(value):
        raise fault("one result for each tool_call_id")
    return value


def _distinct_tools(value: list[Tool]) -> list[Tool]:
    if len({tool.function.name for tool in value}) != len(value):
        raise fault("tools with different names")
    return value


# Fields that stand in more than one kind of message.
Prompt = Annotated[Annotated[str, StringConstraints(min_length=1)] | None, Expect("a text that is not empty")]
Messages = Annotated[
    Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), FirstFault()] | None,
    Expect(f"a list of 1 to {MAX_MESSAGES} chat messages"),
]
SystemPrompt = Annotated[str | None, Expect("a text")]
Tools = Annotated[
    Annotated[list[Tool], Field(max_length=MAX_TOOLS), FirstFault(), AfterValidator(_distinct_tools)] | None,
    Expect(f"a list of at most {MAX_TOOLS} function tools"),
]
ModelName = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=256)] | None, Expect("the name of a model")
]


class RequestFields(WireModel):
    """A request; exactly one of prompt, messages and tool_results is required, all else has a default."""

    request_id: Annotated[Id | None, Expect("1 to 64 letters, digits, _ . or -")] = None
    """Idempotency key and name of the stream; random. Made by the worker when absent: sent again, it runs again."""
    session_id: Annotated[
        Annotated[str, StringConstraints(pattern=f"^{SESSION}$")] | None,
        Expect("one or two levels of 1 to 64 letters, digits, _ . or -, joined by /, or a whole number"),
        WithJsonSchema({"anyOf": [{"pattern": f"^{SESSION}$", "type": "string"}, _SESSION_NUMBER, {"type": "null"}]}),
    ] = None
    """The session, only on routes that take it from the payload; 42 is the session "42"."""
    prompt: Prompt = None
    """One user message, added to the history of the session."""
    new: Annotated[bool | None, Expect("true or false")] = None
    """Forget the history before this prompt."""
    tool_results: Annotated[
        Annotated[
            list[ToolResult],
            Field(min_length=1, max_length=MAX_TOOLS),
            FirstFault(),
            AfterValidator(_distinct_results),
        ]
        | None,
        Expect(f"a list of 1 to {MAX_TOOLS} objects with tool_call_id and content"),
    ] = None
    """Results of the tools that the last answer of the session called, instead of a prompt."""
    messages: Messages = None
    """Exactly this context; the history of the session is neither read nor written."""
    system_prompt: SystemPrompt = None
    """System prompt of this request; not together with `messages`."""
    stream: Annotated[bool | Literal["sentence"] | None, Expect('true, false or "sentence"')] = None
    """Chunks as they are generated (true), only the terminal event (false; after chunks if the answer does not fit), or sentences."""
    full_content: Annotated[bool | None, Expect("true or false")] = None
    """Whether `done` carries the whole text."""
    temperature: Annotated[Annotated[float, Field(ge=0, le=5)] | None, Expect("a number from 0 to 5")] = None
    """Randomness of the answer; 0 is always the most likely token."""
    top_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Expect("a number from 0 to 1")] = None
    """Keep the most likely tokens that together reach this probability."""
    top_k: Annotated[
        Annotated[Integer, Field(ge=0, le=1_000_000)] | None, Expect("a whole number from 0 (keep all) to 1000000")
    ] = None
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Expect("a number from 0 to 1")] = None
    """Drop tokens less likely than this share of the most likely one."""
    max_tokens: Annotated[Annotated[Integer, Field(ge=1)] | None, Expect("a whole number of at least 1")] = None
    """Longest answer in tokens; lowered to the worker's limit."""
    seed: Annotated[
        Annotated[Integer, Field(ge=-1, le=0xFFFFFFFF)] | None,
        Expect("a whole number from -1 (a new one each time) to 4294967295"),
    ] = None
    """Seed of the random numbers."""
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS), FirstFault()] | None,
        Expect(f"a text of 1 to {MAX_STOP_CHARS} characters, or a list of at most {MAX_STOPS} such texts"),
    ] = None
    """Texts at which the answer ends."""
    presence_penalty: Annotated[Annotated[float, Field(ge=-2, le=2)] | None, Expect("a number from -2 to 2")] = None
    """Push away tokens that appeared at all."""
    frequency_penalty: Annotated[Annotated[float, Field(ge=-2, le=2)] | None, Expect("a number from -2 to 2")] = None
    """Push away tokens by how often they appeared."""
    repeat_penalty: Annotated[
        Annotated[float, Field(ge=LEAST_REPEAT_PENALTY, le=10)] | None, Expect("a number from 0.01 to 10")
    ] = None
    """llama.cpp's penalty on repeated tokens; 1 is none."""
    logit_bias: Annotated[
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern=r"^[0-9]{1,8}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIAS),
            BeforeValidator(_few_biases),
        ]
        | None,
        Expect(_BIASES),
    ] = None
    """Push tokens, by id, up or down."""
    tools: Tools = None
    """Function tools that the model may call; an empty list offers none, also where the route has some."""
    tool_choice: Annotated[ToolChoice | None, Expect(TOOL_CHOICES)] = None
    """Whether, and which tool, the model must call."""
    parallel_tool_calls: Annotated[bool | None, Expect("true or false")] = None
    """Whether the model may call several tools at once."""
    response_format: Annotated[
        ResponseFormat | None, Expect('{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", ...}')
    ] = None
    """Constrain the answer to JSON, or to a JSON schema."""
    thinking: Annotated[bool | None, Expect("true or false")] = None
    """Let a reasoning model think first."""
    thinking_budget: Annotated[
        Annotated[Integer, Field(ge=0, le=10_000_000)] | None, Expect("a whole number of tokens, at least 0")
    ] = None
    """Longest thinking in tokens."""
    model: ModelName = None
    """One of the models that the worker's status names."""
    priority: Annotated[Lane | None, Expect("interactive, normal or batch")] = None
    """Lane of the queue; lowered to what the route allows."""
    timeout_s: Annotated[Annotated[float, Field(gt=0)] | None, Expect("a number of seconds over 0")] = None
    """Overall limit in seconds, waiting included; lowered to the worker's limit."""
    metadata: Annotated[
        Annotated[dict[str, Any], AfterValidator(_check_metadata)] | None,
        Expect(f"an object of at most {MAX_METADATA_BYTES} bytes as JSON"),
    ] = None
    """Anything; comes back in `start` and in the terminal event."""


class ControlFields(WireModel):
    """A message on a control topic."""

    action: Annotated[
        Literal["cancel", "reset", "delete", "history", "ping", "count_tokens"],
        Expect("cancel, reset, delete, history, ping or count_tokens"),
    ]
    """What to do."""
    request_id: Annotated[Id | None, Expect("1 to 64 letters, digits, _ . or -")] = None
    """The request to cancel; without it all of the session accepted before."""
    transaction: Annotated[
        Annotated[str, StringConstraints(max_length=64)] | None, Expect("a text of at most 64 characters")
    ] = None
    """Comes back in the ack."""


class CountFields(ControlFields):
    """A message on a control topic, with what `count_tokens` counts; the other actions leave these fields alone."""

    prompt: Prompt = None
    """For `count_tokens`: one user message, counted without the session's history."""
    messages: Messages = None
    """For `count_tokens`: a whole context, instead of `prompt`."""
    system_prompt: SystemPrompt = None
    """For `count_tokens`: the system prompt before `prompt`; the route's own when absent."""
    tools: Tools = None
    """For `count_tokens`: the tools of the request; the route's own when absent."""
    model: ModelName = None
    """For `count_tokens`: the model of the request."""


class AdminFields(WireModel):
    """A message on an admin topic."""

    action: Annotated[
        Literal[
            "cancel_all",
            "drain",
            "resume",
            "reload",
            "restart_engine",
            "unload",
            "keep_awake",
            "model",
            "log_level",
            "usage",
            "problems",
        ],
        Expect(
            "cancel_all, drain, resume, reload, restart_engine, unload, keep_awake, model, log_level, usage or problems"
        ),
    ]
    """What to do."""
    seconds: Annotated[Annotated[float, Field(ge=0, le=MAX_AWAKE_S)] | None, Expect("0 to 604800 seconds")] = None
    """How long, for `keep_awake`: 0 ends it, absent is until told otherwise."""
    model: Annotated[
        Annotated[str, StringConstraints(min_length=1, max_length=256)] | None, Expect("the name of a model")
    ] = None
    """The model of requests that name none, for `model`."""
    level: Annotated[Literal["debug", "info", "warning", "error"] | None, Expect("debug, info, warning or error")] = (
        None
    )
    """The new level, for `log_level`."""
    first_level: Annotated[
        Annotated[str, StringConstraints(max_length=70)] | None, Expect("a text of at most 70 characters")
    ] = None
    """For `usage`: of this first topic level alone."""
    days: Annotated[Annotated[Integer, Field(ge=1, le=366)] | None, Expect("a whole number from 1 to 366")] = None
    """For `usage`: of so many days, today included; 1 when absent."""
    limit: Annotated[Annotated[Integer, Field(ge=1, le=1000)] | None, Expect("a whole number from 1 to 1000")] = None
    """For `usage` and `problems`: at most so many of them; 100 when absent."""
    offset: Annotated[
        Annotated[Integer, Field(ge=0, le=1_000_000)] | None, Expect("a whole number from 0 to 1000000")
    ] = None
    """For `usage`: without the first so many rows, the `next_offset` of the answer before."""
    transaction: Annotated[
        Annotated[str, StringConstraints(max_length=64)] | None, Expect("a text of at most 64 characters")
    ] = None
    """Comes back in the answer."""
