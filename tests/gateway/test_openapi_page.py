"""What the OpenAPI page says of a body, and what the gateway does with it, are one thing."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema
import pytest

from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.gateway.world import World

pytestmark = pytest.mark.broker

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TAKEN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "temperature": None, "stream": None}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": None}),
    ("/v1/messages", {"messages": HELLO, "model": None}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": ""}], "model": ""}),
    ("/api/chat", {"messages": [], "stream": False}),
    ("/api/generate", {"prompt": None, "stream": False}),
    ("/api/llm/chat/session", {"session_id": 0, "message": "hello"}),
    ("/api/chatbot/messages", {"session_id": 7, "content": "hello"}),
    ("/chat/conversation", {"prompt": "hello", "conversation_id": None}),
    ("/control", {"action": "ping"}),
    ("/control", {"action": "ping", "session": None}),
    ("/control", {"action": "cancel", "request_id": "r1"}),
    ("/control", {"action": "reset", "session": "any words"}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 0}),
    ("/v1/messages/count_tokens", {"messages": []}),
    ("/api/llm/chat/session", {"session_id": "any words", "message": "hello"}),
    ("/chat/conversation", {"prompt": "hello", "conversation_id": -1}),
    ("/control", {"action": "reset"}),
    ("/control", {"action": "cancel"}),
    ("/control", {"action": "cancel", "request_id": "any words"}),
    ("/ask", {"prompt": ""}),
]


@pytest.fixture
def http(world: World) -> Any:
    world.worker(ScriptedEngine(slots=2))
    with httpx.Client(base_url=world.gateway().url, timeout=20) as client:
        yield client


def test_what_the_page_allows_is_taken_and_what_it_forbids_is_refused(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    for taken, cases in ((True, TAKEN), (False, REFUSED)):
        for path, body in cases:
            schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert jsonschema.Draft202012Validator(schema).is_valid(body) is taken, (path, body)
            response = http.post(path, json=body)
            assert response.status_code == (200 if taken else 400), (path, body, response.text)


def test_an_idempotency_key_may_be_any_text_of_256_characters(http: httpx.Client) -> None:
    for key, status in (("r1", 200), ("two words", 200), ("x" * 256, 200), ("x" * 257, 400)):
        headers = {"Idempotency-Key": key}
        assert http.post("/ask/events", json={"prompt": "hello"}, headers=headers).status_code == status
