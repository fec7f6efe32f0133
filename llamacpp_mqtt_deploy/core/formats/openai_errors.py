"""Errors as OpenAI's API tells them: `{"error": {"message", "type", "param", "code"}}` with the HTTP status of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamacpp_mqtt_deploy.core.formats.framing import json_line
from llamacpp_mqtt_deploy.core.formats.rendering import (
    HttpReply,
    code_of,
    error_headers,
    first_field,
    message_of,
    status_of,
)

OPENAI_CODES: Mapping[str, str | None] = {
    "bad_request": None,
    "context_overflow": "context_length_exceeded",
    "rate_limited": "rate_limit_exceeded",
    "unauthorized": "invalid_api_key",
    "unsupported": "unsupported_value",
}
"""What OpenAI calls a code of ours; all others keep their name."""


def openai_code(error: Mapping[str, Any]) -> str | None:
    code = code_of(error)
    return OPENAI_CODES.get(code, code)


def openai_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """The error object; `param` is the first field at fault."""
    status = status_of(error)
    if status == 429:
        kind = "rate_limit_error"
    elif status >= 500:
        kind = "server_error"
    else:
        kind = "authentication_error" if status == 401 else "invalid_request_error"
    param = "model" if code_of(error) == "model_not_found" else first_field(error)
    if code_of(error) == "context_overflow":
        param = "messages"
    return {"message": message_of(error), "type": kind, "param": param, "code": openai_code(error)}


def openai_failure(error: Mapping[str, Any]) -> HttpReply:
    """The whole answer to a request that failed."""
    body = json_line({"error": openai_error(error)})
    return HttpReply(status=status_of(error), body=body, headers=error_headers(error))
