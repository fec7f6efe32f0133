"""Controls over HTTP and WebSocket: cancel, reset, delete, history, ping of the owner's own sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from llamacpp_mqtt_deploy.client.exceptions import BusError, NoWorker
from llamacpp_mqtt_deploy.core.errors import BadRequest, RequestError
from llamacpp_mqtt_deploy.core.formats.framing import json_line
from llamacpp_mqtt_deploy.core.formats.rendering import HttpReply, error_event
from llamacpp_mqtt_deploy.core.routes import is_level
from llamacpp_mqtt_deploy.gateway.exchange import Services, note, session_path
from llamacpp_mqtt_deploy.gateway.key_ring import Owner
from llamacpp_mqtt_deploy.gateway.problems import COME_BACK_S, BrokerAway, NobodyServes
from llamacpp_mqtt_deploy.gateway.replies import http, plain_failure

log = structlog.get_logger(__name__)

ACTIONS = ("cancel", "reset", "delete", "history", "ping")
ANSWERED_WITHIN_S = 10.0


def session_in(fields: Mapping[str, Any]) -> str | None:
    """The session that a control or a frame names; as in a request, a whole number is as good as its digits. Raises BadRequest."""
    session = fields.get("session", fields.get("session_id"))
    if isinstance(session, int) and not isinstance(session, bool) and session >= 0:
        return str(session)
    if session is not None and not isinstance(session, str):
        raise BadRequest("session: expected a text", fields={"session": "a text"})
    return session


async def ask_control(services: Services, owner: Owner, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Send `{session, action, request_id?, transaction?}` to the worker; its ack. Raises RequestError."""
    action, session = fields.get("action"), session_in(fields)
    request_id, transaction = fields.get("request_id"), fields.get("transaction")
    if action not in ACTIONS:
        raise BadRequest(
            f"action: expected one of {', '.join(ACTIONS)}", fields={"action": f"one of {', '.join(ACTIONS)}"}
        )
    if session is None and action in ("reset", "delete", "history"):
        raise BadRequest(f"session: {action} needs one", fields={"session": "the session that is meant"})
    if request_id is not None and not (isinstance(request_id, str) and is_level(request_id)):
        expected = "1 to 64 letters, digits, _ . or -"
        raise BadRequest(f"request_id: expected {expected}", fields={"request_id": expected})
    if action == "cancel" and session is None and request_id is None:
        # It would end all that the owner asked without a session, and so what others of the same key wait for.
        raise BadRequest(
            "session: cancel needs one, or a request_id",
            fields={"session": "the session that is meant, or a request_id"},
        )
    services.catalog.pick(None)
    path = session_path(owner, session)
    try:
        ack = await services.bus.control(path, action, request_id=request_id, timeout_s=ANSWERED_WITHIN_S)
    except NoWorker:
        raise NobodyServes("The worker did not answer.", retry_after_s=COME_BACK_S) from None
    except BusError as error:
        log.warning("control.not_sent", action=action, why=str(error))
        raise BrokerAway("The control message could not be sent.", retry_after_s=COME_BACK_S) from None
    told = {name: value for name, value in ack.items() if name != "transaction"}
    return told | ({"transaction": transaction} if isinstance(transaction, str) else {})


class ControlEndpoint:
    """`POST /control`: an ASGI app that answers with the worker's ack."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            owner = self._services.owner(request)
            note(scope, owner=owner.name)
            self._services.count(owner)
            fields = await self._services.bodies.read_object(request, owner.name)
            ack = await ask_control(self._services, owner, fields)
            reply = HttpReply(status=200 if ack.get("status") == "ok" else 400, body=json_line(ack))
        except RequestError as error:
            note(scope, outcome=error.code)
            reply = plain_failure(error_event(error))
        except ClientDisconnect:
            return
        await http(reply)(scope, receive, send)
