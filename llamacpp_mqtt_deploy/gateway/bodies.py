"""Reads the body of a request: bounded in size, bounded in time, and JSON that is checked before any parser recurses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from llamacpp_mqtt_deploy.core.errors import BadRequest, PayloadTooLarge, TimedOut
from llamacpp_mqtt_deploy.core.payloads import decode_payload


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body; raises PayloadTooLarge, TimedOut and, when the client goes away meanwhile, ClientDisconnect."""
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise TimedOut(f"The body of the request did not arrive within {timeout_s:g} s.") from None
    return bytes(body)


async def read_object(request: Request, *, max_bytes: int, timeout_s: float) -> Mapping[str, Any]:
    """The body as a JSON object; raises as `read_body`, and BadRequest."""
    content = decode_payload(await read_body(request, max_bytes=max_bytes, timeout_s=timeout_s), max_bytes=max_bytes)
    if isinstance(content, dict):
        return content
    raise BadRequest("The body must be a JSON object.", fields={"body": "a JSON object"})


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body has more than {max_bytes} bytes.", fields={"body": f"at most {max_bytes} bytes"})
