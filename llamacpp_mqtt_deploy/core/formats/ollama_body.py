"""From bodies of Ollama's `/api/chat` and `/api/generate` to requests on the bus.

`OPTIONS` are passed on. All other options steer how Ollama runs a model (`num_ctx`, `num_gpu`, `mirostat` and so on); clients send
them always, and a worker has its own settings for them, so they are ignored, as `IGNORED` fields are.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from llamacpp_mqtt_deploy.core.formats.asked import Asked, BodyFields, bad, checked, folded_seed, model_of, unserved

OPTIONS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "num_predict": "max_tokens",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
REFUSED: Mapping[str, str] = {
    "logprobs": "the bus carries no probabilities",
    "top_logprobs": "the bus carries no probabilities",
    "raw": "the worker fills the model's template",
    "suffix": "text is added at the end of a prompt only",
    "template": "the worker fills the model's own template",
}
IGNORED = ("context", "keep_alive", "options: all others", "truncate", "shift")

_NAMES = {ours: f"options.{theirs}" for theirs, ours in OPTIONS.items()} | {"response_format": "format"}

# The first bytes of pictures in base64; Ollama's clients send the data alone.
_PICTURES = (("/9j/", "jpeg"), ("iVBORw0KGgo", "png"), ("R0lGOD", "gif"), ("UklGR", "webp"))


def parse_ollama_chat(fields: Mapping[str, Any]) -> Asked:
    """A body of `/api/chat`; without messages there is nothing to generate, the model is only to be loaded."""
    body = BodyFields(fields)
    body.refuse(REFUSED)
    messages, origins = _messages(body)
    request: dict[str, Any] = {}
    if messages:
        request = {"messages": messages} | _settings(body)
        if body.list("tools"):
            request["tools"] = body.get("tools")
    return _asked(body, request, origins)


def parse_ollama_generate(fields: Mapping[str, Any]) -> Asked:
    """A body of `/api/generate`; without a prompt there is nothing to generate, the model is only to be loaded."""
    body = BodyFields(fields)
    body.refuse(REFUSED)
    prompt, system = body.text("prompt"), body.text("system")
    parts = list(_pictures(body))
    if not (prompt or parts):
        return _asked(body, {}, [])
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _content(prompt or "", parts)})
    return _asked(body, {"messages": messages} | _settings(body), ["system", "prompt"][-len(messages) :])


def _asked(body: BodyFields, request: dict[str, Any], origins: list[str]) -> Asked:
    model = model_of(body)
    return Asked(
        request=checked(request, names=_NAMES, origins=origins) if request else {},
        streams=body.flag("stream") is not False,
        # Ollama's clients add the tag that names without a tag stand for.
        model=model.removesuffix(":latest") if model is not None else None,
        echo={"unload": body.get("keep_alive") in (0, "0", "0s")},
    )


# --- settings --------------------------------------------------------------------------------------------------------


def _settings(body: BodyFields) -> dict[str, Any]:
    options = body.object("options")
    told = {} if options is None else options.named(OPTIONS)
    limit = told.get("max_tokens")
    if isinstance(limit, int | float) and limit < 0:
        del told["max_tokens"]  # as long as it takes
    if "seed" in told:
        told["seed"] = folded_seed(told["seed"])
    return told | _format(body) | _thinking(body)


def _format(body: BodyFields) -> dict[str, Any]:
    told = body.get("format")
    if told in (None, "", {}):
        return {}
    if told == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(told, Mapping):
        return {"response_format": {"type": "json_schema", "json_schema": {"schema": told}}}
    raise bad(body.path("format"), '"json" or a JSON schema (an object)')


def _thinking(body: BodyFields) -> dict[str, Any]:
    told = body.get("think")
    if told is None:
        return {}
    if isinstance(told, bool):
        return {"thinking": told}
    if told in ("low", "medium", "high", "max"):
        return {"thinking": True}  # models here know no degrees of it
    raise bad(body.path("think"), "true, false, low, medium or high")


# --- messages --------------------------------------------------------------------------------------------------------


def _messages(body: BodyFields) -> tuple[list[dict[str, Any]], list[str]]:
    messages: list[dict[str, Any]] = []
    origins: list[str] = []
    calls = _OpenCalls()
    for message in body.objects("messages"):
        messages.append(_message(message, calls))
        origins.append(message.own_path)
    return messages, origins


def _message(message: BodyFields, calls: _OpenCalls) -> dict[str, Any]:
    role, content = message.get("role"), message.text("content") or ""
    match role:
        case "system":
            return {"role": "system", "content": content}
        case "user":
            return {"role": "user", "content": _content(content, list(_pictures(message)))}
        case "tool":
            return {"role": "tool", "content": content, "tool_call_id": calls.answered(message)}
        case "assistant":
            told: dict[str, Any] = {"role": "assistant", "content": content}
            if thinking := message.text("thinking"):
                told["reasoning_content"] = thinking
            if made := list(calls.made(message)):
                told |= {"tool_calls": made, "content": content or None}
            return told
        case _:
            raise bad(message.path("role"), "system, user, assistant or tool")


_NOTHING = ("", "")
"""What a result names that tells neither an id nor a tool."""


class _OpenCalls:
    """Gives the calls of tools ids, where their results name the tool or nothing at all."""

    def __init__(self) -> None:
        self._count = 0
        self._open: dict[int, str] = {}
        """The ids of calls without a result, by their numbers."""
        self._numbers: defaultdict[tuple[str, str], deque[int]] = defaultdict(deque)
        """The numbers of calls, oldest first, by what a result may name; also of those that have a result by now. A body may hold
        tens of thousands of both: nothing may look at all calls for each result."""

    def made(self, message: BodyFields) -> Iterator[dict[str, Any]]:
        for call in message.objects("tool_calls"):
            function = BodyFields.of(call.get("function"), call.path("function"))
            name, given = function.needed_text("name"), function.get("arguments")
            call_id = call.text("id") or f"call_{self._count}"
            self._open[self._count] = call_id
            for named in (("id", call_id), ("name", name), _NOTHING):
                self._numbers[named].append(self._count)
            self._count += 1
            arguments = given if isinstance(given, str) else orjson.dumps(given or {}).decode()
            yield {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def answered(self, message: BodyFields) -> str:
        told, name = message.text("tool_call_id"), message.text("tool_name") or message.text("name")
        call_id = self._oldest(("id", told) if told else _NOTHING if name is None else ("name", name)) or told
        if not call_id:
            raise bad(message.own_path, "the result of a tool that the message before it calls")
        return call_id

    def _oldest(self, named: tuple[str, str]) -> str | None:
        """The id of the oldest call without a result among these, which has one now."""
        numbers = self._numbers.get(named) or deque()
        while numbers:
            if (call_id := self._open.pop(numbers.popleft(), None)) is not None:
                return call_id
        return None


def _content(text: str, pictures: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if not pictures:
        return text
    return [{"type": "text", "text": text}, *pictures] if text else pictures


def _pictures(message: BodyFields) -> Iterator[dict[str, Any]]:
    for number, picture in enumerate(message.list("images") or ()):
        path = f"{message.path('images')}[{number}]"
        if not isinstance(picture, str):
            raise bad(path, "a picture in base64")
        kind = next((kind for begin, kind in _PICTURES if picture.startswith(begin)), None)
        if kind is None:
            raise unserved(path, "pictures have to be png, jpeg, webp or gif in base64")
        yield {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{picture}"}}
