"""`/ws`: the protocol's events as they are, many requests over one socket, requests and controls the other way."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from llamacpp_mqtt_deploy.client.async_answer import AsyncAnswer
from llamacpp_mqtt_deploy.client.exceptions import BusError
from llamacpp_mqtt_deploy.core.errors import BadRequest, Busy, Internal, RequestError
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.formats.plain import parse_ask
from llamacpp_mqtt_deploy.core.formats.rendering import error_event
from llamacpp_mqtt_deploy.core.routes import is_level
from llamacpp_mqtt_deploy.gateway.capacity import Capacity
from llamacpp_mqtt_deploy.gateway.exchange import SUBPROTOCOL, Services, errand, note, session_path
from llamacpp_mqtt_deploy.gateway.key_ring import Owner
from llamacpp_mqtt_deploy.gateway.problems import Unauthorized, told
from llamacpp_mqtt_deploy.gateway.session_control import ask_control, session_in
from llamacpp_mqtt_deploy.gateway.told_events import ToldEvents

log = structlog.get_logger(__name__)

SOCKETS = 1024
"""Sockets at once, a quarter of them for one first topic level."""
REQUESTS_OF_ONE_SOCKET = 64
POLICY_VIOLATION, TOO_BIG, SERVICE_RESTART = 1008, 1009, 1012
_CLEAN_CLOSES = (1000, 1001, 1005)
"""The page was left, or closed the socket itself; any other end is an accident, after which it comes back."""


class Events:
    """The ASGI app of `/ws`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._sockets = Capacity(total=SOCKETS, each=SOCKETS // 4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        with ExitStack() as stack:
            try:
                owner = self._services.owner(socket)
                stack.enter_context(self._sockets.place(owner.level))
            except RequestError as error:
                note(scope, outcome=error.code)
                await socket.close(POLICY_VIOLATION, error.code)  # before the handshake: the client sees 403
                return
            note(scope, owner=owner.name)
            await socket.accept(SUBPROTOCOL if SUBPROTOCOL in scope.get("subprotocols", ()) else None)
            await _Conversation(self._services, owner, socket).run()


class _Conversation:
    """One socket: a reader of frames, and a task for each request under way."""

    def __init__(self, services: Services, owner: Owner, socket: WebSocket) -> None:
        self._services = services
        self._owner = owner
        self._socket = socket
        self._writing = asyncio.Lock()
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._controls: set[asyncio.Task[None]] = set()
        self._clean = False
        self._reader: asyncio.Task[Any] | None = None
        self._stuck = False

    async def run(self) -> None:
        self._reader = asyncio.current_task()
        try:
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    self._clean = message.get("code") in _CLEAN_CLOSES
                    return
                await self._take(message.get("text") or message.get("bytes") or "")
        except (WebSocketDisconnect, _Closed):
            return
        except asyncio.CancelledError:
            if not self._stuck:
                raise
        finally:
            for task in (*self._tasks.values(), *self._controls):
                task.cancel()
            await asyncio.gather(*self._tasks.values(), *self._controls, return_exceptions=True)
            await self._close(SERVICE_RESTART)

    async def _take(self, frame: str | bytes) -> None:
        """One frame; what is wrong with it is told, and the socket lives on."""
        fields: Mapping[str, Any] = {}
        try:
            raw = frame.encode("utf-8", "replace") if isinstance(frame, str) else frame
            content = await self._services.bodies.content(self._owner.name, raw)
            if not isinstance(content, dict):
                raise BadRequest("A frame must be a JSON object.", fields={"frame": "a JSON object"})
            fields = content
            self._look_at_the_key()
            match content.get("type", "request"):
                case "request":
                    await self._request(content, raw)
                case "control":
                    self._control(content)
                case _:
                    raise BadRequest("type: expected request or control", fields={"type": "request or control"})
        except Unauthorized as error:
            await self._tell(_about(fields) | error_event(error) | {"final": True})
            await self._close(POLICY_VIOLATION)
            raise _Closed from error
        except RequestError as error:
            await self._tell(self._refusal(fields, error))

    def _refusal(self, fields: Mapping[str, Any], error: RequestError) -> dict[str, Any]:
        """What ends the request of a frame; a control, or another frame for a request that is under way, ends nothing."""
        if fields.get("type") == "control":
            ack = {"type": "ack", "action": fields.get("action"), "status": "error", "code": error.code}
            ack |= {"message": error.message, **error.details}
            transaction = fields.get("transaction")
            return ack | ({"transaction": transaction} if isinstance(transaction, str) else {})
        event = _about(fields) | error_event(error)
        return event | ({"type": "rejected"} if self._is_under_way(fields) else {"final": True})

    def _is_under_way(self, fields: Mapping[str, Any]) -> bool:
        request_id = fields.get("request_id")
        try:
            session = session_path(self._owner, session_in(fields))
        except BadRequest:
            return False
        if not isinstance(request_id, str):
            return False
        running = self._services.running  # which does not know one yet that waits for the broker
        return (session, request_id) in self._tasks or running.under_way(session=session, request_id=request_id)

    def _look_at_the_key(self) -> None:
        """The keys may have changed since the handshake; raises Unauthorized when this one is gone, or stands for another level."""
        owner = self._services.owner(self._socket)
        if owner.level != self._owner.level:  # whose places this socket takes up, and whose sessions it knows
            raise Unauthorized("This key belongs to another topic level now. Connect again.")
        self._owner = owner

    # --- requests ----------------------------------------------------------------------------------------------------

    async def _request(self, fields: Mapping[str, Any], raw: bytes) -> None:
        given = fields.get("request_id")
        if given is not None and not (isinstance(given, str) and is_level(given)):
            raise BadRequest(
                "request_id: expected 1 to 64 letters, digits, _ . or -",
                fields={"request_id": "1 to 64 letters, digits, _ . or -"},
            )
        body = {name: value for name, value in fields.items() if name not in ("type", "session")}
        if "session" in fields:
            body["session_id"] = fields["session"]
        asked = await self._services.bodies.work(self._owner.name, raw, lambda: parse_ask(body))
        ready = errand(self._services, self._owner, asked, request_id=given or secrets.token_hex(12))
        name = (ready.occasion.session, ready.occasion.request_id)
        known = self._tasks.get(name)
        if known is None and len(self._tasks) >= REQUESTS_OF_ONE_SOCKET:
            raise Busy(
                f"{REQUESTS_OF_ONE_SOCKET} requests of this connection are under way already.", retry_after_s=1.0
            )
        self._services.count(self._owner)  # sent again, too, it makes the worker tell what it has
        self._services.running.check(session=name[0], request_id=name[1], request=ready.request)
        if known is not None:
            known.cancel()  # the new delivery brings what is missing
        streams: Any = asked.request.get("stream", asked.streams)
        task = asyncio.create_task(
            self._follow(name, dict(ready.request), streams=streams, can_return=given is not None)
        )
        self._tasks[name] = task
        task.add_done_callback(lambda ended: self._tasks.pop(name, None) if self._tasks.get(name) is ended else None)

    async def _follow(self, name: tuple[str, str], request: dict[str, Any], *, streams: Any, can_return: bool) -> None:
        session, request_id = name
        running = self._services.running
        answer: AsyncAnswer | None = None
        try:
            with ExitStack() as stack:
                stack.enter_context(self._services.capacity.place(self._owner.level))
                answer = await running.begin(
                    session=session, request_id=request_id, request=request, streams=bool(streams)
                )
                await self._forward(answer)
        except RequestError as error:
            await self._tell(_named(name) | error_event(error) | {"final": True})
        except BusError as error:
            log.warning("request.not_sent", why=str(error))
            await self._tell(_named(name) | told(error) | {"final": True})
        except _Closed:
            return
        except Exception:
            # Nobody waits for this task: without an answer the client would wait for ever.
            log.exception("http.failed", path="/ws")
            with contextlib.suppress(_Closed):
                await self._tell(
                    _named(name) | error_event(Internal("The gateway failed; its log says more.")) | {"final": True}
                )
        finally:
            if answer is not None:
                running.leave(answer, may_come_back=can_return and not self._clean)

    async def _forward(self, answer: AsyncAnswer) -> None:
        events = ToldEvents()
        while True:
            reading = await answer.poll()
            if reading is not None:
                await self._tell(events.told(reading))
            elif answer.ended:
                break
        outcome = answer.outcome
        if isinstance(outcome, BusError) and not events.ended and not self._socket_gone():
            name = (answer.session, answer.request_id)
            await self._tell(_named(name) | told(outcome) | {"final": True})

    # --- controls ----------------------------------------------------------------------------------------------------

    def _control(self, fields: Mapping[str, Any]) -> None:
        if len(self._controls) >= REQUESTS_OF_ONE_SOCKET:
            raise Busy("Too many controls of this connection wait for their answers.", retry_after_s=1.0)
        self._services.count(self._owner)
        task = asyncio.create_task(self._controlled(fields))
        self._controls.add(task)
        task.add_done_callback(self._controls.discard)

    async def _controlled(self, fields: Mapping[str, Any]) -> None:
        with contextlib.suppress(_Closed):
            try:
                ack = await ask_control(self._services, self._owner, fields)
            except RequestError as error:
                ack = self._refusal(fields, error)
            await self._tell(ack)

    # --- the socket --------------------------------------------------------------------------------------------------

    async def _tell(self, event: Mapping[str, Any]) -> None:
        """Send one event; raises _Closed when the socket is over or takes nothing."""
        try:
            async with asyncio.timeout(self._services.settings.slow_reader_s), self._writing:
                if self._socket_gone():
                    raise _Closed
                await self._socket.send_text(encode(dict(event)).decode())
        except TimeoutError as error:
            # Whoever takes nothing gets no more: the socket ends, with all of its requests.
            if self._reader is not None and not self._stuck:
                self._stuck = True
                self._reader.cancel()
            raise _Closed from error
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            raise _Closed from error

    def _socket_gone(self) -> bool:
        return WebSocketState.DISCONNECTED in (self._socket.application_state, self._socket.client_state)

    async def _close(self, code: int) -> None:
        if not self._socket_gone():
            try:
                async with asyncio.timeout(1.0):
                    await self._socket.close(code)
            except (TimeoutError, RuntimeError, OSError):
                return


class _Closed(Exception):
    """The socket is over."""


def _about(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = ("request_id", "session_id")
    return {name: fields[name] for name in names if isinstance(fields.get(name), str)}


def _named(name: tuple[str, str]) -> dict[str, Any]:
    return {"session_id": name[0], "request_id": name[1]}
