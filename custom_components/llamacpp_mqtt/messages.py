"""Between Home Assistant's chat log and the protocol: messages, tools, schemas, pieces of an answer."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

import voluptuous as vol
from homeassistant.components import conversation
from homeassistant.core import HomeAssistant
from homeassistant.helpers import llm
from homeassistant.helpers.json import json_dumps
from homeassistant.util import slugify
from homeassistant.util.ulid import ulid_now
from voluptuous_openapi import convert

from .asking import Asking
from .bus_worker import BusWorker
from .errors import ended_error, sentence_error

Serializer = Callable[[Any], Any] | None


def tool_for(tool: llm.Tool, serializer: Serializer) -> dict[str, Any]:
    """A tool of the house as the protocol takes it."""
    function: dict[str, Any] = {"name": tool.name, "parameters": convert(tool.parameters, custom_serializer=serializer)}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def response_format(name: str, structure: vol.Schema, llm_api: llm.APIInstance | None) -> dict[str, Any]:
    """What the answer has to keep to."""
    serializer = llm_api.custom_serializer if llm_api else llm.selector_serializer
    schema = convert(structure, custom_serializer=serializer)
    _close(schema)
    return {
        "type": "json_schema",
        "json_schema": {"name": slugify(name)[:64] or "data", "strict": True, "schema": schema},
    }


def _close(schema: Any) -> None:
    """An object has the properties that it names and no others: a grammar would allow any."""
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)
        for each in schema["properties"].values():
            _close(each)
    _close(schema.get("items"))


async def message_for(hass: HomeAssistant, worker: BusWorker, content: conversation.Content) -> dict[str, Any] | None:
    """One entry of the chat log as a chat message; None for an empty system prompt. Thinking is not sent back."""
    if isinstance(content, conversation.SystemContent):
        return {"role": "system", "content": content.content} if content.content else None
    if isinstance(content, conversation.ToolResultContent):
        return {"role": "tool", "tool_call_id": content.tool_call_id, "content": json_dumps(content.tool_result)}
    if isinstance(content, conversation.AssistantContent):
        message: dict[str, Any] = {"role": "assistant", "content": content.content or ""}
        if content.tool_calls:
            message["tool_calls"] = [_call(call) for call in content.tool_calls]
        return message
    if not content.attachments:
        return {"role": "user", "content": content.content}
    if worker.status is not None and not worker.status.vision:
        raise sentence_error("no_vision", worker=worker.name)
    images = [(attachment.path, attachment.mime_type) for attachment in content.attachments]
    most_bytes = worker.status.max_request_bytes if worker.status is not None else 1024 * 1024
    parts = await hass.async_add_executor_job(_image_parts, images, most_bytes)
    return {"role": "user", "content": [{"type": "text", "text": content.content}, *parts]}


def _call(call: llm.ToolInput) -> dict[str, Any]:
    function = {"name": call.tool_name, "arguments": json_dumps(call.tool_args)}
    return {"id": call.id, "type": "function", "function": function}


def _image_parts(images: list[tuple[Path, str]], most_bytes: int) -> list[dict[str, Any]]:
    """Read from the disk, so not to be called in the event loop."""
    parts = []
    room = most_bytes
    for path, mime_type in images:
        if not mime_type.startswith("image/"):
            raise sentence_error("not_an_image", file=path.name, type=mime_type)
        try:
            room -= path.stat().st_size * 4 // 3
            if room <= 0:
                raise sentence_error("request_too_large", kib="?", most=str(most_bytes // 1024))
            data = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise sentence_error("unreadable", file=path.name, reason=str(error.strerror)) from error
        parts.append({"type": "image_url", "image_url": {"url": f"data:{mime_type};base64,{data}"}})
    return parts


async def deltas(worker: BusWorker, asking: Asking) -> AsyncGenerator[conversation.AssistantContentDeltaDict]:
    """The answer as the chat log takes it: text and thinking as they come, the calls of tools whole and at the end."""
    yield {"role": "assistant"}
    async for piece in asking.pieces():
        yield {"content": piece.text} if piece.kind == "content" else {"thinking_content": piece.text}
    end = asking.end or {}
    if end.get("type") != "done":
        raise ended_error(worker, end)
    if end.get("finish_reason") == "cancelled":
        raise sentence_error("cancelled", worker=worker.name)
    if calls := asking.reader.tool_calls:
        yield {"tool_calls": [_tool_input(worker, call) for call in calls]}
    elif not asking.reader.content:
        key = "only_thought" if end.get("finish_reason") == "length" else "empty"
        raise sentence_error(key, worker=worker.name)


def _tool_input(worker: BusWorker, call: Mapping[str, Any]) -> llm.ToolInput:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise sentence_error("bad_tool_call", worker=worker.name, tool=str(function.get("name")))
    return llm.ToolInput(id=str(call.get("id") or ulid_now()), tool_name=function["name"], tool_args=arguments)
