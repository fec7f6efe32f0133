"""From the bodies of the web backends' own endpoints to requests on the bus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.formats.asked import Asked, BodyFields, bad, checked, model_of, session_of

PASSED = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty",
    "repeat_penalty", "logit_bias", "tools", "tool_choice", "parallel_tool_calls", "response_format", "thinking",
    "thinking_budget", "priority", "timeout_s",
)  # fmt: skip
IGNORED = ("provider", "template_id", "user_id")


def parse_llm_chat(fields: Mapping[str, Any]) -> Asked:
    """`/api/llm/chat` and `/api/llm/chat/stream`: `messages`, of which nothing is kept."""
    body = BodyFields(fields)
    return _asked(body, _messages(body))


def parse_llm_session(fields: Mapping[str, Any]) -> Asked:
    """`/api/llm/chat/session` and `.../stream`: a `message` of a `session_id`, whose history the worker keeps."""
    body = BodyFields(fields)
    return _asked(body, _prompt(body, "message"), session="session_id", needs_session=True)


def parse_chatbot(fields: Mapping[str, Any]) -> Asked:
    """`/api/chatbot/messages` and `.../stream`: the `content` of a message of a `session_id`."""
    body = BodyFields(fields)
    return _asked(body, _prompt(body, "content"), session="session_id", needs_session=True, repeats=("content",))


def parse_prompt(fields: Mapping[str, Any]) -> Asked:
    """`/chat`: a `prompt`, of a `conversation_id` where there is one."""
    body = BodyFields(fields)
    return _asked(body, _prompt(body, "prompt"), session="conversation_id", repeats=("provider",))


def parse_conversation(fields: Mapping[str, Any]) -> Asked:
    """`/chat/conversation`: `messages`, or a `prompt` of a `conversation_id`. What `messages` tell is not kept."""
    body = BodyFields(fields)
    request = _messages(body) if body.get("messages") is not None else _prompt(body, "prompt")
    return _asked(body, request, session="conversation_id", repeats=("provider",))


def parse_message(fields: Mapping[str, Any]) -> Asked:
    """`/chat/stream` and `/api/stream/message`: a `message`, of a `session_id` or `thread_id` where there is one."""
    body = BodyFields(fields)
    session = "thread_id" if body.get("thread_id") is not None else "session_id"
    return _asked(body, _prompt(body, "message"), session=session)


def _asked(
    body: BodyFields,
    request: dict[str, Any],
    *,
    session: str | None = None,
    needs_session: bool = False,
    repeats: tuple[str, ...] = (),
) -> Asked:
    found = session_of(body, session) if session is not None else None
    if needs_session and found is None:
        raise bad(session or "session_id", "1 to 64 letters, digits, _ . or -, or a whole number; it is missing")
    echoed = (*repeats, *((session,) if session is not None else ()))
    return Asked(
        request=checked(request | body.named({name: name for name in PASSED})),
        streams=body.flag("stream") is True,
        session=found,
        model=model_of(body),
        echo={name: value for name in echoed if (value := body.get(name)) is not None},
    )


def _prompt(body: BodyFields, name: str) -> dict[str, Any]:
    prompt = body.needed_text(name)
    if not prompt:
        raise bad(body.path(name), "a text that is not empty")
    system = body.text("system_prompt")
    return {"prompt": prompt} | ({"system_prompt": system} if system else {})


def _messages(body: BodyFields) -> dict[str, Any]:
    messages = body.list("messages")
    if messages is None:
        raise bad(body.path("messages"), "a list of chat messages; it is missing")
    return {"messages": messages}
