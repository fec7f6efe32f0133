"""From a body of Anthropic's `/v1/messages` to a request on the bus.

`REFUSED` are told as errors, because an answer without them would be another one than was asked for. `cache_control` is ignored
wherever it stands: engines keep the beginning of a prompt by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.formats.asked import Asked, BodyFields, bad, checked, model_of, unserved

PASSED = ("temperature", "top_p", "top_k", "max_tokens")
RENAMED: Mapping[str, str] = {"stop_sequences": "stop"}
REFUSED: Mapping[str, str] = {
    "container": "tools run where the client runs",
    "mcp_servers": "tools run where the client runs",
}
IGNORED = (
    "cache_control", "context_management", "inference_geo", "metadata", "output_config.effort", "service_tier", "speed",
    "tools[].cache_control", "tools[].strict", "tool_result.is_error",
)  # fmt: skip

# A system block with which a client bills its own requests. It changes with every request, and in front of a prompt it would
# make the engine read all of it anew.
_BILLING = "x-anthropic-billing-header:"

_FILES = "files have to come as data"
_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "thinking_budget": "thinking.budget_tokens",
}


def parse_messages(fields: Mapping[str, Any]) -> Asked:
    """A body of `/v1/messages` or `/v1/messages/count_tokens`. Raises BadRequest and Unsupported, which name the field."""
    body = BodyFields(fields)
    body.refuse(REFUSED)
    talk = _Talk()
    if system := _system(body):
        talk.add("system", {"role": "system", "content": system})
    for message in body.objects("messages"):
        _add_message(talk, message)
    if not talk.messages or all(message["role"] == "system" for message in talk.messages):
        raise bad("messages", "a list of messages, at least one of the user")
    request = body.named({**{name: name for name in PASSED}, **RENAMED})
    request |= {"messages": talk.messages} | _thinking(body) | _tools(body) | _format(body)
    thinking = body.object("thinking")
    shown = thinking is not None and request.get("thinking") is True and thinking.get("display") != "omitted"
    return Asked(
        request=checked(request, names=_NAMES, origins=talk.origins),
        streams=body.flag("stream") is True,
        model=model_of(body),
        echo={"thinking": shown},
    )


# --- messages --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Talk:
    """Messages as the bus has them, and the path of what each was made of."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)

    def add(self, path: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.origins.append(path)


def _system(body: BodyFields) -> str:
    system = body.get("system")
    if isinstance(system, str):
        return system
    blocks = [text for block in body.objects("system") if not (text := _block_text(block)).startswith(_BILLING)]
    return "\n\n".join(blocks)


def _block_text(block: BodyFields) -> str:
    if block.get("type") != "text":
        raise bad(block.path("type"), "text")
    return block.needed_text("text")


def _add_message(talk: _Talk, message: BodyFields) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise bad(message.path("role"), "user or assistant")
    if isinstance(content, str):
        talk.add(message.path("content"), {"role": role, "content": content})
    elif not isinstance(content, list):
        raise bad(message.path("content"), "a text or a list of content blocks")
    elif role == "user":
        _add_user(talk, message)
    elif role == "assistant":
        _add_assistant(talk, message)
    else:
        texts = [_block_text(block) for block in message.objects("content")]
        talk.add(message.path("content"), {"role": role, "content": "\n\n".join(texts)})


def _add_user(talk: _Talk, message: BodyFields) -> None:
    """Results of tools as messages of their own, in front of what the user says; pictures in them are shown by the user."""
    parts: list[dict[str, Any]] = []
    for block in message.objects("content"):
        if block.get("type") == "tool_result":
            texts, pictures = _result(block)
            result = {"role": "tool", "tool_call_id": block.needed_text("tool_use_id"), "content": "\n".join(texts)}
            talk.add(block.own_path, result)
            parts += pictures
        else:
            parts.append(_part(block))
    if parts:
        only_text = all(part["type"] == "text" for part in parts)
        content = parts[0]["text"] if only_text and len(parts) == 1 else parts
        talk.add(message.path("content"), {"role": "user", "content": content})


def _result(block: BodyFields) -> tuple[list[str], list[dict[str, Any]]]:
    content = block.get("content")
    if content is None or isinstance(content, str):
        return [content or ""], []
    parts = [_part(inner) for inner in block.objects("content")]
    return [part["text"] for part in parts if part["type"] == "text"], [
        part for part in parts if part["type"] != "text"
    ]


def _part(block: BodyFields) -> dict[str, Any]:
    match block.get("type"):
        case "text":
            return {"type": "text", "text": block.needed_text("text")}
        case "image":
            return {"type": "image_url", "image_url": {"url": _image(block)}}
        case "document":
            return {"type": "text", "text": _document(block)}
        case _:
            raise bad(block.path("type"), "text, image, document (of text) or tool_result")


def _image(block: BodyFields) -> str:
    source = BodyFields.of(block.get("source"), block.path("source"))
    if source.get("type") != "base64":
        raise unserved(source.path("type"), _FILES + " (base64), addresses are not fetched")
    return f"data:{source.needed_text('media_type')};base64,{source.needed_text('data')}"


def _document(block: BodyFields) -> str:
    source = BodyFields.of(block.get("source"), block.path("source"))
    if source.get("type") != "text":
        raise unserved(source.path("type"), "documents have to come as text")
    title = block.text("title")
    return (f"{title}\n\n" if title else "") + source.needed_text("data")


def _add_assistant(talk: _Talk, message: BodyFields) -> None:
    texts, thoughts, calls = [], [], []
    for block in message.objects("content"):
        match block.get("type"):
            case "text":
                texts.append(block.needed_text("text"))
            case "thinking":
                thoughts.append(block.needed_text("thinking"))
            case "redacted_thinking":
                pass  # somebody else's, and nobody here can read it
            case "tool_use":
                calls.append(_call(block))
            case _:
                raise bad(block.path("type"), "text, thinking or tool_use")
    told: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if thoughts:
        told["reasoning_content"] = "".join(thoughts)
    if calls:
        told["tool_calls"] = calls
    talk.add(message.path("content"), told)


def _call(block: BodyFields) -> dict[str, Any]:
    given = BodyFields.of(block.get("input") or {}, block.path("input"))
    function = {"name": block.needed_text("name"), "arguments": orjson.dumps(given.fields).decode()}
    return {"id": block.needed_text("id"), "type": "function", "function": function}


# --- tools, thinking, format -----------------------------------------------------------------------------------------


def _tools(body: BodyFields) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if body.list("tools") is not None:
        told["tools"] = list(_offered(body))
    choice = body.object("tool_choice")
    if choice is None:
        return told
    match choice.get("type"):
        case "auto" | "none" as word:
            told["tool_choice"] = word
        case "any":
            told["tool_choice"] = "required"
        case "tool":
            told["tool_choice"] = {"type": "function", "function": {"name": choice.needed_text("name")}}
        case _:
            raise bad(choice.path("type"), "auto, any, tool or none")
    if choice.flag("disable_parallel_tool_use") is True:
        told["parallel_tool_calls"] = False
    return told


def _offered(body: BodyFields) -> Iterator[dict[str, Any]]:
    for tool in body.objects("tools"):
        if tool.get("type") not in (None, "custom"):
            raise unserved(tool.path("type"), "only tools with an input_schema of their own can be offered")
        function = {"name": tool.needed_text("name"), "parameters": tool.get("input_schema")}
        if description := tool.text("description"):
            function["description"] = description
        yield {"type": "function", "function": function}


def _thinking(body: BodyFields) -> dict[str, Any]:
    thinking = body.object("thinking")
    if thinking is None:
        return {}
    match thinking.get("type"):
        case "enabled":
            budget = thinking.get("budget_tokens")
            return {"thinking": True} | ({} if budget is None else {"thinking_budget": budget})
        case "adaptive":
            return {"thinking": True}
        case "disabled":
            return {"thinking": False}
        case _:
            raise bad(thinking.path("type"), "enabled, adaptive or disabled")


def _format(body: BodyFields) -> dict[str, Any]:
    config = body.object("output_config")
    told = (config.object("format") if config is not None else None) or body.object("output_format")
    if told is None:
        return {}
    if told.get("type") != "json_schema":
        raise bad(told.path("type"), "json_schema")
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": told.get("schema")}}}
