"""The corpus of hostile schemas against a real llama.cpp server: what ends it is refused, what is accepted leaves it alive."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.json_schema_limits import reference_fault
from tests.support.hostile_schemas import ACCEPTED, KILLERS
from tests.support.llama_server import LlamaServer


def _bodies(schema: dict[str, Any]) -> list[dict[str, Any]]:
    basic = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return [
        basic | {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}},
        basic | {"tools": [tool], "tool_choice": "required"},
    ]


def _status(server: LlamaServer, body: dict[str, Any]) -> int | None:
    """The status of the answer; None when the server ended without one."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (http.client.RemoteDisconnected, ConnectionError):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("name", ACCEPTED)
def test_no_accepted_schema_ends_the_server(llama_server: LlamaServer, name: str) -> None:
    assert reference_fault(ACCEPTED[name]) is None
    for body in _bodies(ACCEPTED[name]):
        assert _status(llama_server, body) in (200, 400, 500)
        assert llama_server.get("/health")[0] == 200


@pytest.mark.parametrize("name", KILLERS)
def test_what_ends_the_server_is_refused(start_llama_server: Callable[..., LlamaServer], name: str) -> None:
    assert reference_fault(KILLERS[name]) is not None
    for body in _bodies(KILLERS[name]):
        assert _status(start_llama_server(), body) is None
