"""OpenAI's `/v1/chat/completions`: its bodies, its stream of chunks, its whole answers.

Fields that go to the bus under their own name are `PASSED`, under another one `RENAMED`. `REFUSED` are told as errors, because an
answer without them would be another one than was asked for. Everything else that clients send is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.formats.asked import Asked, BodyFields, bad, checked, folded_seed, model_of, unserved
from llamacpp_mqtt_deploy.core.formats.framing import json_line, sse_data
from llamacpp_mqtt_deploy.core.formats.openai_errors import openai_error, openai_failure
from llamacpp_mqtt_deploy.core.formats.rendering import (
    Dialect,
    EventStream,
    HttpReply,
    Occasion,
    cancelled_error,
)
from llamacpp_mqtt_deploy.core.formats.telling import Tokens, calls_of, finish_of, reasoning_of, text_of

PASSED = (
    "messages", "temperature", "top_p", "max_tokens", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
    "tools", "tool_choice", "parallel_tool_calls", "response_format",
    # Not OpenAI's, but what clients of llama.cpp and its like put beside them, and the protocol's own.
    "top_k", "min_p", "repeat_penalty", "thinking", "thinking_budget", "priority", "timeout_s",
)  # fmt: skip
RENAMED: Mapping[str, str] = {"max_completion_tokens": "max_tokens"}
REFUSED: Mapping[str, str] = {
    "audio": "answers are text",
    "functions": "it was replaced by tools",
    "function_call": "it was replaced by tool_choice",
    "logprobs": "the bus carries no probabilities",
    "top_logprobs": "the bus carries no probabilities",
    "web_search_options": "the model has no access to the web",
}
IGNORED = (
    "metadata", "modalities", "moderation", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user", "verbosity", "stream_options.include_obfuscation",
)  # fmt: skip

_OURS: Mapping[str, str] = {**{name: name for name in PASSED}, **RENAMED}


def parse_chat(fields: Mapping[str, Any]) -> Asked:
    """A chat completion's body. Raises BadRequest and Unsupported, which name the field."""
    body = BodyFields(fields)
    body.refuse(REFUSED)
    _check_count(body)
    _check_modalities(body)
    request = body.named(_OURS)
    if "messages" not in request:
        raise bad("messages", "a list of chat messages; it is missing")
    if "seed" in request:
        request["seed"] = folded_seed(request["seed"])
    if (thinking := _thinking(body)) is not None:
        request.setdefault("thinking", thinking)
    renamed = {"max_tokens": "max_completion_tokens"} if body.get("max_completion_tokens") is not None else {}
    options = body.object("stream_options")
    return Asked(
        request=checked(request, names=renamed),
        streams=body.flag("stream") is True,
        model=model_of(body),
        echo={"include_usage": options is not None and options.flag("include_usage") is True},
    )


def thinks_at(effort: str | None) -> bool | None:
    """What a `reasoning_effort` says about thinking; models here know no degrees of it."""
    return None if effort is None else effort != "none"


def _thinking(body: BodyFields) -> bool | None:
    template = body.object("chat_template_kwargs")
    if template is not None and (told := template.flag("enable_thinking")) is not None:
        return told
    return thinks_at(body.text("reasoning_effort"))


def _check_count(body: BodyFields) -> None:
    count = body.get("n")
    if count not in (None, 1) or isinstance(count, bool):
        raise unserved("n", "one request gives one answer (1)")


def _check_modalities(body: BodyFields) -> None:
    modalities = body.list("modalities")
    if modalities is not None and any(modality != "text" for modality in modalities):
        raise unserved("modalities", "answers are text")


# --- answers ---------------------------------------------------------------------------------------------------------


def completion_usage(end: Mapping[str, Any]) -> dict[str, Any]:
    tokens = Tokens.of(end)
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
        "completion_tokens_details": {"reasoning_tokens": tokens.reasoning},
    }


class OpenAIChatStream(EventStream):
    """`data:` lines of `chat.completion.chunk` objects, closed by `[DONE]` when the answer is whole.

    The first chunk tells the role, the last one the `finish_reason`; with `include_usage` one more without choices tells the
    tokens. An error is one line `{"error": {...}}`, and no `[DONE]` follows.
    """

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        super().__init__(asked, occasion)
        self._begun = False
        self._with_usage = asked.echo.get("include_usage") is True
        self._head = {
            "id": f"chatcmpl-{occasion.request_id}",
            "object": "chat.completion.chunk",
            "created": int(occasion.now().timestamp()),
            "model": occasion.model,
        }

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        return [part for piece in news for part in self._delta(_delta_of(piece))]

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        parts = self._delta({}, finish_reason=finish_of(done))
        if self._with_usage:
            parts.append(sse_data({**self._head, "choices": [], "usage": completion_usage(done)}))
        return [*parts, b"data: [DONE]\n\n"]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [sse_data({"error": openai_error(error)})]

    def _delta(self, delta: Mapping[str, Any], *, finish_reason: str | None = None) -> list[bytes]:
        parts = []
        if not self._begun:
            self._begun = True
            parts = self._delta({"role": "assistant", "content": ""})
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head, "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = None
        return [*parts, sse_data(chunk)]


def _delta_of(piece: Spoken) -> dict[str, Any]:
    match piece:
        case Text():
            return {"content": piece.text}
        case Reasoning():
            return {"reasoning_content": piece.text}
        case ToolCall(id=None):
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
        case ToolCall():
            function = {"name": piece.name, "arguments": piece.arguments}
            return {"tool_calls": [{"index": piece.index, "id": piece.id, "type": "function", "function": function}]}


class OpenAIChatWhole:
    """One `chat.completion` object."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        self._occasion = occasion
        self._created = int(occasion.now().timestamp())

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        if finish_of(done) == "cancelled":
            return self.failure(cancelled_error(done))
        choice = {"index": 0, "message": _message(done), "logprobs": None, "finish_reason": finish_of(done)}
        completion = {
            "id": f"chatcmpl-{self._occasion.request_id}",
            "object": "chat.completion",
            "created": self._created,
            "model": self._occasion.model,
            "choices": [choice],
            "usage": completion_usage(done),
        }
        return HttpReply(status=200, body=json_line(completion))

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return openai_failure(error)


def _message(done: Mapping[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls_of(done)
    ]
    text, reasoning = text_of(done), reasoning_of(done)
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


OPENAI_CHAT = Dialect(
    name="openai_chat", parse=parse_chat, stream=OpenAIChatStream, whole=OpenAIChatWhole, failure=openai_failure
)
