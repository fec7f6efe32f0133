"""Chat messages, tools and answer formats in OpenAI's shape, as far as they may come from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from llamacpp_mqtt_deploy.core.json_schema_limits import reference_fault
from llamacpp_mqtt_deploy.core.validation import Expect, FirstFault, ShortText, WireModel, fault, faults

MAX_PARTS = 256
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 16 * 1024
MAX_SCHEMA_DEPTH = 24
"""Levels of a JSON schema; engines turn it into a grammar by recursion."""

_IMAGE = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,(?P<data>[A-Za-z0-9+/]+={0,2})")

CallId = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
FunctionName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$"),
    Expect("1 to 64 letters, digits, _ . or -"),
]


# --- schemas of the client's own -------------------------------------------------------------------------------------


def _check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if len(orjson.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise fault(f"a JSON schema of at most {MAX_SCHEMA_BYTES} bytes")
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise fault(f"a JSON schema of at most {MAX_SCHEMA_DEPTH} levels")
        level = [inner for part in level for inner in _inner(part) if isinstance(inner, dict | list)]
    expected = reference_fault(schema)
    if expected is not None:
        raise fault(expected)
    return schema


def _inner(part: Any) -> Iterator[Any]:
    yield from part.values() if isinstance(part, dict) else part


JsonSchema = Annotated[dict[str, Any], AfterValidator(_check_schema), Expect("a JSON schema (an object)")]


# --- messages --------------------------------------------------------------------------------------------------------


class TextPart(WireModel):
    """A piece of text."""

    type: Literal["text"]
    """Always `text`."""
    text: str
    """The text."""


def _check_image(url: str) -> str:
    # llama-server downloads any http URL and opens any file URL it is given.
    found = _IMAGE.fullmatch(url)
    if found is None or len(found["data"]) % 4:
        raise fault("data:image/png;base64,... (or jpeg, webp, gif); addresses are not fetched")
    return url


class ImageUrl(WireModel):
    """The picture itself, not its address."""

    url: Annotated[str, AfterValidator(_check_image)]
    """`data:image/png;base64,...`, or jpeg, webp, gif."""
    detail: Literal["auto", "low", "high"] | None = None
    """How closely to look, where the model knows such a thing."""


class ImagePart(WireModel):
    """A picture."""

    type: Literal["image_url"]
    """Always `image_url`."""
    image_url: ImageUrl
    """The picture."""


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


class CalledFunction(WireModel):
    """The function of a tool call."""

    # No more is asked of it than of a model that made it up: the `message` of a `done` must be welcome here.
    name: Annotated[str, StringConstraints(max_length=1024)]
    """Its name."""
    arguments: str
    """A JSON text."""


class CalledTool(WireModel):
    """A tool call of an earlier answer."""

    id: Annotated[str, StringConstraints(max_length=1024)]
    """The name of the call, to which a tool message answers."""
    type: Literal["function"] = "function"
    """Always `function`."""
    function: CalledFunction
    """What was called."""


class SystemMessage(WireModel):
    """Instructions."""

    role: Literal["system", "developer"]
    """`developer` means the same as `system`."""
    content: TextContent
    """The instructions."""
    name: ShortText | None = None
    """Who speaks."""


class UserMessage(WireModel):
    """What a user said."""

    role: Literal["user"]
    """Always `user`."""
    content: UserContent
    """Text, or text and pictures."""
    name: ShortText | None = None
    """Who speaks."""


class AssistantMessage(WireModel):
    """An earlier answer; the `message` of a `done` fits unchanged."""

    role: Literal["assistant"]
    """Always `assistant`."""
    content: TextContent | None = None
    """Its text; may be absent when it called tools."""
    reasoning_content: str | None = None
    """Its thinking."""
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS), FirstFault()] | None = None
    """The tools it called."""
    name: ShortText | None = None
    """Who speaks."""

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise fault("content, or tool_calls")
        return self


class ToolMessage(WireModel):
    """The result of a tool call."""

    role: Literal["tool"]
    """Always `tool`."""
    content: TextContent
    """The result."""
    tool_call_id: CallId
    """The call that it answers."""
    name: ShortText | None = None
    """The tool."""


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


class ToolResult(WireModel):
    """The result of a tool call of the last answer."""

    tool_call_id: CallId
    """The call that it answers."""
    content: str
    """The result."""


# --- tools and formats -----------------------------------------------------------------------------------------------


class Function(WireModel):
    """A function that the model may call."""

    name: FunctionName
    """Its name."""
    description: Annotated[str, StringConstraints(max_length=MAX_SCHEMA_BYTES)] | None = None
    """What it does, for the model."""
    parameters: JsonSchema | None = None
    """A JSON schema of its arguments, at most 16 KiB; `$ref` only within it."""
    strict: bool | None = None
    """Whether arguments must follow the schema exactly."""


class Tool(WireModel):
    """A tool that the model may call."""

    type: Literal["function"]
    """Always `function`."""
    function: Function
    """What it is."""


class NamedFunction(WireModel):
    """The one function to call."""

    name: FunctionName
    """One of the offered ones."""


class NamedTool(WireModel):
    """The one tool to call."""

    type: Literal["function"]
    """Always `function`."""
    function: NamedFunction
    """Which one."""


def _choice_tag(value: Any) -> str | None:
    return "@word" if isinstance(value, str) else "@named" if isinstance(value, dict | NamedTool) else None


TOOL_CHOICES = 'auto, none, required or {"type": "function", "function": {"name": ...}}'
ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("@word")] | Annotated[NamedTool, Tag("@named")],
    _discriminator(_choice_tag, TOOL_CHOICES),
]


class NamedSchema(WireModel):
    """A schema that the answer follows."""

    name: FunctionName = "answer"
    """Its name; some servers want one."""
    description: Annotated[str, StringConstraints(max_length=MAX_SCHEMA_BYTES)] | None = None
    """What it is for, for the model."""
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    """The JSON schema, at most 16 KiB; `$ref` only within it."""
    strict: bool | None = None
    """Whether the answer must follow it exactly."""


class ResponseFormat(WireModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    """Free text, any JSON object, or JSON that follows a schema."""
    json_schema: NamedSchema | None = None
    """The schema, with the type `json_schema` only."""

    @model_validator(mode="before")
    @classmethod
    def _schema_in_its_place(cls, value: Any) -> Any:
        # Some servers read `schema` beside `json_object`; leaving it out in silence would lose the constraint.
        if isinstance(value, dict) and "schema" in value:
            raise fault('{"type": "json_schema", "json_schema": {"schema": ...}} for a schema')
        return value

    @model_validator(mode="after")
    def _schema_when_named(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault("json_schema with the type json_schema, and only then")
        return self


_TOOLS: TypeAdapter[list[Tool]] = TypeAdapter(list[Tool])


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences about what is wrong with a route's own tools; empty when they can be offered."""
    try:
        checked = _TOOLS.validate_python([dict(tool) for tool in tools])
    except ValidationError as error:
        return [f"tools{path}: expected {words}" for path, words in faults(error, {}).items()]
    names = [tool.function.name for tool in checked]
    return [f"two tools are called {name}" for name in sorted({n for n in names if names.count(n) > 1})]
