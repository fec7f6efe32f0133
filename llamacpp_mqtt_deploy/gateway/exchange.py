"""From an HTTP request to an answer on the bus: who asks, what is asked, of whom, under which id."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llamacpp_mqtt_deploy.client.asking import session_below
from llamacpp_mqtt_deploy.client.async_bus import AsyncBusClient
from llamacpp_mqtt_deploy.client.exceptions import BusError
from llamacpp_mqtt_deploy.config.settings import GatewaySettings
from llamacpp_mqtt_deploy.core.errors import BadRequest, RequestError
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.plain import ASK_EVENTS, ASK_TEXT
from llamacpp_mqtt_deploy.core.formats.rendering import Dialect, Occasion, error_event
from llamacpp_mqtt_deploy.core.routes import is_level
from llamacpp_mqtt_deploy.gateway.answer_response import AnswerResponse, Pace
from llamacpp_mqtt_deploy.gateway.bodies import Bodies, Content, object_of
from llamacpp_mqtt_deploy.gateway.capacity import Capacity
from llamacpp_mqtt_deploy.gateway.catalog import Catalog
from llamacpp_mqtt_deploy.gateway.key_ring import KeyRing, Owner
from llamacpp_mqtt_deploy.gateway.problems import told
from llamacpp_mqtt_deploy.gateway.replies import http
from llamacpp_mqtt_deploy.gateway.running_answers import Running

log = structlog.get_logger(__name__)

SUBPROTOCOL = "lmd"
"""What a WebSocket of ours is called; a browser, which can set no header there, sends its key as `lmd.key.KEY` beside it."""
_KEY_PROTOCOL = "lmd.key."

_OF_A_KEY = "key."

EAGER = frozenset({"ask_events", "chatbot"})
"""Dialects that say something before the answer begins."""
WITHOUT_ERRORS = frozenset({"ask_text"})
"""Dialects that have no form for an error in a stream: only a cut connection tells that the text is not whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What every endpoint works with."""

    settings: GatewaySettings
    bus: AsyncBusClient
    keys: KeyRing | None
    anyone: Owner
    """Whoever asks, where there are no keys."""
    catalog: Catalog
    capacity: Capacity
    running: Running
    bodies: Bodies

    @property
    def pace(self) -> Pace:
        return Pace(heartbeat_s=self.settings.heartbeat_s, slow_reader_s=self.settings.slow_reader_s)

    def owner(self, connection: HTTPConnection) -> Owner:
        """Who asks; raises Unauthorized."""
        return self.anyone if self.keys is None else self.keys.owner(key_of(connection))

    def count(self, owner: Owner) -> None:
        """One more request of this owner; raises RateLimited."""
        if self.keys is not None:
            self.keys.take(owner)


def key_of(connection: HTTPConnection) -> str | None:
    """The key that a request brings: bearer token, `x-api-key`, or the WebSocket's subprotocol."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if key := connection.headers.get("x-api-key"):
        return key.strip()
    for offered in connection.headers.get("sec-websocket-protocol", "").split(","):
        if offered.strip().startswith(_KEY_PROTOCOL):
            return offered.strip().removeprefix(_KEY_PROTOCOL)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A request that is ready for the bus."""

    asked: Asked
    request: Mapping[str, Any]
    occasion: Occasion
    may_come_back: bool
    """The client named the request itself, so it can ask for the same one again."""


def errand(services: Services, owner: Owner, asked: Asked, *, request_id: str | None) -> Errand:
    """Decide session, model and lane of what was asked. Raises RequestError."""
    model = owner.model(asked.model)
    server = services.catalog.pick(model)
    request = dict(asked.request)
    request_id_of_client = request_id
    request_id = request_id or secrets.token_hex(12)
    session = asked.session
    if session is None and asked.echo.get("kept"):
        # A conversation begins, and its first answer names it; sent again it must be the same one.
        session = f"r-{hashlib.sha256(request_id.encode()).hexdigest()[:24]}"
    elif session is None and "prompt" in request:
        request = stateless(request)
    request["model"] = model
    request["priority"] = owner.lane(request.get("priority"))
    return Errand(
        asked=asked,
        request=request,
        occasion=Occasion(
            request_id=request_id,
            session=session_path(owner, session),
            model=asked.model or model or services.catalog.own_model(server),
            now=lambda: datetime.now(UTC),
        ),
        may_come_back=request_id_of_client is not None,
    )


def stateless(request: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt that belongs to no session as messages, so that nothing of it is kept."""
    system, prompt = request.get("system_prompt"), request["prompt"]
    messages = [{"role": "system", "content": system}] if system else []
    kept = {name: value for name, value in request.items() if name not in ("prompt", "system_prompt", "new")}
    return kept | {"messages": [*messages, {"role": "user", "content": prompt}]}


def session_path(owner: Owner, session: str | None) -> str:
    """Below the owner's level. Requests without a session share one for each key, in which nothing is kept: they are told apart by
    their ids, and the same id again means the same request. No client can name that session."""
    if session is None:
        return f"{owner.level}/{_OF_A_KEY}{owner.name}"
    return session_below(owner.level, f" {session}" if session.startswith(_OF_A_KEY) else session)


def idempotency_key(request: HTTPConnection) -> str | None:
    """The request id that `Idempotency-Key` stands for; a key that no id can hold is hashed. Raises BadRequest."""
    key = request.headers.get("idempotency-key", "").strip()
    if not key:
        return None
    if len(key) > 256:
        raise BadRequest(
            "Idempotency-Key: at most 256 characters.", fields={"Idempotency-Key": "at most 256 characters"}
        )
    return key if is_level(key) else f"k-{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:32]}"


class AnswerEndpoint:
    """The endpoint of one dialect: an ASGI app that answers one POST. `streams` forces the one or the other; else the body
    decides."""

    def __init__(self, services: Services, dialect: Dialect, *, streams: bool | None = None) -> None:
        self._services = services
        self._dialect = dialect
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            with ExitStack() as stack:
                response = await self._respond(request, stack)
                await response(scope, receive, send)
        except ClientDisconnect:
            return  # while its body was read: nobody is left to be answered

    async def _respond(self, request: Request, stack: ExitStack) -> Response | AnswerResponse:
        services = self._services
        try:
            owner = services.owner(request)
            note(request.scope, owner=owner.name, dialect=self._dialect.name)
            services.count(owner)
            stack.enter_context(services.capacity.place(owner.level))
            fields, asked = await services.bodies.read(request, owner.name, self._understand)
            ready = errand(services, owner, asked, request_id=self._request_id(request, fields))
            if not asked.request and self._dialect.idle is not None:
                return http(self._dialect.idle(asked, ready.occasion))
            return await self._begin(ready, request.scope)
        except RequestError as error:
            note(request.scope, outcome=error.code)
            return http(self._dialect.failure(error_event(error)))
        except BusError as error:
            log.warning("request.not_sent", why=str(error))
            return http(self._dialect.failure(told(error)))

    def _understand(self, content: Content) -> tuple[Mapping[str, Any], Asked]:
        fields = self._fields(content)
        return fields, self._dialect.parse(fields)

    def _fields(self, content: Content) -> Mapping[str, Any]:
        """Raises BadRequest."""
        return object_of(content)

    def _request_id(self, request: Request, fields: Mapping[str, Any]) -> str | None:
        """The id that the client gave; None where it gave none. Raises BadRequest."""
        return idempotency_key(request)

    async def _begin(self, ready: Errand, scope: Scope) -> AnswerResponse:
        streams = ready.asked.streams if self._streams is None else self._streams
        occasion = ready.occasion
        answer = await self._services.running.begin(
            session=occasion.session, request_id=occasion.request_id, request=ready.request, streams=streams
        )
        note(scope, request=occasion.request_id, session=occasion.session)
        return AnswerResponse(
            answer,
            self._services.running,
            whole=self._dialect.whole(ready.asked, occasion),
            renderer=self._dialect.stream(ready.asked, occasion) if streams else None,
            pace=self._services.pace,
            may_come_back=ready.may_come_back,
            eager=self._dialect.name in EAGER,
            cut_when_failed=self._dialect.name in WITHOUT_ERRORS,
            note=lambda **fields: note(scope, **fields),
        )


def note(scope: Scope, **fields: Any) -> None:
    """Add to the one line that the log gets for this request."""
    scope.setdefault("lmd.notes", {}).update(fields)


class AskEndpoint(AnswerEndpoint):
    """`POST /ask`: a text, or a request as the protocol has it, answered by text, or by events to who accepts them."""

    def _fields(self, content: Content) -> Mapping[str, Any]:
        if content is None:
            raise BadRequest("The body is empty; send a question.", fields={"body": "a text, or a JSON object"})
        if isinstance(content, str):
            return {"prompt": content}
        # A page has sessions, the protocol a field for those routes whose topics name none.
        return (
            content
            if "session_id" in content or "session" not in content
            else content | {"session_id": content["session"]}
        )

    def _request_id(self, request: Request, fields: Mapping[str, Any]) -> str | None:
        named = fields.get("request_id")
        if named is None:
            return super()._request_id(request, fields)
        if isinstance(named, str) and is_level(named):
            return named
        raise BadRequest(
            "request_id: expected 1 to 64 letters, digits, _ . or -",
            fields={"request_id": "1 to 64 letters, digits, _ . or -"},
        )


class Ask:
    """`/ask` in its two forms, told apart by what the client accepts."""

    def __init__(self, services: Services) -> None:
        self._text = AskEndpoint(services, ASK_TEXT)
        self._events = AskEndpoint(services, ASK_EVENTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wants_events = "text/event-stream" in Request(scope).headers.get("accept", "")
        await (self._events if wants_events else self._text)(scope, receive, send)
