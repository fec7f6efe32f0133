"""The published JSON Schema is the one that the code makes, and it agrees with what the worker takes and says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
from pydantic import BaseModel, ValidationError

from llamacpp_mqtt_deploy.core.errors import BY_CODE, BadRequest, RequestError
from llamacpp_mqtt_deploy.core.events import ORDER, EventWriter, rejected
from llamacpp_mqtt_deploy.core.requests import RequestPolicy
from llamacpp_mqtt_deploy.schema.document import (
    schema,
    schema_text,
    validate_admin_ack,
    validate_event,
    validate_health,
    validate_status,
)
from llamacpp_mqtt_deploy.schema.event_models import Ack
from tests.support.parsing import parse_request

DOCUMENT = schema()
PUBLISHED = Path(__file__).parents[2] / "docs" / "schema.json"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "cached_tokens": 0}
TIMINGS = {"queue_ms": 0.1, "first_token_ms": 20.5, "total_ms": 60, "tokens_per_second": 75.0}
MESSAGE = {"role": "assistant", "content": "Hello"}
DONE = {
    "full_content": "Hello",
    "message": MESSAGE,
    "finish_reason": "stop",
    "usage": USAGE,
    "timings": TIMINGS,
    "dropped_messages": 0,
}


def conforms(name: str, message: Any) -> bool:
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": DOCUMENT["$defs"]})
    return bool(validator.is_valid(message))


def writer(max_bytes: int = 4096) -> EventWriter:
    return EventWriter(request_id="r1", session_id="u/s1", max_bytes=max_bytes)


def stream() -> list[bytes]:
    events = writer()
    calls = [{"index": 0, "id": "c1", "name": "f", "arguments": "{"}, {"index": 0, "arguments": "}"}]
    return [
        events.queued(position=2, reason="waiting"),
        events.start({"model": "tiny", "worker": "w", "created": 1, "warnings": ["x"], "metadata": {"a": None}}),
        events.progress(processed=1, total=9, cached=0),
        *events.chunks("reasoning", "hm"),
        *events.chunks("content", "Hello"),
        *events.tool_calls(calls),
        events.ping(state="generating"),
        events.snapshot(content="Hello", reasoning="hm"),
        events.done(DONE | {"metadata": {"a": None}, "stop_sequence": "\n"}),
        rejected(request_id="r1", session_id="s", code="duplicate_request", message="taken"),
    ]


# --- the document ----------------------------------------------------------------------------------------------------


def test_the_published_schema_is_the_one_that_the_code_makes() -> None:
    hint = "run: python -m llamacpp_mqtt_deploy.schema.document > docs/schema.json"
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text(), hint


def test_the_document_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(DOCUMENT)


def test_every_message_and_field_has_a_description() -> None:
    for name, definition in DOCUMENT["$defs"].items():
        assert definition.get("description"), name
        for field, content in definition.get("properties", {}).items():
            # pydantic leaves out a description that the referenced message has too.
            assert content.get("description") or "$ref" in content, f"{name}.{field}"


def test_every_event_of_the_order_table_has_a_model() -> None:
    kinds = {kind for following in ORDER.values() for kind in following}
    refs = [ref["$ref"].rpartition("/")[2] for ref in DOCUMENT["$defs"]["ReplyEvent"]["oneOf"]]
    assert kinds <= {DOCUMENT["$defs"][ref]["properties"]["type"]["const"] for ref in refs}


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", stream(), ids=lambda raw: orjson.loads(raw)["type"])
def test_what_the_writer_says_is_an_event_of_the_schema(raw: bytes) -> None:
    event = orjson.loads(raw)
    assert isinstance(validate_event(event), BaseModel)
    assert conforms("ReplyEvent", event)


@pytest.mark.parametrize("error", BY_CODE.values(), ids=lambda error: error.code)
def test_every_error_code_makes_a_valid_event(error: type[RequestError]) -> None:
    details = {"fields": {"prompt": "a text"}, "retry_after_s": 2.5, "n_prompt_tokens": 9, "n_ctx": 8, "usage": USAGE}
    raw = writer().error(code=error.code, message="what and why", retryable=error.retryable, details=details)
    assert conforms("Error", orjson.loads(raw))
    validate_event(orjson.loads(raw))
    with pytest.raises(ValidationError, match="retryable must be"):
        validate_event(orjson.loads(raw) | {"retryable": not error.retryable})


def test_events_that_are_too_large_are_valid_without_their_text() -> None:
    small = writer(1024)
    small.start({"model": "tiny", "worker": "w", "created": 1})
    snapshot = orjson.loads(small.snapshot(content="x" * 5000, reasoning=""))
    done = orjson.loads(small.done(DONE | {"full_content": "x" * 5000}))
    for event in (snapshot, done):
        assert event["content_omitted"]
        validate_event(event)
        assert conforms("ReplyEvent", event)


def test_a_refusal_before_acceptance_makes_a_valid_event() -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(b'{"prompt":7,"seed":"x"}', policy=RequestPolicy())
    error = caught.value
    raw = writer().error(code=error.code, message=error.message, retryable=error.retryable, details=error.details)
    validate_event(orjson.loads(raw))


CHUNK = {"type": "chunk", "request_id": "r", "session_id": "s", "seq": 0}
FINAL = {"type": "done", "request_id": "r", "session_id": "s", "seq": 0, "final": True} | DONE


@pytest.mark.parametrize(
    "event",
    [
        CHUNK,
        CHUNK | {"content": ""},
        CHUNK | {"content": "x", "reasoning": "y"},
        CHUNK | {"content": "x", "seq": -1},
        CHUNK | {"content": "x", "seq": "0"},
        CHUNK | {"content": "x", "surprise": 1},
        CHUNK | {"tool_calls": []},
        {"type": "chunk", "seq": 0, "content": "x"},
        FINAL | {"content_omitted": True},
        {name: value for name, value in FINAL.items() if name != "full_content"},
        FINAL | {"final": False},
        FINAL | {"finish_reason": "content_filter"},
        FINAL | {"usage": {"prompt_tokens": 1}},
        {"type": "dance", "request_id": "r", "session_id": "s"},
        {"request_id": "r", "session_id": "s"},
    ],
)
def test_drift_is_found_by_model_and_schema(event: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        validate_event(event)
    assert not conforms("ReplyEvent", event)


# --- acks, status and health -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ack",
    [
        {"action": "cancel", "status": "ok", "state": "ended", "request_id": "r1", "transaction": "t"},
        {"action": "reset", "status": "ok", "cancelled": 2},
        {"action": "history", "status": "ok", "messages": [MESSAGE]},
        {"action": "ping", "status": "ok", "state": "online", "worker": "w", "engine": "ready", "queue": 0},
        {"action": None, "status": "error", "code": "bad_request", "message": "x", "fields": {"action": "y"}},
    ],
)
def test_acks(ack: dict[str, Any]) -> None:
    event = {"type": "ack", "session_id": "s"} | ack
    assert isinstance(validate_event(event), Ack)
    assert conforms("ReplyEvent", event)


def test_admin_acks() -> None:
    for ack in ({"action": "drain", "state": "draining"}, {"action": "reload", "changed": ["limits.queue_size"]}):
        message = {"type": "ack", "worker": "w", "status": "ok"} | ack
        assert validate_admin_ack(message).action == ack["action"]
        assert conforms("AdminAck", message)


def test_a_will_says_little_and_a_status_says_all() -> None:
    will = {"state": "offline", "protocol": 1, "instance": "i", "ts": 1.5, "every_s": 10}
    online = will | {
        "state": "online",
        "worker": "w",
        "version": "1.0",
        "host": "box",
        "routes": {"default": {"request": "llm/request/{session}", "reply": "llm/reply/{session}", "mode": "native"}},
        "models": ["tiny"],
        "n_ctx": None,
        "slots": 2,
        "capabilities": {"tools": True, "vision": False, "thinking": False, "json_schema": True},
        "limits": {"max_request_bytes": 1048576, "max_event_bytes": 131072},
        "heartbeat_s": 15.0,
        "engine": {"state": "ready", "kind": "server", "backend": "cpu"},
    }
    for message in (will, online):
        assert validate_status(message).instance == "i"
        assert conforms("Status", message)
    with pytest.raises(ValidationError):
        validate_status(will | {"protocol": 2})


def test_health() -> None:
    health = {
        "worker": "w",
        "ts": 1.5,
        "every_s": 30,
        "uptime_s": 12.5,
        "slots": {"busy": 1, "total": 2},
        "queue": 3,
        "lanes": {"interactive": 1, "normal": 2, "batch": 0},
        "tokens_per_second": 41.5,
        "requests": {"accepted": 9, "done": 5, "cancelled": 1, "failed": 1},
        "errors": {"timeout": 1, "duplicate_request": 2},
        "tokens": {"prompt": 100, "cached": 20, "completion": 30},
        "engine": "ready",
    }
    assert validate_health(health).queue == 3
    assert conforms("Health", health)
    with pytest.raises(ValidationError):
        validate_health(health | {"errors": {"oops": 1}})
    assert not conforms("Health", health | {"errors": {"oops": 1}})


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        *DOCUMENT["$defs"]["Request"]["examples"],
        {"prompt": "x", "temperature": None, "unknown": 1},
        {"prompt": "x", "messages": None},
        {"prompt": None},
        {"prompt": "x", "stream": "sentence", "stop": ["a"], "logit_bias": {"5": -1.5}, "max_tokens": 5},
        {"messages": [MESSAGE | {"tool_calls": []}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},
        {"tool_results": [{"tool_call_id": "c", "content": "x"}]},
        {},
        {"prompt": "x", "messages": [MESSAGE]},
        {"prompt": 7},
        {"prompt": "x", "request_id": "a b"},
        {"prompt": "x", "temperature": True},
        {"prompt": "x", "stream": "words"},
        {"prompt": "x", "stop": []},
        {"prompt": "x", "stop": [""]},
        {"messages": [{"role": "user"}]},
        {"messages": []},
        {"prompt": "x", "tool_choice": "perhaps"},
    ],
)
def test_schema_and_parser_agree_on_a_request(body: dict[str, Any]) -> None:
    try:
        parse_request(orjson.dumps(body), policy=RequestPolicy())
        taken = True
    except BadRequest:
        taken = False
    assert conforms("Request", body) is taken


@pytest.mark.parametrize("name, good, bad", [("Control", "cancel", "drain"), ("Admin", "drain", "cancel")])
def test_control_and_admin_are_in_the_schema(name: str, good: str, bad: str) -> None:
    assert conforms(name, {"action": good, "transaction": "t"})
    assert not conforms(name, {"action": bad})
