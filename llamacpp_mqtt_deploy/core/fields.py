"""The fields of requests, control and admin messages: type, bounds and, in words, what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llamacpp_mqtt_deploy.core.topics import SESSION

MAX_MESSAGES = 2048
MAX_PARTS = 256
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_METADATA_BYTES = 4096
MAX_SCHEMA_BYTES = 16 * 1024
MAX_SCHEMA_DEPTH = 24
"""Levels of a JSON schema; engines turn it into a grammar by recursion."""

_MAX_FAULTS = 8
# Their parts are so small that the words for the whole say it better.
_WHOLE = frozenset({"stop", "stream", "logit_bias"})
_IMAGE = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,(?P<data>[A-Za-z0-9+/]+={0,2})")


@dataclass(frozen=True, slots=True)
class Expect:
    """What a field should have been, in words for the person who sent it; also its description in the schema."""

    words: str


class Wire(BaseModel):
    """Strict: a bool is no number and "0.5" is no number. Unknown fields are left out."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", use_attribute_docstrings=True)


class FirstFault(FailFast):
    """Stop at the first bad item of a list; hashable, as a member of a union must be."""

    __hash__ = object.__hash__


def _fault(expected: str) -> PydanticCustomError:
    # The text goes through a template engine of pydantic's; a context keeps braces in it harmless.
    return PydanticCustomError("expected", "{words}", {"words": expected})


def _integral(value: Any) -> Any:
    # JavaScript, Lua and Node-RED know one type of number and may write 5 as 5.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
FunctionName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$"),
    Expect("1 to 64 letters, digits, _ . or -"),
]
Lane = Literal["interactive", "normal", "batch"]


# --- schemas of the client's own -------------------------------------------------------------------------------------


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if len(orjson.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise _fault(f"a JSON schema of at most {MAX_SCHEMA_BYTES} bytes")
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise _fault(f"a JSON schema of at most {MAX_SCHEMA_DEPTH} levels")
        for part in level:
            target = part.get("$ref") if isinstance(part, dict) else None
            if target is not None and not (isinstance(target, str) and target.startswith("#")):
                # An engine might go and fetch it.
                raise _fault("a JSON schema whose $ref begins with #")
        level = [inner for part in level for inner in _inner(part) if isinstance(inner, dict | list)]
    return schema


def _inner(part: Any) -> Iterator[Any]:
    yield from part.values() if isinstance(part, dict) else part


JsonSchema = Annotated[dict[str, Any], AfterValidator(_check_schema), Expect("a JSON schema (an object)")]


# --- messages --------------------------------------------------------------------------------------------------------


class TextPart(Wire):
    type: Literal["text"]
    text: str


def _check_image(url: str) -> str:
    # llama-server downloads any http URL and opens any file URL it is given.
    found = _IMAGE.fullmatch(url)
    if found is None or len(found["data"]) % 4:
        raise _fault("data:image/png;base64,... (or jpeg, webp, gif); addresses are not fetched")
    return url


class ImageUrl(Wire):
    url: Annotated[str, AfterValidator(_check_image)]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageUrl


def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return {"text": "@text", "image_url": "@image"}.get(kind) if isinstance(kind, str) else None


def _content_tag(value: Any) -> str | None:
    return "@string" if isinstance(value, str) else "@parts" if isinstance(value, list) else None


def _discriminator(tag: Any, expected: str) -> Discriminator:
    return Discriminator(tag, custom_error_type="expected", custom_error_message=expected)


UserPart = Annotated[
    Annotated[TextPart, Tag("@text")] | Annotated[ImagePart, Tag("@image")],
    _discriminator(_part_tag, "a part with the type text or image_url"),
]
_PARTS = Field(min_length=1, max_length=MAX_PARTS)
TextContent = Annotated[
    Annotated[str, Tag("@string")] | Annotated[list[TextPart], Tag("@parts"), _PARTS, FirstFault()],
    _discriminator(_content_tag, "a string or a list of text parts"),
]
UserContent = Annotated[
    Annotated[str, Tag("@string")] | Annotated[list[UserPart], Tag("@parts"), _PARTS, FirstFault()],
    _discriminator(_content_tag, "a string or a list of text and image parts"),
]


class CalledFunction(Wire):
    name: ShortText
    arguments: str


class CalledTool(Wire):
    id: Annotated[str, StringConstraints(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: TextContent
    name: ShortText | None = None


class UserMessage(Wire):
    role: Literal["user"]
    content: UserContent
    name: ShortText | None = None


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: TextContent | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS), FirstFault()] | None = None
    name: ShortText | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise _fault("content, or tool_calls")
        return self


class ToolMessage(Wire):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: ShortText
    name: ShortText | None = None


def _role_tag(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    if not isinstance(role, str):
        return None
    roles = {"system": "@system", "developer": "@system", "user": "@user", "assistant": "@assistant", "tool": "@tool"}
    return roles.get(role)


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("@system")]
    | Annotated[UserMessage, Tag("@user")]
    | Annotated[AssistantMessage, Tag("@assistant")]
    | Annotated[ToolMessage, Tag("@tool")],
    _discriminator(_role_tag, "a message with the role system, developer, user, assistant or tool"),
]


class ToolResult(Wire):
    tool_call_id: ShortText
    content: str


# --- tools and formats -----------------------------------------------------------------------------------------------


class Function(Wire):
    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=MAX_SCHEMA_BYTES)] | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    name: FunctionName


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


def _choice_tag(value: Any) -> str | None:
    return "@word" if isinstance(value, str) else "@named" if isinstance(value, dict | NamedTool) else None


_CHOICE = 'auto, none, required or {"type": "function", "function": {"name": ...}}'
ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("@word")] | Annotated[NamedTool, Tag("@named")],
    _discriminator(_choice_tag, _CHOICE),
]


class NamedSchema(Wire):
    name: FunctionName = "answer"
    description: Annotated[str, StringConstraints(max_length=MAX_SCHEMA_BYTES)] | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _schema_in_its_place(cls, value: Any) -> Any:
        # Some servers read `schema` beside `json_object`; leaving it out in silence would lose the constraint.
        if isinstance(value, dict) and "schema" in value:
            raise _fault('{"type": "json_schema", "json_schema": {"schema": ...}} for a schema')
        return value

    @model_validator(mode="after")
    def _schema_when_named(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _fault("json_schema with the type json_schema, and only then")
        return self


# --- the messages ----------------------------------------------------------------------------------------------------


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    if len(orjson.dumps(value)) > MAX_METADATA_BYTES:
        raise _fault(f"an object of at most {MAX_METADATA_BYTES} bytes as JSON")
    return value


def _distinct_results(value: list[ToolResult]) -> list[ToolResult]:
    if len({result.tool_call_id for result in value}) != len(value):
        raise _fault("one result for each tool_call_id")
    return value


def _distinct_tools(value: list[Tool]) -> list[Tool]:
    if len({tool.function.name for tool in value}) != len(value):
        raise _fault("tools with different names")
    return value


class RequestFields(Wire):
    """A request; exactly one of prompt, messages and tool_results is required, all else has a default."""

    request_id: Annotated[Id | None, Expect("1 to 64 letters, digits, _ . or -")] = None
    """Idempotency key and name of the stream; random. Made by the worker when absent: sent again, it runs again."""
    session_id: Annotated[
        Annotated[str, StringConstraints(pattern=f"^{SESSION}$")] | None,
        Expect("one or two levels of 1 to 64 letters, digits, _ . or -, joined by /"),
    ] = None
    """The session, only on routes that take it from the payload."""
    prompt: Annotated[Annotated[str, StringConstraints(min_length=1)] | None, Expect("a text that is not empty")] = None
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
    messages: Annotated[
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), FirstFault()] | None,
        Expect(f"a list of 1 to {MAX_MESSAGES} chat messages"),
    ] = None
    """Exactly this context; the history of the session is neither read nor written."""
    system_prompt: Annotated[str | None, Expect("a text")] = None
    """System prompt of this request; not together with `messages`."""
    stream: Annotated[bool | Literal["sentence"] | None, Expect('true, false or "sentence"')] = None
    """Chunks as they are generated (true), only the terminal event (false), or whole sentences."""
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
    repeat_penalty: Annotated[Annotated[float, Field(gt=0, le=10)] | None, Expect("a number over 0 and at most 10")] = (
        None
    )
    """llama.cpp's penalty on repeated tokens; 1 is none."""
    logit_bias: Annotated[
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern=r"^[0-9]{1,8}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None,
        Expect(f"an object of at most {MAX_LOGIT_BIAS} token ids (digits), each with a number from -100 to 100"),
    ] = None
    """Push tokens, by id, up or down."""
    tools: Annotated[
        Annotated[list[Tool], Field(max_length=MAX_TOOLS), FirstFault(), AfterValidator(_distinct_tools)] | None,
        Expect(f"a list of at most {MAX_TOOLS} function tools"),
    ] = None
    """Function tools that the model may call; an empty list offers none, also where the route has some."""
    tool_choice: Annotated[ToolChoice | None, Expect(_CHOICE)] = None
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
    model: Annotated[
        Annotated[str, StringConstraints(min_length=1, max_length=256)] | None, Expect("the name of a model")
    ] = None
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


class ControlFields(Wire):
    """A message on a control topic."""

    action: Annotated[
        Literal["cancel", "reset", "delete", "history", "ping"],
        Expect("cancel, reset, delete, history or ping"),
    ]
    """What to do."""
    request_id: Annotated[Id | None, Expect("1 to 64 letters, digits, _ . or -")] = None
    """The request to cancel; without it all of the session accepted before."""
    transaction: Annotated[
        Annotated[str, StringConstraints(max_length=64)] | None, Expect("a text of at most 64 characters")
    ] = None
    """Comes back in the ack."""


class AdminFields(Wire):
    """A message on an admin topic."""

    action: Annotated[
        Literal["cancel_all", "drain", "resume", "reload", "restart_engine", "log_level"],
        Expect("cancel_all, drain, resume, reload, restart_engine or log_level"),
    ]
    """What to do."""
    level: Annotated[Literal["debug", "info", "warning", "error"] | None, Expect("debug, info, warning or error")] = (
        None
    )
    """The new level, for `log_level`."""
    transaction: Annotated[
        Annotated[str, StringConstraints(max_length=64)] | None, Expect("a text of at most 64 characters")
    ] = None
    """Comes back in the answer."""


# --- faults in words -------------------------------------------------------------------------------------------------


def expectations(model: type[Wire]) -> Mapping[str, str]:
    """What each field of a message expects, in words."""
    return {
        name: note.words
        for name, field in model.model_fields.items()
        for note in field.metadata
        if isinstance(note, Expect)
    }


def faults(error: ValidationError, expected: Mapping[str, str]) -> dict[str, str]:
    """The fields at fault (`messages[2].content`), at most 8, each with what was expected."""
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        path = [step for step in detail["loc"] if not _is_tag(step)]
        if path and path[0] in _WHOLE:
            del path[1:]
        name = _joined(path)
        if detail["type"] == "expected":
            words = detail["msg"]
        elif len(path) == 1 and path[0] in expected:
            words = expected[str(path[0])]
        else:
            words = _words(detail["type"], detail["msg"], detail.get("ctx", {}))
        found.setdefault(name, words)
        if len(found) == _MAX_FAULTS:
            break
    return found


def _is_tag(step: int | str) -> bool:
    # The path names the member of a union that was tried; our tags begin with @ to be told from the client's fields.
    return isinstance(step, str) and step.startswith("@")


def _joined(path: list[int | str]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:64]}" for step in path)
    return text.removeprefix(".")


def _words(kind: str, message: str, context: Mapping[str, Any]) -> str:
    match kind:
        case "missing":
            return "required"
        case "string_type":
            return "a string"
        case "string_too_short" | "too_short":
            return f"at least {context['min_length']} long"
        case "string_too_long" | "too_long":
            return f"at most {context['max_length']} long"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "an object"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "string_pattern_mismatch":
            return "1 to 64 letters, digits, _ . or -"
        case _:
            return message.removeprefix("Input should be ")
