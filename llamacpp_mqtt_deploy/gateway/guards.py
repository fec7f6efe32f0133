"""What stands before every endpoint: foreign web pages stay out, a defect becomes an answer, each request gets one line in the log."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamacpp_mqtt_deploy.core.errors import BadRequest
from llamacpp_mqtt_deploy.core.formats.rendering import error_event
from llamacpp_mqtt_deploy.gateway.answer_response import Cut
from llamacpp_mqtt_deploy.gateway.problems import Forbidden
from llamacpp_mqtt_deploy.gateway.replies import http, plain_failure

log = structlog.get_logger(__name__)

HEAD_BYTES = 32 * 1024
"""Request line and headers together."""

_DEFECT = {"type": "error", "code": "internal", "message": "The gateway failed; its log says more.", "retryable": False}

SECURITY_HEADERS: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
}


def is_this_machine(host: str) -> bool:
    """Whether a host of a URL or a header means this machine."""
    name = host.strip().lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class SamePlace:
    """Without keys whoever reaches the port may ask, and a browser on this machine lets every page that it shows reach it. So only
    pages of our own, and those that `cors_origins` names, may ask then; and only under a name of this machine, since a page can
    let its own name point here."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        problem = self._problem(Headers(scope=scope))
        if problem is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "origin"})
        else:
            await http(plain_failure(error_event(Forbidden(problem))))(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if host and not is_this_machine(_hostname(f"//{host}")):
            return "Without keys the gateway answers under names of this machine only; `lmd gateway key add NAME` makes a key."
        origin = headers.get("origin")
        if origin is None or origin in self._origins or urlsplit_netloc(origin) == host.lower():
            return None
        return "Pages of other origins may not ask; gateway.cors_origins names those that may."


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def urlsplit_netloc(url: str) -> str:
    """Host and port of a URL; empty for what is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


class PlainHead:
    """A head that another reader might read in another way is refused, and its connection closed with all that follows: a proxy
    before us may see one request where we see two. uvicorn takes both framings at once, any version, and heads of any size that
    come in one piece."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await http(plain_failure(error_event(BadRequest(problem))), connection="close")(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        names = {name for name, _ in scope["headers"]}
        if {b"content-length", b"transfer-encoding"} <= names:
            return "A request has Content-Length or Transfer-Encoding, not both."
        if scope["http_version"] not in ("1.0", "1.1"):
            return "The gateway speaks HTTP/1.1."
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_bytes:
            return f"The headers have more than {self._max_bytes} bytes."
        return None


class Journaled:
    """One line in the log for each request, an answer for each defect, and headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began_at = time.monotonic()
        seen: dict[str, Any] = {"status": None, "bytes": 0}
        notes: dict[str, Any] = {}
        scope["lmd.notes"] = notes

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                known = {name for name, _ in message.get("headers", ())}
                added = [(n.encode(), v.encode()) for n, v in SECURITY_HEADERS.items() if n.encode() not in known]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            elif message["type"] == "http.response.body":
                seen["bytes"] += len(message.get("body", b""))
            elif message["type"] == "websocket.accept":
                seen["status"] = 101
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Cut as cut:
            notes.setdefault("outcome", "cut")
            log.info("http.cut", why=str(cut))
            raise
        except Exception:
            log.exception("http.failed", path=_path(scope))
            if scope["type"] != "http" or seen["status"] is not None:
                raise
            await http(plain_failure(_DEFECT))(scope, receive, noting)
        finally:
            quiet = seen["status"] in (200, 304) and "owner" not in notes
            tell = log.debug if quiet else log.info
            tell(
                "http.answered",
                method=scope.get("method", "WS"),
                path=_path(scope),
                status=seen["status"],
                ms=round(1000 * (time.monotonic() - began_at)),
                bytes=seen["bytes"],
                **notes,
            )


def _path(scope: Scope) -> str:
    return str(scope.get("path", ""))[:200]
