"""From the words of a caller to a request: what is checked, what goes onto the wire, how long to be patient."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import orjson

from llamacpp_mqtt_deploy.client.exceptions import AnswerError, BusError
from llamacpp_mqtt_deploy.client.retry import RetryRules
from llamacpp_mqtt_deploy.core.errors import BY_CODE
from llamacpp_mqtt_deploy.core.routes import is_level, is_session


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """`answer_within_s` bounds the silence before the first event, `resend_limit` the deliveries in a row that bring nothing,
    `offline_limit_s` an outage of the broker."""

    answer_within_s: float = 10.0
    resend_limit: int = 5
    offline_limit_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A request that is ready to be published."""

    session: str
    request_id: str
    payload: bytes
    rules: RetryRules
    expects_text: bool


def prepared(
    *,
    session: str,
    request_id: str | None,
    patience: Patience,
    stream: bool | Literal["sentence"],
    timeout_s: float | None,
    fields: Mapping[str, Any],
) -> Asking:
    """Check the names and write the request; fields that are None are left out. Raises ValueError."""
    request_id = request_id or secrets.token_hex(12)
    check_names(session, request_id)
    check_timeout(timeout_s)
    request = {"request_id": request_id, **fields, "stream": None if stream is True else stream, "timeout_s": timeout_s}
    return Asking(
        session=session,
        request_id=request_id,
        payload=written({name: value for name, value in request.items() if value is not None}),
        rules=RetryRules(
            streams=stream is not False,
            timeout_s=timeout_s,
            answer_within_s=patience.answer_within_s,
            resend_limit=patience.resend_limit,
            offline_limit_s=patience.offline_limit_s,
        ),
        # Whoever asks for neither text nor a stream gets an end without either.
        expects_text=stream is not False or fields.get("full_content") is not False,
    )


def check_names(session: str, request_id: object) -> None:
    """Raise ValueError for what cannot be a session path or a request id."""
    if not is_session(session):
        raise ValueError(
            f"session {session!r}: one or two levels of letters, digits, _ . and -, at most 64 each (`alice/kitchen`)"
        )
    if request_id is not None and not (isinstance(request_id, str) and is_level(request_id)):
        raise ValueError(f"request_id {request_id!r}: letters, digits, _ . and -, at most 64")


def check_timeout(timeout_s: object) -> None:
    """Raise ValueError for what cannot be a limit in seconds; None is none."""
    if timeout_s is None:
        return
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < cast("float", timeout_s) < math.inf:
        raise ValueError(f"timeout_s {timeout_s!r}: a number of seconds above 0")


def written(message: Mapping[str, Any]) -> bytes:
    """The message as JSON; raises ValueError with the name of the field that JSON cannot hold."""
    try:
        payload = orjson.dumps(message)
    except TypeError:
        for name, value in message.items():  # the error does not say where in a request of many fields
            try:
                orjson.dumps(value)
            except TypeError as error:
                raise ValueError(f"{name}: cannot be written as JSON: {error}") from error
        raise
    if b"null" in payload:  # as orjson writes nan and inf too, and the worker would read that nothing is said
        for name, value in message.items():
            if _not_finite(value):
                raise ValueError(f"{name}: cannot be written as JSON: nan and inf are no numbers there")
    return payload


def _not_finite(value: object) -> bool:
    """Whether some number in it is nan or inf."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(map(_not_finite, value.values()))
    return isinstance(value, list | tuple) and any(map(_not_finite, value))


def session_below(first: str, name: str) -> str:
    """The session path of a name that others chose: as it is where it can be a topic level, else a hash of it."""
    if is_level(name):
        return f"{first}/{name}"
    return f"{first}/s-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:32]}"


def own_session(username: str | None) -> str:
    """A new session for requests that name none: `{user}/{random}`."""
    first = username or "cli"
    if not is_level(first):
        raise BusError(
            f"The user name {first!r} cannot be the first level of a session (letters, digits, _ . and -, at most 64)."
            " Name a session yourself, and let the access list allow it."
        )
    return f"{first}/{secrets.token_hex(6)}"


def history_of(ack: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages in the ack of `history`; raises `AnswerError` where they are not told."""
    if ack.get("status") != "ok":
        raise AnswerError(str(ack.get("code") or "unsupported"), str(ack.get("message") or "The history is not told."))
    messages = ack.get("messages")
    return list(messages) if isinstance(messages, list) else []


def counted_of(ack: Mapping[str, Any]) -> int:
    """The tokens in the ack of `count_tokens`; raises `AnswerError` where they are not told."""
    tokens = ack.get("prompt_tokens")
    if ack.get("status") == "ok" and isinstance(tokens, int):
        return tokens
    code, fields = str(ack.get("code") or "unsupported"), ack.get("fields")
    if code == "bad_request" and isinstance(fields, Mapping) and "action" in fields:
        raise AnswerError("unsupported", "The worker is of a version that does not count tokens.")
    raise AnswerError(
        code,
        str(ack.get("message") or "The tokens are not counted."),
        retryable=code in BY_CODE and BY_CODE[code].retryable,
        details={name: ack[name] for name in ("fields", "retry_after_s") if name in ack},
    )
