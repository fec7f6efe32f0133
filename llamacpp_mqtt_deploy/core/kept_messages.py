"""Makes what an earlier version kept of a session fit for use: types that a chat template, and our own code, can rely on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.deltas import Message

_ROLES = ("system", "user", "assistant", "tool")


def mended(messages: Sequence[object]) -> tuple[Message, ...]:
    """The messages with texts for ids, names and arguments; what is no message, or no call, is left out.

    A good history comes out as it is, object for object: the bytes of its JSON are what the engine has cached.
    """
    return tuple(
        message if _is_good(message) else _mended(message)
        for message in messages
        if isinstance(message, Mapping) and message.get("role") in _ROLES
    )


def _is_good(message: Mapping[str, Any]) -> bool:
    calls = message.get("tool_calls")
    if not isinstance(message.get("tool_call_id", ""), str):
        return False
    return calls is None or (isinstance(calls, list | tuple) and all(map(_is_call, calls)))


def _is_call(call: object) -> bool:
    if not isinstance(call, Mapping) or not isinstance(call.get("id"), str) or not call["id"]:
        return False
    function = call.get("function")
    return isinstance(function, Mapping) and all(isinstance(function.get(name), str) for name in ("name", "arguments"))


def _mended(message: Mapping[str, Any]) -> Message:
    changed = {name: value for name, value in message.items() if name != "tool_calls"}
    if "tool_call_id" in changed:
        changed["tool_call_id"] = _id(changed["tool_call_id"]) or ""
    told = message.get("tool_calls")
    calls = [
        call if _is_call(call) else _call(index, call)
        for index, call in enumerate(told if isinstance(told, list | tuple) else ())
        if isinstance(call, Mapping) and isinstance(_name(call), str)
    ]
    if calls:
        changed["tool_calls"] = calls
    elif changed["role"] == "assistant" and changed.get("content") is None:
        changed["content"] = ""
    return changed


def _call(index: int, call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    function = {"name": _name(call), "arguments": arguments if isinstance(arguments, str) else "{}"}
    return {"id": _id(call.get("id")) or f"call_{index}", "type": "function", "function": function}


def _name(call: Mapping[str, Any]) -> object:
    function = call.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


def _id(value: object) -> str:
    """Numbers as text, so that calls and results still find each other."""
    return str(value) if isinstance(value, str | int | float) else ""
