"""OpenAI's `/v1/responses`: its stream of events, its whole answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.blocks import BlockBegun, BlockEnded, BlockGrown, BlockOrder, BlockStep
from llamacpp_mqtt_deploy.core.formats.framing import json_line, sse_event
from llamacpp_mqtt_deploy.core.formats.openai_errors import openai_failure
from llamacpp_mqtt_deploy.core.formats.openai_responses_body import parse_responses, response_id
from llamacpp_mqtt_deploy.core.formats.rendering import (
    Dialect,
    EventStream,
    HttpReply,
    Occasion,
    cancelled_error,
    code_of,
    message_of,
)
from llamacpp_mqtt_deploy.core.formats.telling import Tokens, Untold, finish_of

_FAILURES: Mapping[str, str] = {
    "bad_request": "invalid_prompt",
    "unsupported": "invalid_prompt",
    "context_overflow": "context_length_exceeded",
    "busy": "rate_limit_exceeded",
    "session_busy": "rate_limit_exceeded",
    "rate_limited": "rate_limit_exceeded",
}
"""Codes of a response that failed after it began; any other is a `server_error`."""


class _ResponseObject:
    """The response object in its states; all of them repeat what the body said."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        echo = asked.echo
        session = occasion.session.rpartition("/")[2] if echo.get("kept") else None
        self._head = {
            "id": response_id(occasion.request_id, session),
            "object": "response",
            "created_at": int(occasion.now().timestamp()),
            "model": occasion.model,
            "background": False,
            "instructions": echo.get("instructions"),
            "max_output_tokens": echo.get("max_output_tokens"),
            "metadata": echo.get("metadata", {}),
            "parallel_tool_calls": echo.get("parallel_tool_calls", True),
            "previous_response_id": echo.get("previous_response_id"),
            "reasoning": echo.get("reasoning", {"effort": None, "summary": None}),
            "store": echo.get("kept", False),
            "temperature": echo.get("temperature"),
            "text": {"format": {"type": "text"}} | echo.get("text", {}),
            "tool_choice": echo.get("tool_choice", "auto"),
            "tools": [
                {"description": None, "parameters": None, "strict": None} | tool for tool in echo.get("tools", ())
            ],
            "top_p": echo.get("top_p"),
            "truncation": "disabled",
            "user": None,
        }

    def begun(self) -> dict[str, Any]:
        return self._told("in_progress", output=[])

    def ended(self, done: Mapping[str, Any], output: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`completed`, or `incomplete` when a limit cut it."""
        if finish_of(done) == "length":
            cut = {"reason": "max_output_tokens"}
            return self._told("incomplete", output=output, incomplete_details=cut, usage=_usage(done))
        return self._told("completed", output=output, usage=_usage(done))

    def failed(self, error: Mapping[str, Any], output: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        told = {"code": _FAILURES.get(code_of(error), "server_error"), "message": message_of(error)}
        return self._told("failed", output=output, error=told)

    def _told(self, status: str, *, output: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        empty = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, **empty, "output": list(output), **fields}


def _usage(done: Mapping[str, Any]) -> dict[str, Any]:
    tokens = Tokens.of(done)
    return {
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        "total_tokens": tokens.prompt + tokens.completion,
    }


# --- items -----------------------------------------------------------------------------------------------------------


class _Item:
    """One item of the output: a message, a function call, or thinking."""

    def __init__(self, number: int, first: Spoken, request_id: str) -> None:
        self.number = number
        self._first = first
        prefix = {Text: "msg", Reasoning: "rs", ToolCall: "fc"}[type(first)]
        self.id = f"{prefix}_{request_id}_{number}"

    def told(self, status: str, text: str | None) -> dict[str, Any]:
        """The item; `text` is None for one that only begins."""
        match self._first:
            case Text():
                content = [] if text is None else [self.part(text)]
                return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}
            case Reasoning():
                content = [] if text is None else [self.part(text)]
                return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}
            case ToolCall() as call:
                named = {"call_id": call.id, "name": call.name, "arguments": text or ""}
                return {"id": self.id, "type": "function_call", "status": status, **named}

    def part(self, text: str) -> dict[str, Any]:
        if isinstance(self._first, Reasoning):
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def place(self) -> dict[str, Any]:
        """Where an event about its text belongs; a function call has no parts."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.number}
        return place if isinstance(self._first, ToolCall) else place | {"content_index": 0}

    def growth(self, what: str, field: str, text: str) -> tuple[str, dict[str, Any]]:
        """The name and fields of an event that tells some of its text (`delta`) or all of it (`done`)."""
        match self._first:
            case Text():
                return f"response.output_text.{what}", {**self.place(), field: text, "logprobs": []}
            case Reasoning():
                return f"response.reasoning_text.{what}", {**self.place(), field: text}
            case ToolCall() as call:
                named = {"name": call.name} if what == "done" else {}
                field = "arguments" if what == "done" else field
                return f"response.function_call_arguments.{what}", {**self.place(), field: text, **named}


class ResponsesStream(EventStream):
    """Events with a `sequence_number` from 0: `response.created`, `.in_progress`, each item from its `output_item.added` to its
    `output_item.done`, then `response.completed` or `.incomplete`; `response.failed` when there was an error."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        super().__init__(asked, occasion)
        self._response = _ResponseObject(asked, occasion)
        self._blocks = BlockOrder()
        self._items: dict[int, _Item] = {}
        self._output: list[dict[str, Any]] = []
        self._number = 0

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        steps = self._blocks.feed(news)
        return self._begin() + self._rendered(steps) if steps else []

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        cut = finish_of(done) == "length"
        parts = self._begin() + self._rendered(self._blocks.end(), last="incomplete" if cut else "completed")
        response = self._response.ended(done, self._output)
        return [*parts, self._event("response.incomplete" if cut else "response.completed", {"response": response})]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        response = self._response.failed(error, self._output)
        return [*self._begin(), self._event("response.failed", {"response": response})]

    def _begin(self) -> list[bytes]:
        if self._number:
            return []
        response = {"response": self._response.begun()}
        return [self._event("response.created", response), self._event("response.in_progress", response)]

    def _event(self, name: str, fields: Mapping[str, Any]) -> bytes:
        event = sse_event(name, {"type": name, "sequence_number": self._number, **fields})
        self._number += 1
        return event

    def _rendered(self, steps: Sequence[BlockStep], *, last: str = "completed") -> list[bytes]:
        ends = [number for number, step in enumerate(steps) if isinstance(step, BlockEnded)]
        parts: list[bytes] = []
        for number, step in enumerate(steps):
            parts += self._step(step, status=last if ends[-1:] == [number] else "completed")
        return parts

    def _step(self, step: BlockStep, *, status: str) -> list[bytes]:
        match step:
            case BlockBegun():
                item = self._items[step.number] = _Item(step.number, step.first, self._occasion.request_id)
                added = {"output_index": item.number, "item": item.told("in_progress", None)}
                parts = [self._event("response.output_item.added", added)]
                return parts if isinstance(step.first, ToolCall) else [*parts, self._part(item, "added", "")]
            case BlockGrown():
                return [self._event(*self._items[step.number].growth("delta", "delta", step.text))]
            case BlockEnded():
                item = self._items.pop(step.number)
                parts = [self._event(*item.growth("done", "text", step.text))]
                if not isinstance(step.first, ToolCall):
                    parts.append(self._part(item, "done", step.text))
                self._output.append(item.told(status, step.text))
                finished = {"output_index": item.number, "item": self._output[-1]}
                return [*parts, self._event("response.output_item.done", finished)]

    def _part(self, item: _Item, what: str, text: str) -> bytes:
        return self._event(f"response.content_part.{what}", {**item.place(), "part": item.part(text)})


class ResponsesWhole:
    """One response object."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        self._response = _ResponseObject(asked, occasion)
        self._request_id = occasion.request_id

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        if finish_of(done) == "cancelled":
            return self.failure(cancelled_error(done))
        blocks = BlockOrder()
        steps = blocks.feed(Untold().feed(done)) + blocks.end()
        ends = [step for step in steps if isinstance(step, BlockEnded)]
        output = [
            _Item(end.number, end.first, self._request_id).told(
                "incomplete" if finish_of(done) == "length" and end is ends[-1] else "completed", end.text
            )
            for end in ends
        ]
        return HttpReply(status=200, body=json_line(self._response.ended(done, output)))

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return openai_failure(error)


OPENAI_RESPONSES = Dialect(
    name="openai_responses", parse=parse_responses, stream=ResponsesStream, whole=ResponsesWhole, failure=openai_failure
)
