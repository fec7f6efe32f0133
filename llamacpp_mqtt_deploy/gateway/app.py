"""The paths of the gateway: which endpoint answers where, and what is told at a path that has none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats import model_lists
from llamacpp_mqtt_deploy.core.formats.anthropic import anthropic_failure
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.ollama import ollama_failure
from llamacpp_mqtt_deploy.core.formats.openai_errors import openai_failure
from llamacpp_mqtt_deploy.core.formats.plain import ASK_EVENTS
from llamacpp_mqtt_deploy.core.formats.rendering import HttpReply, error_event
from llamacpp_mqtt_deploy.gateway.exchange import AnswerEndpoint, Ask, AskEndpoint, Services, note
from llamacpp_mqtt_deploy.gateway.guards import HEAD_BYTES, Journaled, PlainHead, SamePlace
from llamacpp_mqtt_deploy.gateway.key_ring import Owner
from llamacpp_mqtt_deploy.gateway.openapi import document, page
from llamacpp_mqtt_deploy.gateway.pages import Pages, page_files
from llamacpp_mqtt_deploy.gateway.problems import MethodNotAllowed, NotFound, UpgradeRequired
from llamacpp_mqtt_deploy.gateway.replies import http, plain_failure
from llamacpp_mqtt_deploy.gateway.session_control import ControlEndpoint
from llamacpp_mqtt_deploy.gateway.token_counting import COUNT_PATH, CountEndpoint
from llamacpp_mqtt_deploy.gateway.websocket import Events

Answer = Callable[[Request, Owner], Awaitable[HttpReply]]


def build(services: Services) -> ASGIApp:
    """The whole application."""
    middleware = [Middleware(Journaled), Middleware(PlainHead, max_bytes=HEAD_BYTES)]
    if services.keys is None:
        middleware.append(Middleware(SamePlace, origins=services.settings.cors_origins))
    if services.settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(services.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    app = Starlette(
        routes=[*_generations(services), *_lists(services), *_own(services), *_page(services)],
        middleware=middleware,
        exception_handlers={HTTPException: _nothing_here},
    )
    app.router.redirect_slashes = False
    return app


def _generations(services: Services) -> list[BaseRoute]:
    posted = [
        Route(route.path, _Posted(AnswerEndpoint(services, route.dialect, streams=route.streams)), name=route.path)
        for route in HTTP_ROUTES
        if route.path not in ("/ask", "/ask/events")
    ]
    return [
        *posted,
        Route("/ask", _Posted(Ask(services))),
        Route("/ask/events", _Posted(AskEndpoint(services, ASK_EVENTS))),
        Route(COUNT_PATH, _Posted(CountEndpoint(services))),
        Route("/control", _Posted(ControlEndpoint(services))),
    ]


class _Posted:
    """An endpoint that takes POST only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            failure = _failure_of(Request(scope))
            reply = http(failure(error_event(MethodNotAllowed("This address takes POST."))), allow="POST")
            await reply(scope, receive, send)
            return
        await self._app(scope, receive, send)


# --- lists of models ---------------------------------------------------------------------------------------------------


def _lists(services: Services) -> list[BaseRoute]:
    catalog = services.catalog

    async def models(request: Request, owner: Owner) -> HttpReply:
        listed = model_lists.anthropic_models if _is_anthropic(request) else model_lists.openai_models
        return listed(catalog.served(owner))

    async def model(request: Request, owner: Owner) -> HttpReply:
        shown = model_lists.anthropic_model if _is_anthropic(request) else model_lists.openai_model
        return shown(catalog.find(owner, request.path_params["name"]))

    async def tags(_request: Request, owner: Owner) -> HttpReply:
        return model_lists.ollama_tags(catalog.served(owner))

    async def running(_request: Request, owner: Owner) -> HttpReply:
        models = catalog.served(owner)
        moment = max((model.since for model in models), default=None)
        return (
            model_lists.ollama_running(models, expires=moment + timedelta(days=365))
            if moment
            else model_lists.ollama_tags([])
        )

    async def show(request: Request, owner: Owner) -> HttpReply:
        fields = await services.bodies.read_object(request, owner.name)
        name = fields.get("model", fields.get("name"))
        return model_lists.ollama_show(catalog.find(owner, name if isinstance(name, str) else ""))

    async def version(_request: Request, _owner: Owner) -> HttpReply:
        return model_lists.ollama_version()

    return [
        Route("/v1/models", _answering(services, models)),
        Route("/v1/models/{name:path}", _answering(services, model)),
        Route("/api/tags", _answering(services, tags)),
        Route("/api/ps", _answering(services, running)),
        Route("/api/show", _answering(services, show), methods=["POST"]),
        Route("/api/version", _answering(services, version)),
    ]


def _is_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers


def _answering(services: Services, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers from what is known, for who may ask."""

    async def endpoint(request: Request) -> Response:
        try:
            owner = services.owner(request)
            note(request.scope, owner=owner.name)
            return http(await answer(request, owner))
        except RequestError as error:
            note(request.scope, outcome=error.code)
            return http(_failure_of(request)(error_event(error)))
        except ClientDisconnect:
            return Response(status_code=400)  # while its body was read: nobody is left to be answered

    return endpoint


def _failure_of(request: Request) -> Callable[[dict[str, object]], HttpReply]:
    """How the API of this address tells errors."""
    path = request.url.path
    if path.startswith("/v1/"):
        return anthropic_failure if _is_anthropic(request) else openai_failure
    return ollama_failure if path.startswith("/api/") else plain_failure


# --- our own -----------------------------------------------------------------------------------------------------------


def _own(services: Services) -> list[BaseRoute]:
    async def alive(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(_request: Request) -> Response:
        """Whether a request could be answered now: the broker is there, and somebody serves."""
        workers = [server.worker for server in services.catalog.servers()]
        parts = {
            "broker": services.bus.connected,
            "workers": len(workers) if services.bus.status_readable else None,
            "closing": services.capacity.closing,
        }
        fine = parts["broker"] and (bool(workers) or not services.bus.status_readable) and not parts["closing"]
        return JSONResponse({"status": "ok" if fine else "unavailable", **parts}, status_code=200 if fine else 503)

    async def openapi(_request: Request) -> Response:
        return JSONResponse(document(with_keys=services.keys is not None))

    async def docs(_request: Request) -> Response:
        return Response(
            page(),
            media_type="text/html",
            headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"},
        )

    async def no_websocket(_request: Request) -> Response:
        error = UpgradeRequired(
            "This address takes WebSockets only. A proxy before the gateway has to pass the headers Upgrade and Connection on."
        )
        return http(plain_failure(error_event(error)), upgrade="websocket", connection="Upgrade")

    return [
        WebSocketRoute("/ws", Events(services)),
        Route("/ws", no_websocket),
        Route("/healthz", alive),
        Route("/readyz", ready),
        Route("/openapi.json", openapi),
        Route("/docs", docs),
    ]


def _page(services: Services) -> list[BaseRoute]:
    """The chat page, at its files' addresses and nowhere else: what is missing has the form of the API that it looks like."""
    pages = Pages(brokers=services.settings.page_brokers)

    def at(path: str) -> Route:
        return Route(f"/{path}", _Read(pages))

    return [at(path) for path in page_files()]


class _Read:
    """An endpoint of plain files, which looks at the method itself."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._pages(scope, receive, send)


async def _nothing_here(request: Request, error: Exception) -> Response:
    """No endpoint, or not with this method: in the form of the API whose address it looks like."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    problem: RequestError = NotFound("There is nothing at this address; /docs lists what there is.")
    if status == 405:
        problem = MethodNotAllowed("This address takes another method.")
    reply = _failure_of(request)(error_event(problem))
    allow = (error.headers or {}).get("Allow") if isinstance(error, HTTPException) else None
    return http(reply, **({"allow": allow} if allow else {}))
