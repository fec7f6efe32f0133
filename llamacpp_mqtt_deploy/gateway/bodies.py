"""Reads the body of a request: bounded in size, alone and with all others, bounded in time, and JSON that is checked before any parser
recurses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from llamacpp_mqtt_deploy.core.errors import BadRequest, PayloadTooLarge, TimedOut
from llamacpp_mqtt_deploy.core.payloads import decode_payload, marks
from llamacpp_mqtt_deploy.gateway.incoming_bytes import Holding, IncomingBytes
from llamacpp_mqtt_deploy.gateway.long_bodies import LongBodies

T = TypeVar("T")
Content = str | dict[str, Any] | None
"""As `decode_payload` has it."""

LONG_BYTES = 64 * 1024
LONG_MARKS = 4096
"""A body of more is long. Any other takes some milliseconds at most, and mostly less than the way to a thread."""


INCOMING_OF_ONE = 32 * 1024 * 1024
"""Bytes of bodies and frames that are held for one owner while they come and are understood; for all together four times as many.
One body may always be as long as `max_body_bytes` allows."""


async def read_body(request: Request, holding: Holding, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body; raises PayloadTooLarge, TimedOut, Busy and, when the client goes away meanwhile, ClientDisconnect."""
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
                holding.set(len(body))
    except TimeoutError:
        raise TimedOut(f"The body of the request did not arrive within {timeout_s:g} s.") from None
    return bytes(body)


class Bodies:
    """Reads and understands the bodies of requests; long ones beside the loop, and with a bound on what they hold.

    `incoming` counts the frames that connections gather, too.
    """

    def __init__(self, *, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._long = LongBodies(within_s=timeout_s)
        self.incoming = IncomingBytes(
            total=max(4 * INCOMING_OF_ONE, 2 * max_bytes), each=max(INCOMING_OF_ONE, max_bytes)
        )

    async def read(self, request: Request, owner: str, understand: Callable[[Content], T]) -> T:
        """What `understand` makes of the content; raises as `read_body` and `content` do, and what it raises."""
        with self.incoming.holding(owner) as holding:
            raw = await read_body(request, holding, max_bytes=self._max_bytes, timeout_s=self._timeout_s)
            return await self._work(owner, raw, lambda: understand(self._content(raw)))

    async def read_object(self, request: Request, owner: str) -> Mapping[str, Any]:
        """The body as a JSON object; raises as `read`."""
        return await self.read(request, owner, object_of)

    async def content(self, owner: str, raw: bytes) -> Content:
        """What a body or frame holds; raises BadRequest, PayloadTooLarge and Busy."""
        return await self.work(owner, raw, lambda: self._content(raw))

    async def work(self, owner: str, raw: bytes, work: Callable[[], T]) -> T:
        """What `work` makes of what is in `raw`; raises what it raises, and Busy."""
        with self.incoming.holding(owner) as holding:
            holding.set(len(raw))
            return await self._work(owner, raw, work)

    async def _work(self, owner: str, raw: bytes, work: Callable[[], T]) -> T:
        is_long = len(raw) > LONG_BYTES or marks(raw) > LONG_MARKS
        return await self._long.understand(owner, work) if is_long else work()

    def close(self) -> None:
        self._long.close()

    def _content(self, raw: bytes) -> Content:
        return decode_payload(raw, max_bytes=self._max_bytes)


def object_of(content: Content) -> Mapping[str, Any]:
    """The content where it is a JSON object; raises BadRequest."""
    if isinstance(content, dict):
        return content
    raise BadRequest("The body must be a JSON object.", fields={"body": "a JSON object"})


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body has more than {max_bytes} bytes.", fields={"body": f"at most {max_bytes} bytes"})
