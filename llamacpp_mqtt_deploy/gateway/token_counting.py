"""`POST /v1/messages/count_tokens`: how many tokens a message to Anthropic's API would have, counted by the worker's engine."""

from __future__ import annotations

from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from llamacpp_mqtt_deploy.client.exceptions import BusError
from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats.anthropic import anthropic_failure, tokens_counted
from llamacpp_mqtt_deploy.core.formats.anthropic_body import parse_messages
from llamacpp_mqtt_deploy.core.formats.rendering import HttpReply, error_event
from llamacpp_mqtt_deploy.core.requests import COUNTED_FIELDS
from llamacpp_mqtt_deploy.gateway.bodies import object_of
from llamacpp_mqtt_deploy.gateway.exchange import Services, errand, note
from llamacpp_mqtt_deploy.gateway.problems import told
from llamacpp_mqtt_deploy.gateway.replies import http

COUNT_PATH = "/v1/messages/count_tokens"


class CountEndpoint:
    """An ASGI app; a count takes a place among the answers of its key, for as long as the worker needs."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._reply(Request(scope, receive))
        except RequestError as error:
            note(scope, outcome=error.code)
            reply = anthropic_failure(error_event(error))
        except BusError as error:
            problem = told(error)
            note(scope, outcome=problem["code"])
            reply = anthropic_failure(problem)
        except ClientDisconnect:
            return  # while its body was read: nobody is left to be answered
        await http(reply)(scope, receive, send)

    async def _reply(self, request: Request) -> HttpReply:
        services = self._services
        owner = services.owner(request)
        note(request.scope, owner=owner.name, dialect="anthropic")
        services.count(owner)
        with services.capacity.place(owner.level):
            asked = await services.bodies.read(request, owner.name, lambda content: parse_messages(object_of(content)))
            ready = errand(services, owner, asked, request_id=None)
            counted: dict[str, Any] = {
                name: value for name, value in ready.request.items() if name in COUNTED_FIELDS and value is not None
            }
            return tokens_counted(await services.bus.count_tokens(session=ready.occasion.session, **counted))
