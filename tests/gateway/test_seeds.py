"""The web backends' own endpoints, read as the snippets in their documents read them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import httpx
import pytest

from tests.gateway.world import RunningGateway
from tests.support.services import require_program

pytestmark = pytest.mark.broker


def objects(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(
    "path,body",
    [
        ("/api/llm/chat/stream", {"messages": [{"role": "user", "content": "count up now"}], "temperature": 0.7}),
        (
            "/api/llm/chat/session/stream",
            {"session_id": "my-session-123", "message": "count up now", "max_tokens": 512},
        ),
    ],
)
def test_content_then_done(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(path, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = objects(response)
    assert "".join(one.get("content", "") for one in told) == "count up now"
    assert told[-1]["done"] is True
    whole = http.post(path.removesuffix("/stream"), json=body).json()
    assert whole["response"].endswith("count up now")


def test_metadata_chunks_and_done_with_the_whole_text(http: httpx.Client) -> None:
    told = objects(http.post("/api/chatbot/messages/stream", json={"session_id": 1, "content": "tell me more"}))
    assert told[0]["type"] == "metadata"
    assert told[0]["session_id"] == 1
    assert [one["type"] for one in told[1:]] == ["chunk"] * (len(told) - 2) + ["done"]
    assert told[-1]["full_content"] == "tell me more"
    whole = http.post("/api/chatbot/messages", json={"session_id": 1, "content": "again"}).json()
    assert whole["assistant_message"]["content"] == "again"


@pytest.mark.parametrize("path", ["/chat", "/chat/", "/chat/conversation"])
def test_typed_chunks_in_plain_text(http: httpx.Client, path: str) -> None:
    body = {"prompt": "how are you", "model": "default", "provider": "local", "conversation_id": 123, "stream": True}
    response = http.post(path, json=body)
    assert response.headers["content-type"].startswith("text/plain")
    told = objects(response)
    assert "".join(one.get("chunk", "") for one in told) == "how are you"
    assert told[-1] == {"type": "done"}
    assert http.post(path, json=body | {"stream": False}).json()["response"] == "how are you"


def test_named_events(http: httpx.Client) -> None:
    for path in ("/chat/stream", "/api/chat/stream"):
        response = http.post(path, content='{"message": "Hello there"}')
        names = [line[7:] for line in response.text.splitlines() if line.startswith("event: ")]
        assert names[0] == "message_start"
        assert names[-1] == "message_stop"
        deltas = [one["delta"]["text"] for one in objects(response) if one["type"] == "content_block_delta"]
        assert "".join(deltas) == "Hello there"


def test_tokens(http: httpx.Client) -> None:
    told = objects(http.post("/api/stream/message", json={"message": "one token each"}))
    assert "".join(one["token"] for one in told) == "one token each"


def test_a_session_of_one_endpoint_goes_on(http: httpx.Client) -> None:
    for message in ("I am Ada", "who am I"):
        http.post("/api/llm/chat/session", json={"session_id": "s1", "message": message})
    history = http.post("/control", json={"action": "history", "session": "s1"}).json()["messages"]
    assert [message["content"] for message in history] == ["I am Ada", "I am Ada", "who am I", "who am I"]


def test_errors_are_told_where_these_clients_look(http: httpx.Client) -> None:
    response = http.post("/api/llm/chat/stream", json={})
    assert response.status_code == 400
    assert response.json()["detail"]


def test_curl_streams_a_text(gateway: RunningGateway) -> None:
    curl = require_program("curl")
    result = subprocess.run(
        [curl, "-sN", "-d", "Why is the sky blue?", f"{gateway.url}/ask"], capture_output=True, timeout=30, check=True
    )
    assert result.stdout == b"Why is the sky blue?"
