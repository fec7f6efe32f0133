"""The error tree: every leaf has its wire code and says whether sending the same request again may help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class RequestError(Exception):
    """A request that ends in an `error` event.

    `code` is the wire code, `retryable` says whether the same request may succeed later, and `details` holds the extra
    fields of the event (`fields`, `retry_after_s`, `n_prompt_tokens`, `n_ctx`). The text is for the person who sent the
    request: one sentence, no path, no traceback, nothing of another client.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: Mapping[str, Any] = details
        self.quoted = ""
        """The part of the message that the engine wrote: it may repeat some of the request, which is not for a log."""


class BadRequest(RequestError):
    """The client's message breaks the contract; `fields` names what is wrong and what was expected."""

    code = "bad_request"


class PayloadTooLarge(RequestError):
    """The message, or one of its parts, is over a limit of the worker."""

    code = "payload_too_large"


class ModelNotFound(RequestError):
    """The request names a model that this worker does not serve."""

    code = "model_not_found"


class Unsupported(RequestError):
    """The request asks for something that this engine, model or route cannot or may not do."""

    code = "unsupported"


class Busy(RequestError):
    """The queue is full; `retry_after_s` says when a place is likely."""

    code = "busy"
    retryable = True


class SessionBusy(RequestError):
    """Too many prompts of this session wait already."""

    code = "session_busy"
    retryable = True


class RateLimited(RequestError):
    """The first topic level sent more requests in a minute than it may, or has spent its tokens of the day."""

    code = "rate_limited"
    retryable = True


class ContextOverflow(RequestError):
    """Prompt and history do not fit; `n_prompt_tokens` and `n_ctx` say by how much."""

    code = "context_overflow"


class TimedOut(RequestError):
    """The overall limit passed, waiting included."""

    code = "timeout"


class IdleTimeout(RequestError):
    """No token and no progress for `chunk_timeout_s`."""

    code = "idle_timeout"
    retryable = True


class EngineUnavailable(RequestError):
    """The engine cannot be reached, or does not become ready."""

    code = "engine_unavailable"
    retryable = True


class EngineFailed(RequestError):
    """The engine answered, and the answer was an error."""

    code = "engine_error"


class EngineLost(RequestError):
    """The engine went away in the middle of an answer."""

    code = "engine_lost"
    retryable = True


class Interrupted(RequestError):
    """The worker died in the middle of this answer."""

    code = "interrupted"
    retryable = True


class ShuttingDown(RequestError):
    """The worker is draining and takes no new requests."""

    code = "shutting_down"
    retryable = True


class Internal(RequestError):
    """A defect of ours, or a full disk: the log says which."""

    code = "internal"


LEAVES: tuple[type[RequestError], ...] = (
    BadRequest,
    PayloadTooLarge,
    ModelNotFound,
    Unsupported,
    Busy,
    SessionBusy,
    RateLimited,
    ContextOverflow,
    TimedOut,
    IdleTimeout,
    EngineUnavailable,
    EngineFailed,
    EngineLost,
    Interrupted,
    ShuttingDown,
    Internal,
)
BY_CODE: Mapping[str, type[RequestError]] = {leaf.code: leaf for leaf in LEAVES}
