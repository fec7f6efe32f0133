"""Anthropic's `/v1/messages`: its stream of events, its whole answers, its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.formats.anthropic_body import parse_messages
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.blocks import BlockBegun, BlockEnded, BlockGrown, BlockOrder, BlockStep
from llamacpp_mqtt_deploy.core.formats.framing import json_line, sse_event
from llamacpp_mqtt_deploy.core.formats.rendering import (
    Dialect,
    EventStream,
    HttpReply,
    Occasion,
    cancelled_error,
    code_of,
    error_headers,
    message_of,
    status_of,
)
from llamacpp_mqtt_deploy.core.formats.telling import (
    Tokens,
    calls_of,
    finish_of,
    json_object,
    reasoning_of,
    text_of,
)

_ERROR_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message"}}`; the kind follows the HTTP status."""
    message = message_of(error)
    needed, room = error.get("n_prompt_tokens"), error.get("n_ctx")
    if code_of(error) == "context_overflow" and isinstance(needed, int) and isinstance(room, int):
        # Programs look for these words, to shorten the conversation and go on.
        message = f"prompt is too long: {needed} tokens > {room} maximum. {message}"
    return {"type": "error", "error": {"type": _ERROR_TYPES.get(status_of(error), "api_error"), "message": message}}


def anthropic_failure(error: Mapping[str, Any]) -> HttpReply:
    """The whole answer to a request that failed."""
    return HttpReply(status=status_of(error), body=json_line(anthropic_error(error)), headers=error_headers(error))


def tokens_counted(input_tokens: int) -> HttpReply:
    """The answer of `/v1/messages/count_tokens`."""
    return HttpReply(status=200, body=json_line({"input_tokens": input_tokens}))


class AnthropicStream(EventStream):
    """`message_start`, then for each block `content_block_start`, `_delta`s and `_stop`, then `message_delta`, `message_stop`.

    Thinking is told only to clients that asked for it: the others read the first block as the text. An error is an `error`
    event, and no `message_stop` follows.
    """

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        super().__init__(asked, occasion)
        self._begun = False
        self._blocks = BlockOrder()
        self._prompt = Tokens(0, 0, 0, 0)

    def _pings(self) -> bytes:
        return sse_event("ping", {"type": "ping"})

    def _waits(self, event: Mapping[str, Any]) -> list[bytes]:
        if event.get("type") == "progress":
            told = {"prompt_tokens": event.get("total"), "cached_tokens": event.get("cached")}
            self._prompt = Tokens.of({"usage": told})
        return []

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        shown = [piece for piece in news if self._asked.echo.get("thinking") or not isinstance(piece, Reasoning)]
        steps = self._blocks.feed(shown)
        return self._begin() + _rendered(steps) if steps else []

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        end = {
            "type": "message_delta",
            "delta": {"stop_reason": _stop_reason(done), "stop_sequence": _stop_sequence(done)},
            "usage": _usage(Tokens.of(done)),
        }
        blocks = self._begin() + _rendered(self._blocks.end())
        return [*blocks, sse_event("message_delta", end), sse_event("message_stop", {"type": "message_stop"})]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [sse_event("error", anthropic_error(error))]

    def _begin(self) -> list[bytes]:
        if self._begun:
            return []
        self._begun = True
        message = _message(self._occasion, content=[], stop_reason=None, stop_sequence=None, tokens=self._prompt)
        return [sse_event("message_start", {"type": "message_start", "message": message})]


def _rendered(steps: Sequence[BlockStep]) -> list[bytes]:
    return [part for step in steps for part in _step(step)]


def _step(step: BlockStep) -> list[bytes]:
    match step:
        case BlockBegun():
            return [_of_block("start", step.number, {"content_block": _empty_block(step.first)})]
        case BlockGrown():
            return [_of_block("delta", step.number, {"delta": _delta(step)})]
        case BlockEnded():
            stop = _of_block("stop", step.number, {})
            if not isinstance(step.first, Reasoning):
                return [stop]
            # Nobody signs it here, but readers wait for the field.
            return [_of_block("delta", step.number, {"delta": {"type": "signature_delta", "signature": ""}}), stop]


def _of_block(what: str, number: int, fields: Mapping[str, Any]) -> bytes:
    name = f"content_block_{what}"
    return sse_event(name, {"type": name, "index": number, **fields})


def _empty_block(first: Spoken) -> dict[str, Any]:
    match first:
        case Text():
            return {"type": "text", "text": ""}
        case Reasoning():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case ToolCall():
            return {"type": "tool_use", "id": first.id, "name": first.name, "input": {}}


def _delta(step: BlockGrown) -> dict[str, Any]:
    if step.kind is Text:
        return {"type": "text_delta", "text": step.text}
    if step.kind is Reasoning:
        return {"type": "thinking_delta", "thinking": step.text}
    return {"type": "input_json_delta", "partial_json": step.text}


# --- whole answers ---------------------------------------------------------------------------------------------------


class AnthropicWhole:
    """One `message` object; a tool call that was cut off is left out, since its input is no object."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        self._asked = asked
        self._occasion = occasion

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        if finish_of(done) == "cancelled":
            return self.failure(cancelled_error(done))
        message = _message(
            self._occasion,
            content=self._content(done),
            stop_reason=_stop_reason(done),
            stop_sequence=_stop_sequence(done),
            tokens=Tokens.of(done),
        )
        return HttpReply(status=200, body=json_line(message))

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return anthropic_failure(error)

    def _content(self, done: Mapping[str, Any]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        if self._asked.echo.get("thinking") and (reasoning := reasoning_of(done)):
            content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if text := text_of(done):
            content.append({"type": "text", "text": text})
        for call in calls_of(done):
            given = json_object(call.arguments or "{}")
            if given is not None:
                content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
        return content


def _message(
    occasion: Occasion,
    *,
    content: Sequence[Mapping[str, Any]],
    stop_reason: str | None,
    stop_sequence: str | None,
    tokens: Tokens,
) -> dict[str, Any]:
    return {
        "id": f"msg_{occasion.request_id}",
        "type": "message",
        "role": "assistant",
        "model": occasion.model,
        "content": list(content),
        "stop_reason": stop_reason,
        "stop_sequence": stop_sequence,
        "usage": _usage(tokens),
    }


def _usage(tokens: Tokens) -> dict[str, int]:
    """`input_tokens` counts what was not cached, as this API has it."""
    return {
        "input_tokens": max(0, tokens.prompt - tokens.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.cached,
        "output_tokens": tokens.completion,
    }


def _stop_sequence(done: Mapping[str, Any]) -> str | None:
    told = done.get("stop_sequence")
    return told if isinstance(told, str) and told and finish_of(done) == "stop" else None


def _stop_reason(done: Mapping[str, Any]) -> str:
    if _stop_sequence(done) is not None:
        return "stop_sequence"
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(finish_of(done), "end_turn")


ANTHROPIC = Dialect(
    name="anthropic", parse=parse_messages, stream=AnthropicStream, whole=AnthropicWhole, failure=anthropic_failure
)
