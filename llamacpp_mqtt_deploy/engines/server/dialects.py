"""What a chat completion request looks like in the two dialects: llama.cpp's server, and whoever speaks OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llamacpp_mqtt_deploy.core.deltas import SAMPLING_FIELDS, EngineCall
from llamacpp_mqtt_deploy.core.errors import BadRequest

Dialect = Literal["llamacpp", "openai"]

LLAMACPP_ONLY = ("top_k", "min_p", "repeat_penalty")
"""Sampling fields that OpenAI's API does not have; some servers answer 400 to a field that they do not know."""


def body(call: EngineCall, dialect: Dialect, *, model: str | None) -> dict[str, Any]:
    """The JSON body of POST /v1/chat/completions: only what the call holds, never a field of the client's own."""
    fields: dict[str, Any] = {
        "messages": list(call.messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model is not None:
        fields["model"] = model
    left_out = LLAMACPP_ONLY if dialect == "openai" else ()
    for name in SAMPLING_FIELDS:
        value = call.sampling.get(name)
        if value is not None and name not in left_out:
            fields[name] = value
    if call.tools:
        fields["tools"] = list(call.tools)
        if call.tool_choice is not None:
            fields["tool_choice"] = call.tool_choice
        if call.parallel_tool_calls is not None:
            fields["parallel_tool_calls"] = call.parallel_tool_calls
    if call.response_format is not None:
        fields["response_format"] = call.response_format
    if dialect == "llamacpp":
        _add_llamacpp(fields, call)
    elif fields.get("seed") == -1:
        del fields["seed"]  # llama.cpp's word for "a new one each time", which is OpenAI's default
    return fields


def unsupported(call: EngineCall, dialect: Dialect) -> tuple[str, ...]:
    """Names of the request fields that this dialect cannot carry and `body` leaves out."""
    if dialect == "llamacpp":
        return ()
    names = [name for name in LLAMACPP_ONLY if call.sampling.get(name) is not None]
    names += [name for name in ("thinking", "thinking_budget") if getattr(call, name) is not None]
    return tuple(names)


def _add_llamacpp(fields: dict[str, Any], call: EngineCall) -> None:
    # Progress events are what makes the server look whether the client is still there while it processes a prompt and
    # another slot generates; without them a cancel waits for the whole prompt (measured: 5.6 s against 0.1-0.4 s).
    fields["return_progress"] = True
    # A server started with `--reasoning-format none` would mix thoughts into the answer.
    fields["reasoning_format"] = "auto"
    if call.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": call.thinking}
    if call.thinking_budget is not None:
        fields["reasoning_budget_tokens"] = call.thinking_budget
    if isinstance(call.tool_choice, Mapping) and call.tools:
        # llama.cpp takes only words here: one named tool is the same as having to call the only one there is.
        name = (call.tool_choice.get("function") or {}).get("name")
        fields["tools"] = [tool for tool in call.tools if (tool.get("function") or {}).get("name") == name]
        fields["tool_choice"] = "required"
        if not fields["tools"]:
            raise BadRequest(
                "tool_choice names a tool that is not in tools.", fields={"tool_choice": "a tool of tools"}
            )


def template_thinks(template: str) -> bool:
    """A guess whether a chat template belongs to a reasoning model; the server does not say."""
    return any(mark in template for mark in ("enable_thinking", "<think>", "reasoning_content", "reasoning_effort"))
