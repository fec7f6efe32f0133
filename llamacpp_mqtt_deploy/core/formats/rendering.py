"""What a renderer of an API is: events of one request in, bytes of an HTTP answer out; and what all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from llamacpp_mqtt_deploy.core.answering import Spoken
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.telling import Untold

if TYPE_CHECKING:
    from datetime import datetime

JSON = "application/json"
SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
PLAIN_TEXT = "text/plain; charset=utf-8"

STATUS: Mapping[str, int] = {
    "bad_request": 400,
    "payload_too_large": 413,
    "model_not_found": 404,
    "unsupported": 400,
    "busy": 429,
    "session_busy": 429,
    "rate_limited": 429,
    "context_overflow": 400,
    "timeout": 504,
    "idle_timeout": 504,
    "engine_unavailable": 503,
    "engine_error": 500,
    "engine_lost": 502,
    "interrupted": 502,
    "shutting_down": 503,
    "internal": 500,
    # What a gateway has to say itself, in the form of an `error` event.
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "duplicate_request": 409,
    "upgrade_required": 426,
    "cancelled": 503,
    "no_worker": 503,
    "broker_unreachable": 503,
    "answer_lost": 502,
}
"""HTTP status of each code; any other code is a 500."""

RETRY_AFTER_S = 1.0
"""What a 429 tells when the worker named no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occasion:
    """What a renderer cannot know itself.

    `request_id` and `session` are the bus's. `model` is the name that answers give. `now` gives the time in UTC; it is handed in,
    so that a renderer's output depends on its arguments alone.
    """

    request_id: str
    session: str
    model: str
    now: Callable[[], datetime]


def utc_text(moment: datetime) -> str:
    """RFC 3339: `2026-11-21T17:30:00.123456Z`."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReply:
    """A whole answer over HTTP."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


class Renderer(Protocol):
    """One streamed answer. Events come decoded, each once, in the order that the client rules of the protocol give them."""

    @property
    def content_type(self) -> str:
        """Of the whole body."""
        ...

    def event(self, event: Mapping[str, Any]) -> bytes:
        """What to send for this event of the protocol; empty when the API has nothing to say about it."""
        ...

    def ping(self) -> bytes:
        """What to send when nothing was sent for a while, whatever came; empty where the API has no such thing."""
        ...

    @property
    def ended(self) -> bool:
        """A terminal event was rendered; nothing follows."""
        ...

    @property
    def failed(self) -> bool:
        """It ended with an error. What is open should then be cut, not closed, where the API has no form for errors in a stream."""
        ...


class Whole(Protocol):
    """One answer that is not streamed."""

    def answer(self, done: Mapping[str, Any]) -> HttpReply:
        """From the `done` event, which must hold the text."""
        ...

    def failure(self, error: Mapping[str, Any]) -> HttpReply:
        """From an `error` event, or a problem of the gateway in the same form."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One endpoint of one API. `parse` raises RequestError; `idle` answers a body that asks for no generation."""

    name: str
    parse: Callable[[Mapping[str, Any]], Asked]
    stream: Callable[[Asked, Occasion], Renderer]
    whole: Callable[[Asked, Occasion], Whole]
    failure: Callable[[Mapping[str, Any]], HttpReply]
    idle: Callable[[Asked, Occasion], HttpReply] | None = None


# --- errors ----------------------------------------------------------------------------------------------------------


def error_event(error: RequestError) -> dict[str, Any]:
    """An error of a parser in the form that `failure` takes."""
    return {
        "type": "error",
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
        **error.details,
    }


def cancelled_error(done: Mapping[str, Any]) -> dict[str, Any]:
    """The error that a cancelled answer is for an API without such an end: half a text must not look like a whole one."""
    return {
        "type": "error",
        "code": "cancelled",
        "message": "The request was cancelled before the answer was complete.",
        "retryable": False,
        **{name: done[name] for name in ("usage", "timings") if name in done},
    }


def code_of(error: Mapping[str, Any]) -> str:
    code = error.get("code")
    return code if isinstance(code, str) and code else "internal"


def message_of(error: Mapping[str, Any]) -> str:
    message = error.get("message")
    return message if isinstance(message, str) and message else "The worker gave no reason."


def first_field(error: Mapping[str, Any]) -> str | None:
    """The first of the fields at fault."""
    fields = error.get("fields")
    return next((str(name) for name in fields), None) if isinstance(fields, Mapping) else None


def status_of(error: Mapping[str, Any]) -> int:
    return STATUS.get(code_of(error), 500)


def error_headers(error: Mapping[str, Any]) -> dict[str, str]:
    """`Retry-After` in whole seconds where waiting helps, and what the official SDKs of OpenAI and Anthropic read first."""
    headers = {"x-should-retry": "true" if error.get("retryable") is True else "false"}
    after_s = error.get("retry_after_s")
    known = isinstance(after_s, int | float) and not isinstance(after_s, bool) and math.isfinite(after_s)
    if known or status_of(error) == 429:
        headers["Retry-After"] = str(max(1, math.ceil(after_s if known and after_s is not None else RETRY_AFTER_S)))
    return headers


# --- streams ---------------------------------------------------------------------------------------------------------


class EventStream:
    """What the streams of all APIs do alike: news of each event, one end, nothing after it.

    A member says what to send, in parts that belong together (an event, a line): `_waits` for an event without news, `_says` for
    news, `_finishes` for `done`, `_fails` for an `error` and for an answer that was cancelled: few APIs have such an end, and half
    a text must not look like a whole one.
    """

    content_type = SSE

    def __init__(self, asked: Asked, occasion: Occasion) -> None:
        self._asked = asked
        self._occasion = occasion
        self._untold = Untold()
        self._ended = False
        self._failed = False

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def failed(self) -> bool:
        return self._failed

    def event(self, event: Mapping[str, Any]) -> bytes:
        return b"".join(self.parts(event))

    def parts(self, event: Mapping[str, Any]) -> list[bytes]:
        """The same, cut where an MQTT client would want a message of its own."""
        if self._ended:
            return []
        match event.get("type"):
            case "done":
                return self._says(self._untold.feed(event)) + self._end(event)
            case "error":
                self._ended = self._failed = True
                return self._fails(event)
            case "chunk" | "snapshot":
                return self._says(self._untold.feed(event))
            case _:
                return self._waits(event)

    def ping(self) -> bytes:
        return b"" if self._ended else self._pings()

    def _end(self, done: Mapping[str, Any]) -> list[bytes]:
        self._ended = True
        self._failed = done.get("finish_reason") == "cancelled"
        return self._fails(cancelled_error(done)) if self._failed else self._finishes(done)

    def _pings(self) -> bytes:
        return b": ping\n\n"

    def _waits(self, event: Mapping[str, Any]) -> list[bytes]:
        return []

    def _says(self, news: Sequence[Spoken]) -> list[bytes]:
        raise NotImplementedError

    def _finishes(self, done: Mapping[str, Any]) -> list[bytes]:
        raise NotImplementedError

    def _fails(self, error: Mapping[str, Any]) -> list[bytes]:
        raise NotImplementedError
