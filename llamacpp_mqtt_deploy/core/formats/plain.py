"""Answers without an API around them: the text alone, whole or as it comes, and the events of the bus as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.deltas import Text
from llamacpp_mqtt_deploy.core.fields import RequestFields
from llamacpp_mqtt_deploy.core.formats.asked import Asked, BodyFields, bad, checked, model_of, session_of
from llamacpp_mqtt_deploy.core.formats.framing import json_line, sse_data
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
)
from llamacpp_mqtt_deploy.core.formats.telling import Untold, finish_of, text_of

_MODES = ("prompt", "messages", "tool_results")
_OWN = ("request_id", "session_id", "model", "stream")


def parse_ask(fields: Mapping[str, Any]) -> Asked:
    """A request as the protocol has it; a body of plain text is `{"prompt": text}`. `stream` is true where nothing is said.

    `"sentence"` stays in the request, since the worker cuts the sentences.
    """
    body = BodyFields(fields)
    named = body.named({name: name for name in RequestFields.model_fields if name not in _OWN})
    given = [mode for mode in _MODES if mode in named]
    if len(given) != 1:
        raise bad((given or ["prompt"])[0], f"exactly one of {', '.join(_MODES)}")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        named["stream"] = stream
    return Asked(
        request=checked(named),
        streams=stream is not False,
        session=session_of(body, "session_id"),
        model=model_of(body),
    )


def text_failure(error: Mapping[str, Any]) -> HttpReply:
    """One line for a person at a shell."""
    body = f"{code_of(error)}: {message_of(error)}\n".encode("utf-8", "replace")
    return HttpReply(status=status_of(error), body=body, content_type=PLAIN_TEXT, headers=error_headers(error))


def events_failure(error: Mapping[str, Any]) -> HttpReply:
    """The `error` event itself."""
    return HttpReply(status=status_of(error), body=json_line(error), headers=error_headers(error))


# --- text ------------------------------------------------------------------------------------------------------------


class TextChunkStream(EventStream):
    """The text as it comes. There is no mark of the end and no form for an error: a failed one says so in a line of its own, and
    must be cut by who sends it."""

    content_type = PLAIN_TEXT

    def _pings(self) -> bytes:
        return b""

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        return [_utf8(piece.text) for piece in news if isinstance(piece, Text)]

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        return []

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [_utf8(f"\n[{code_of(error)}: {message_of(error)}]\n")]


class TextStream(TextChunkStream):
    """The whole text in one part, at the end; an error is its sentence."""

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        return []

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        return [_utf8(self._untold.content)]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [_utf8(message_of(error))]


ANSWER_FIELDS = ("content", "error", "code", "request_id", "session_id", "model")
"""What `ObjectStream` can tell, by our names."""


class ObjectStream(TextStream):
    """The whole answer as one JSON object, at the end; an error is one too.

    The body's `answer_fields` are the names of its clients for `ANSWER_FIELDS`. Text and error are told in any case, the ids where
    they are named, or where no names are given at all.
    """

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        return [self._object({"content": self._untold.content})]

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        return [self._object({"error": message_of(error), "code": code_of(error)})]

    def _object(self, told: Mapping[str, str]) -> bytes:
        occasion = self._occasion
        values = {
            **told,
            "request_id": occasion.request_id,
            "session_id": occasion.session,
            "model": occasion.model,
        }
        given = self._asked.echo.get("answer_fields") or {"request_id": "request_id", "session_id": "session_id"}
        names = {"content": "content", "error": "error"} | given
        return json_line({names[name]: value for name, value in values.items() if name in names})


class TextWhole:
    """The text as the body."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        pass

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        if finish_of(done) == "cancelled":
            return self.failure(cancelled_error(done))
        return HttpReply(status=200, body=_utf8(text_of(done)), content_type=PLAIN_TEXT)

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return text_failure(error)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


# --- events ----------------------------------------------------------------------------------------------------------


class EventsStream:
    """Every event of the protocol as it is; `bare` ones are JSON alone, for a transport that has messages of its own.

    Chunks that were merged on the way are told as a `snapshot`, which the protocol allows at any time: a reader of it would take
    the numbers that are missing for a loss.
    """

    content_type = "text/event-stream"

    def __init__(self, asked: Asked, occasion: Occasion, *, bare: bool = False) -> None:
        self._bare = bare
        self._end = ""
        self._untold = Untold()
        self._next_seq = 0

    @property
    def ended(self) -> bool:
        return bool(self._end)

    @property
    def failed(self) -> bool:
        return self._end == "error"

    def event(self, event: Mapping[str, Any]) -> bytes:
        return b"".join(self.parts(event))

    def parts(self, event: Mapping[str, Any]) -> list[bytes]:
        if self._end:
            return []
        kind = event.get("type")
        self._end = kind if kind in ("done", "error") else ""
        told = self._numbered(event)
        return [json_line(told) if self._bare else sse_data(told)]

    def _numbered(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        self._untold.feed(event)
        seq = event.get("seq" if event.get("type") == "chunk" else "next_seq")
        if not isinstance(seq, int):
            return event
        missing = event.get("type") == "chunk" and seq > self._next_seq
        self._next_seq = seq + 1 if event.get("type") == "chunk" else seq
        return self._snapshot(event) if missing else event

    def _snapshot(self, event: Mapping[str, Any]) -> dict[str, Any]:
        told = {name: event[name] for name in ("request_id", "session_id") if name in event}
        told |= {"type": "snapshot", "content": self._untold.content, "next_seq": self._next_seq}
        return told | ({"reasoning": self._untold.reasoning} if self._untold.reasoning else {})

    def ping(self) -> bytes:
        return b"" if self._end or self._bare else b": ping\n\n"


class EventsWhole:
    """The terminal event as the body; a cancelled answer is whole here, since the event says that it was cancelled."""

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        pass

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        return HttpReply(status=200, body=json_line(done))

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        return events_failure(error)


ASK_TEXT = Dialect(name="ask_text", parse=parse_ask, stream=TextChunkStream, whole=TextWhole, failure=text_failure)
ASK_EVENTS = Dialect(name="ask_events", parse=parse_ask, stream=EventsStream, whole=EventsWhole, failure=events_failure)
