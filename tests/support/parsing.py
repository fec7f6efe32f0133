"""Short ways to parse a request and to see why one was refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.errors import BadRequest, RequestError
from llamacpp_mqtt_deploy.core.requests import Generate, RequestPolicy, check_request, read_request

OPEN = RequestPolicy(models=("tiny", "large"), max_tokens=1000, max_timeout_s=600.0, default_timeout_s=300.0)
MAZE = RequestPolicy(fields={"prompt": "message", "session_id": "sessionId"}, trust_payload_session=True)
PORTAL = RequestPolicy(fields={"prompt": "message"}, trust_payload_session=True)

PNG = "data:image/png;base64,iVBORw0KGgo="
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Ulm"}'}}
HELLO = {"role": "user", "content": "Hello"}


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def parse_request(payload: bytes, *, policy: RequestPolicy) -> Generate | None:
    """A request from its bytes, as the worker reads and checks it; None when the payload is blank."""
    raw = read_request(payload, policy=policy)
    return None if raw is None else check_request(raw, policy=policy)


def parse(body: Any, policy: RequestPolicy = OPEN) -> Generate:
    found = parse_request(encoded(body), policy=policy)
    assert found is not None
    return found


def ask(**fields: Any) -> Generate:
    return parse({"prompt": "Hello", **fields})


def refused(body: Any, policy: RequestPolicy = OPEN, kind: type[RequestError] = BadRequest) -> dict[str, str]:
    """The fields that the refusal names."""
    with pytest.raises(kind) as caught:
        parse(body, policy)
    assert type(caught.value) is kind
    fields: dict[str, str] = caught.value.details["fields"]
    for name, words in fields.items():
        assert name in caught.value.message
        assert words
    assert len(caught.value.message) < 2000
    return fields
