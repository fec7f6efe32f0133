"""HTTP answers in one piece: what renderers made, with the headers that every answer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Send

from llamacpp_mqtt_deploy.core.formats.framing import json_line
from llamacpp_mqtt_deploy.core.formats.rendering import HttpReply, code_of, error_headers, message_of, status_of

NO_STORE = {"cache-control": "no-store"}


def http(reply: HttpReply, **headers: str) -> Response:
    """A renderer's reply as a response; `headers` with underscores for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(
        reply.body,
        status_code=reply.status,
        headers={**NO_STORE, **reply.headers, **named, "content-type": reply.content_type},
    )


def plain_failure(error: Mapping[str, Any]) -> HttpReply:
    """An error at an address that belongs to no API: `{"error": {"code", "message", ...}}`."""
    shown = {name: error[name] for name in ("fields", "retry_after_s", "retryable") if name in error}
    body = json_line({"error": {"code": code_of(error), "message": message_of(error), **shown}})
    return HttpReply(status=status_of(error), body=body, headers=error_headers(error))


async def send_reply(send: Send, reply: HttpReply, *, headers: Mapping[str, str]) -> None:
    """Send a whole answer from inside a response that decides late what it is."""
    named = {**NO_STORE, **reply.headers, **headers, "content-type": reply.content_type}
    pairs = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in named.items()]
    pairs.append((b"content-length", str(len(reply.body)).encode()))
    await send({"type": "http.response.start", "status": reply.status, "headers": pairs})
    await send({"type": "http.response.body", "body": reply.body})
