"""The OpenAPI document of the gateway, and a page that lists its addresses."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from llamacpp_mqtt_deploy import __version__
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.rendering import STATUS
from llamacpp_mqtt_deploy.gateway.session_control import ACTIONS
from llamacpp_mqtt_deploy.gateway.token_counting import COUNT_PATH

JSON = "application/json"
_TEXT: Mapping[str, Any] = {"type": "string", "minLength": 1}
_LEVEL: Mapping[str, Any] = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
_SESSION: Mapping[str, Any] = {**_LEVEL, "type": ["string", "integer"], "minimum": 0, "maximum": 2**64 - 1}
_MESSAGES: Mapping[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
    },
}
_SAMPLING: Mapping[str, Any] = {
    "model": {"type": ["string", "null"], "maxLength": 256},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 32768},
}
_OPTIONS: Mapping[str, Any] = {
    "type": ["object", "null"],
    "properties": {"temperature": _SAMPLING["temperature"], "top_p": _SAMPLING["top_p"]},
}
_STREAM: Mapping[str, Any] = {"stream": {"type": ["boolean", "null"]}}
_LOADING_MESSAGES: Mapping[str, Any] = {
    "type": ["array", "null"],
    "items": {
        **_MESSAGES["items"],
        "required": ["role"],
        "properties": {**_MESSAGES["items"]["properties"], "content": {"type": ["string", "null"]}},
    },
}

# What a body may have beside; of the others `_SAMPLING`.
_OPTIONAL: Mapping[str, Mapping[str, Any]] = {
    "/v1/responses": {
        **{name: schema for name, schema in _SAMPLING.items() if name != "max_tokens"},
        "max_output_tokens": _SAMPLING["max_tokens"],
    },
    "/v1/messages": _SAMPLING,
    "/api/chat": {"model": _SAMPLING["model"], "options": _OPTIONS},
    "/api/generate": {"model": _SAMPLING["model"], "options": _OPTIONS},
    "/chat/conversation": {**_SAMPLING, "conversation_id": {**_SESSION, "type": ["string", "integer", "null"]}},
}

# What a body needs, by the path that takes it: name -> schema.
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": _MESSAGES},
    "/v1/responses": {"input": _TEXT},
    "/v1/messages": {
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string"}},
            },
        },
    },
    # Without anything to answer the model is loaded, as Ollama says.
    "/api/chat": {"messages": _LOADING_MESSAGES},
    "/api/generate": {"prompt": {"type": ["string", "null"]}},
    "/api/llm/chat": {"messages": _MESSAGES},
    "/api/llm/chat/session": {"session_id": _SESSION, "message": _TEXT},
    "/api/chatbot/messages": {"session_id": _SESSION, "content": _TEXT},
    "/chat": {"prompt": _TEXT},
    "/chat/": {"prompt": _TEXT},
    "/chat/conversation": {"prompt": _TEXT},
    "/chat/stream": {"message": _TEXT},
    "/api/chat/stream": {"message": _TEXT},
    "/api/stream/message": {"message": _TEXT},
    "/api/stream/chatkit": {"message": _TEXT},
    "/ask": {"prompt": _TEXT},
    "/ask/events": {"prompt": _TEXT},
}

_COUNTED: Mapping[str, Any] = {
    "type": "object",
    "required": ["input_tokens"],
    "properties": {"input_tokens": {"type": "integer", "minimum": 0}},
}

_SAID: Mapping[str, str] = {
    "/v1/chat/completions": "OpenAI: a chat completion",
    "/v1/responses": "OpenAI: a response",
    "/v1/messages": "Anthropic: a message",
    "/api/chat": "Ollama: a chat",
    "/api/generate": "Ollama: a completion",
    "/ask": "A text is answered by text; a request of the protocol too, and by its events where they are accepted",
    "/ask/events": "A request of the protocol, answered by its events",
}

_LISTS: Mapping[str, str] = {
    "/v1/models": "OpenAI: the models (Anthropic's form with the header anthropic-version)",
    "/api/tags": "Ollama: the models",
    "/api/ps": "Ollama: the models that run",
    "/api/version": "Ollama: the version of its API that is spoken",
    "/healthz": "Whether the gateway lives",
    "/readyz": "Whether a request could be answered now",
    "/openapi.json": "This document",
}


def document(*, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for route in HTTP_ROUTES:
        streams = route.path.removesuffix("/stream")
        needed = _NEEDED.get(route.path, _NEEDED.get(streams, {}))
        optional = dict(_OPTIONAL.get(route.path, _SAMPLING)) | (dict(_STREAM) if route.streams is None else {})
        paths[route.path] = {"post": _generation(_SAID.get(route.path, "A web backend's own form"), needed, optional)}
    model = {"model": _SAMPLING["model"]}
    counted = _operation(
        "Anthropic: the tokens of a message", _NEEDED["/v1/messages"], model, {JSON: {"schema": _COUNTED}}
    )
    paths[COUNT_PATH] = {"post": counted}
    paths["/control"] = {"post": _control()}
    for path, said in _LISTS.items():
        paths[path] = {"get": {"summary": said, "responses": _responses({JSON: {"schema": {"type": "object"}}})}}
    shown = {"model": {"type": "string", "minLength": 1, "maxLength": 256}}
    paths["/api/show"] = {
        "post": _operation("Ollama: what a model can do", shown, {}, {JSON: {"schema": {"type": "object"}}})
    }
    told: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "llamacpp-mqtt-deploy gateway",
            "version": __version__,
            "description": "A language model behind an MQTT broker, for programs that speak HTTP. `/ws` is a WebSocket: frames of"
            " type request and control one way, the events of the protocol the other. Bodies are stricter than JSON, also in fields"
            " that nobody reads: no doubled names, no numbers over 64 bits, no lone surrogates, at most 32 levels.",
        },
        "paths": paths,
    }
    if with_keys:
        told["components"] = {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
        }
        told["security"] = [{"bearer": []}, {"apiKey": []}]
        for path in ("/healthz", "/readyz", "/openapi.json"):
            paths[path]["get"]["security"] = []
    return told


def _generation(said: str, needed: Mapping[str, Any], optional: Mapping[str, Any]) -> dict[str, Any]:
    content = {
        JSON: {"schema": {"type": "object"}},
        "text/event-stream": {},
        "application/x-ndjson": {"schema": {"type": "string"}},
        "text/plain": {"schema": {"type": "string"}},
    }
    return _operation(said, needed, optional, content) | {
        "parameters": [
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "Sent again with the same key, a request runs once and gets the same answer. One that no request id"
                " can be is hashed.",
                "schema": {"type": "string", "maxLength": 256},
            }
        ]
    }


def _operation(
    said: str, needed: Mapping[str, Any], optional: Mapping[str, Any], content: Mapping[str, Any]
) -> dict[str, Any]:
    schema = {"type": "object", "required": list(needed), "properties": {**optional, **needed}}
    return {
        "summary": said,
        "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
        "responses": _responses(content),
    }


def _control() -> dict[str, Any]:
    named, request = {"session": {"type": "string"}}, {"request_id": _LEVEL}
    needed = {"action": {"enum": list(ACTIONS)}}
    optional = {"session": {"type": ["string", "null"]}, "request_id": {**_LEVEL, "type": ["string", "null"]}}
    operation = _operation(
        "Cancel, reset, delete, history, ping", needed, optional, {JSON: {"schema": {"type": "object"}}}
    )
    operation["requestBody"]["content"][JSON]["schema"]["anyOf"] = [
        {"properties": {"action": {"const": "ping"}}},
        {
            "properties": {"action": {"enum": ["reset", "delete", "history", "cancel"]}, **named},
            "required": ["session"],
        },
        {"properties": {"action": {"const": "cancel"}, **request}, "required": ["request_id"]},
    ]
    return operation


def _responses(content: Mapping[str, Any]) -> dict[str, Any]:
    failures = sorted({*STATUS.values(), 408})
    failed = {JSON: {"schema": {}}, "text/plain": {"schema": {"type": "string"}}}
    return {
        "200": {"description": "The answer.", "content": dict(content)},
        **{str(status): {"description": "An error in the form of this API.", "content": failed} for status in failures},
    }


def page() -> str:
    """The addresses as a page."""
    rows = []
    for path, operations in document(with_keys=False)["paths"].items():
        for method, operation in operations.items():
            rows.append(
                f"<tr><td>{method.upper()}</td><td><code>{escape(path)}</code></td><td>{escape(operation['summary'])}</td></tr>"
            )
    return _PAGE.replace("ROWS", "\n".join(rows))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>llamacpp-mqtt-deploy gateway</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #8884; padding: .3rem .6rem; vertical-align: top }
pre { background: #8882; padding: .8rem; overflow: auto }
</style></head><body>
<h1>llamacpp-mqtt-deploy gateway</h1>
<p>A language model behind an MQTT broker, for programs that speak HTTP. The whole description is <a href="/openapi.json">openapi.json</a>.</p>
<pre>curl -N -d 'Why is the sky blue?' http://127.0.0.1:8089/ask</pre>
<table>
ROWS
<tr><td>WS</td><td><code>/ws</code></td><td>The events of the protocol, requests and controls the other way</td></tr>
</table>
</body></html>
"""
