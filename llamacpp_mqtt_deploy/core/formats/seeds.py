"""The web backends' own endpoints: small JSON objects as server-sent events, and their siblings that answer at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Text
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.framing import json_line, sse_data, sse_event
from llamacpp_mqtt_deploy.core.formats.rendering import (
    PLAIN_TEXT,
    Dialect,
    EventStream,
    HttpReply,
    Occasion,
    cancelled_error,
    code_of,
    error_headers,
    message_of,
    status_of,
    utc_text,
)
from llamacpp_mqtt_deploy.core.formats.seed_bodies import (
    parse_chatbot,
    parse_conversation,
    parse_llm_chat,
    parse_llm_session,
    parse_message,
    parse_prompt,
)
from llamacpp_mqtt_deploy.core.formats.telling import finish_of, text_of


def seed_failure(error: Mapping[str, Any]) -> HttpReply:
    """`{"detail", "error", "code"}`: the first is where the clients of these endpoints look, being used to FastAPI."""
    message = message_of(error)
    body = json_line({"detail": message, "error": message, "code": code_of(error)})
    return HttpReply(status=status_of(error), body=body, headers=error_headers(error))


class SeedStream(EventStream):
    """What these streams have in common: the text, piece by piece; thinking and tool calls have no place in them.

    A member makes objects of the text, of the end and of an error, and of the beginning where there is one; `_frame` makes bytes
    of an object. `bare` objects are JSON alone, for a transport that has messages of its own.
    """

    def __init__(self, asked: Asked, occasion: Occasion, *, bare: bool = False) -> None:
        super().__init__(asked, occasion)
        self._bare = bare
        self._begun = False

    def _pings(self) -> bytes:
        return b"" if self._bare else super()._pings()

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        texts = [piece.text for piece in news if isinstance(piece, Text)]
        return self._begin() + [self._framed(self._piece(text)) for text in texts] if texts else []

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        return [*self._begin(), self._framed(self._whole(done))]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [self._framed(self._error(error))]

    def _begin(self) -> list[bytes]:
        if self._begun:
            return []
        self._begun = True
        first = self._beginning()
        return [] if first is None else [self._framed(first)]

    def _framed(self, value: Mapping[str, Any]) -> bytes:
        return json_line(value) if self._bare else self._frame(value)

    def _frame(self, value: Mapping[str, Any]) -> bytes:
        return sse_data(value)

    def _beginning(self) -> dict[str, Any] | None:
        return None

    def _piece(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, done: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _error(self, error: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class SeedWhole:
    """An answer at once, as `say` makes it of the `done` event."""

    def __init__(
        self, asked: Asked, occasion: Occasion, say: Callable[[Asked, Occasion, Mapping[str, Any]], dict[str, Any]]
    ) -> None:
        self._asked = asked
        self._occasion = occasion
        self._say = say

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        if finish_of(done) == "cancelled":
            return self.failure(cancelled_error(done))
        return HttpReply(status=200, body=json_line(self._say(self._asked, self._occasion, done)))

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return seed_failure(error)


def _dialect(
    name: str,
    parse: Callable[[Mapping[str, Any]], Asked],
    stream: type[SeedStream],
    say: Callable[[Asked, Occasion, Mapping[str, Any]], dict[str, Any]],
) -> Dialect:
    return Dialect(
        name=name,
        parse=parse,
        stream=stream,
        whole=lambda asked, occasion: SeedWhole(asked, occasion, say),
        failure=seed_failure,
    )


# --- {content} / {done} / {error} ------------------------------------------------------------------------------------


class ContentStream(SeedStream):
    """`{"content": "..."}`, then `{"done": true}` or `{"error": "..."}`; with `session_id` where the body had one."""

    def _piece(self, text: str) -> dict[str, Any]:
        return {"content": text} | _session(self._asked)

    def _whole(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return {"done": True} | _session(self._asked)

    def _error(self, error: Mapping[str, Any]) -> dict[str, Any]:
        return {"error": message_of(error)} | _session(self._asked)


def _session(asked: Asked) -> dict[str, Any]:
    return {"session_id": asked.echo["session_id"]} if "session_id" in asked.echo else {}


def _llm_response(asked: Asked, _occasion: Occasion, done: Mapping[str, Any]) -> dict[str, Any]:
    return {"response": text_of(done)} | _session(asked)


LLM_CHAT = _dialect("llm_chat", parse_llm_chat, ContentStream, _llm_response)
LLM_SESSION = _dialect("llm_session", parse_llm_session, ContentStream, _llm_response)


# --- metadata / chunk / done / error ---------------------------------------------------------------------------------


class ChatbotStream(SeedStream):
    """`metadata` as soon as the request is accepted, `chunk`s, then `done` with the whole text, or `error`."""

    def _waits(self, event: Mapping[str, Any]) -> list[bytes]:
        return self._begin()

    def _beginning(self) -> dict[str, Any]:
        return {
            "type": "metadata",
            "session_id": self._asked.echo.get("session_id"),
            "user_message_id": message_numbers(self._occasion.request_id)[0],
            "session_key": self._occasion.session,
        }

    def _piece(self, text: str) -> dict[str, Any]:
        return {"type": "chunk", "content": text}

    def _whole(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "type": "done",
            "assistant_message_id": message_numbers(self._occasion.request_id)[1],
            "full_content": self._untold.content,
        }

    def _error(self, error: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "error", "message": message_of(error)}


def message_numbers(request_id: str) -> tuple[int, int]:
    """Numbers for the user's message and the answer: the bus names requests by texts, these clients messages by numbers.

    The same request has the same ones; 52 bits, so that JavaScript holds them exactly.
    """
    number = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:7]) >> 5
    return 2 * number, 2 * number + 1


def _chatbot_answer(asked: Asked, occasion: Occasion, done: Mapping[str, Any]) -> dict[str, Any]:
    user, assistant = message_numbers(occasion.request_id)
    at = utc_text(occasion.now())
    return {
        "session_id": asked.echo.get("session_id"),
        "session_key": occasion.session,
        "user_message": {"id": user, "role": "user", "content": asked.echo.get("content"), "created_at": at},
        "assistant_message": {"id": assistant, "role": "assistant", "content": text_of(done), "created_at": at},
    }


CHATBOT = _dialect("chatbot", parse_chatbot, ChatbotStream, _chatbot_answer)


# --- {chunk, type} ---------------------------------------------------------------------------------------------------


class TypedChunkStream(SeedStream):
    """`{"chunk": "...", "type": "content"}`, then `{"type": "done"}` or `{"type": "error", "message": "..."}`.

    Its clients expect the events in a body that calls itself plain text.
    """

    content_type = PLAIN_TEXT

    def _piece(self, text: str) -> dict[str, Any]:
        return {"chunk": text, "type": "content"}

    def _whole(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "done"}

    def _error(self, error: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "error", "message": message_of(error)}


def _prompt_response(asked: Asked, occasion: Occasion, done: Mapping[str, Any]) -> dict[str, Any]:
    usage = done.get("usage")
    return {
        "response": text_of(done),
        "model": occasion.model,
        "provider": asked.echo.get("provider"),
        "metadata": {"usage": usage} if isinstance(usage, Mapping) else None,
        "conversation_id": asked.echo.get("conversation_id"),
    }


PROMPT_CHAT = _dialect("prompt_chat", parse_prompt, TypedChunkStream, _prompt_response)
CONVERSATION = _dialect("conversation", parse_conversation, TypedChunkStream, _prompt_response)


# --- message_start / content_block_delta / message_stop / ping -------------------------------------------------------


class TypedEventStream(SeedStream):
    """Named events: `message_start`, `content_block_delta`s, then `message_stop`, or `error`; `ping` tells the time in seconds."""

    def _frame(self, value: Mapping[str, Any]) -> bytes:
        return sse_event(value["type"], value)

    def _pings(self) -> bytes:
        return self._framed({"type": "ping", "timestamp": self._occasion.now().timestamp()})

    def _beginning(self) -> dict[str, Any]:
        return {"type": "message_start"}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}

    def _whole(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "message_stop"}

    def _error(self, error: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "error", "error": {"type": code_of(error), "message": message_of(error)}}


def _message_response(_asked: Asked, _occasion: Occasion, done: Mapping[str, Any]) -> dict[str, Any]:
    return {"response": text_of(done)}


MESSAGE_STREAM = _dialect("message_stream", parse_message, TypedEventStream, _message_response)


# --- {token} ---------------------------------------------------------------------------------------------------------


class TokenStream(SeedStream):
    """`{"token": "..."}`; the last one has an empty token and the type `complete`, or `error` with a message.

    Every object has a token, since the simplest of its clients adds up that field unseen.
    """

    def _piece(self, text: str) -> dict[str, Any]:
        return {"token": text}

    def _whole(self, done: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": "", "type": "complete"}

    def _error(self, error: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": "", "type": "error", "error": message_of(error)}


def _token_response(_asked: Asked, _occasion: Occasion, done: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": text_of(done), "type": "complete"}


TOKEN_STREAM = _dialect("token_stream", parse_message, TokenStream, _token_response)
