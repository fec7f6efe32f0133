"""Ollama's `/api/chat` and `/api/generate`: lines of JSON, whole answers, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.framing import json_line, ndjson
from llamacpp_mqtt_deploy.core.formats.ollama_body import parse_ollama_chat, parse_ollama_generate
from llamacpp_mqtt_deploy.core.formats.rendering import (
    NDJSON,
    Dialect,
    EventStream,
    HttpReply,
    Occasion,
    cancelled_error,
    error_headers,
    message_of,
    status_of,
    utc_text,
)
from llamacpp_mqtt_deploy.core.formats.telling import (
    Tokens,
    WholeCall,
    calls_of,
    finish_of,
    json_object,
    reasoning_of,
    text_of,
)

_NS_PER_MS = 1_000_000


def ollama_error(error: Mapping[str, Any]) -> dict[str, str]:
    return {"error": message_of(error)}


def ollama_failure(error: Mapping[str, Any]) -> HttpReply:
    """The whole answer to a request that failed."""
    return HttpReply(status=status_of(error), body=json_line(ollama_error(error)), headers=error_headers(error))


_Say = Callable[[str, str, Sequence[Mapping[str, Any]]], dict[str, Any]]
"""Text, thinking and tool calls as one of the two endpoints tells them."""


def _head(occasion: Occasion) -> dict[str, Any]:
    return {"model": occasion.model, "created_at": utc_text(occasion.now())}


def _chat_said(content: str, thinking: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = list(calls)
    return {"message": message}


def _generate_said(content: str, thinking: str, _calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"response": content} | ({"thinking": thinking} if thinking else {})


def _end(done: Mapping[str, Any]) -> dict[str, Any]:
    """`done` with its counts; times in nanoseconds. The prompt is what passed from the slot to the first piece."""
    tokens = Tokens.of(done)
    timings = done.get("timings")
    told = timings if isinstance(timings, Mapping) else {}
    total, queue, first = (_ms(told.get(name)) for name in ("total_ms", "queue_ms", "first_token_ms"))
    first = first or total
    return {
        "done": True,
        "done_reason": "length" if finish_of(done) == "length" else "stop",
        "total_duration": total * _NS_PER_MS // 1000,
        "load_duration": 0,
        "prompt_eval_count": tokens.prompt,
        "prompt_eval_duration": max(0, first - queue) * _NS_PER_MS // 1000,
        "eval_count": tokens.completion,
        "eval_duration": max(0, total - first) * _NS_PER_MS // 1000,
    }


def _ms(value: Any) -> int:
    """Thousandths of a millisecond."""
    return round(value * 1000) if isinstance(value, int | float) and value > 0 else 0


def _called(calls: Sequence[WholeCall], *, first: int = 0) -> list[dict[str, Any]]:
    """Calls as this API has them, with arguments as an object; one that was cut off has none and is left out."""
    given = [(call, json_object(call.arguments or "{}")) for call in calls]
    return [
        {"id": call.id, "function": {"index": number, "name": call.name, "arguments": arguments}}
        for number, (call, arguments) in enumerate(((c, a) for c, a in given if a is not None), start=first)
    ]


class OllamaStream(EventStream):
    """Lines of JSON, the last of them with `done` true; an error is a last line `{"error": ...}` instead.

    Tool calls are told whole, when their arguments are an object. There is no comment in lines of JSON: a ping is a line without
    text.
    """

    content_type = NDJSON

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        super().__init__(asked, occasion)
        self._said: _Say = _chat_said
        self._calls: dict[int, WholeCall] = {}
        self._calls_told = 0

    def _pings(self) -> bytes:
        return self._line(self._said("", "", ()))

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        return [part for piece in news for part in self._piece(piece)]

    def _piece(self, piece: Spoken) -> list[bytes]:
        match piece:
            case Text():
                return [self._line(self._said(piece.text, "", ()))]
            case Reasoning():
                return [self._line(self._said("", piece.text, ()))]
            case ToolCall():
                known = self._calls.get(piece.index, WholeCall(piece.id or "", piece.name or "", ""))
                call = WholeCall(known.id, known.name, known.arguments + piece.arguments)
                self._calls[piece.index] = call
                whole = piece.arguments.rstrip().endswith("}") and json_object(call.arguments) is not None
                return self._tell_call(piece.index) if whole else []

    def _tell_call(self, index: int) -> list[bytes]:
        told = _called([self._calls.pop(index)], first=self._calls_told)
        self._calls_told += len(told)
        return [self._line(self._said("", "", told))] if told else []

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        calls = [part for index in list(self._calls) for part in self._tell_call(index)]
        return [*calls, ndjson(_head(self._occasion) | self._said("", "", ()) | _end(done))]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [ndjson(ollama_error(error))]

    def _line(self, said: Mapping[str, Any]) -> bytes:
        return ndjson({**_head(self._occasion), **said, "done": False})


class OllamaGenerateStream(OllamaStream):
    """The same with `response` in place of `message`."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        super().__init__(asked, occasion)
        self._said = _generate_said


class OllamaWhole:
    """One object with the whole message and `done` true."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        self._occasion = occasion
        self._said: _Say = _chat_said

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        if finish_of(done) == "cancelled":
            return self.failure(cancelled_error(done))
        said = self._said(text_of(done), reasoning_of(done), _called(calls_of(done)))
        return HttpReply(status=200, body=json_line(_head(self._occasion) | said | _end(done)))

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return ollama_failure(error)


class OllamaGenerateWhole(OllamaWhole):
    """The same with `response` in place of `message`."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        super().__init__(asked, occasion)
        self._said = _generate_said


def _loaded(asked: Asked, occasion: Occasion, said: Mapping[str, Any]) -> HttpReply:
    reason = "unload" if asked.echo.get("unload") else "load"
    told = {**_head(occasion), **said, "done": True, "done_reason": reason}
    return HttpReply(
        status=200, body=json_line(told) + b"\n", content_type=NDJSON if asked.streams else "application/json"
    )


def chat_loaded(asked: Asked, occasion: Occasion) -> HttpReply:
    """The answer to a chat without messages: the model is loaded (it is the worker that loads it)."""
    return _loaded(asked, occasion, _chat_said("", "", ()))


def generate_loaded(asked: Asked, occasion: Occasion) -> HttpReply:
    """The answer to a generation without a prompt."""
    return _loaded(asked, occasion, _generate_said("", "", ()))


OLLAMA_CHAT = Dialect(
    name="ollama_chat",
    parse=parse_ollama_chat,
    stream=OllamaStream,
    whole=OllamaWhole,
    failure=ollama_failure,
    idle=chat_loaded,
)
OLLAMA_GENERATE = Dialect(
    name="ollama_generate",
    parse=parse_ollama_generate,
    stream=OllamaGenerateStream,
    whole=OllamaGenerateWhole,
    failure=ollama_failure,
    idle=generate_loaded,
)
