"""Whatever a body holds, it becomes a request that a worker takes, or an error that names a field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats import (
    anthropic_body,
    ollama_body,
    openai_chat,
    openai_responses_body,
    seed_bodies,
)
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.rendering import Dialect, error_event
from llamacpp_mqtt_deploy.core.payloads import decode_payload
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, check_request, read_request
from tests.support.answer_events import TEXTS, answered, occasion
from tests.support.http_streams import rendered

MODULES = (anthropic_body, ollama_body, openai_chat, openai_responses_body, seed_bodies)
NAMES = sorted(
    {name for module in MODULES for told in ("PASSED", "REFUSED", "IGNORED") for name in getattr(module, told, ())}
    | {
        "model", "messages", "message", "prompt", "content", "input", "instructions", "system", "session_id", "conversation_id",
        "thread_id", "previous_response_id", "stream", "stream_options", "options", "format", "think", "images", "tools",
        "tool_choice", "thinking", "text", "reasoning", "reasoning_effort", "output_config", "store", "n", "chat_template_kwargs",
        "max_completion_tokens", "max_output_tokens", "stop_sequences", "keep_alive", "metadata", "system_prompt",
    }
)  # fmt: skip
WORDS = st.sampled_from([
    "user", "assistant", "system", "tool", "developer", "text", "image", "image_url", "input_text", "input_image", "output_text",
    "tool_use", "tool_result", "thinking", "redacted_thinking", "document", "function", "function_call", "function_call_output",
    "reasoning", "message", "auto", "any", "none", "required", "json_object", "json_schema", "json", "enabled", "disabled",
    "adaptive", "base64", "url", "default", "tiny:latest", "resp_s~r", "sentence", "", "high", "a/b", "a\nb", "data:image/png;base64,AAAA",
])  # fmt: skip
KEYS = st.sampled_from([
    "type", "role", "content", "text", "id", "name", "input", "tool_use_id", "source", "media_type", "data", "tool_calls", "function",
    "arguments", "tool_call_id", "tool_name", "call_id", "output", "schema", "format", "image_url", "url", "images", "thinking",
    "budget_tokens", "display", "effort", "include_usage", "enable_thinking", "parameters", "input_schema", "description",
    "num_predict", "seed", "stop", "temperature", "json_schema", "strict", "title", "summary",
])  # fmt: skip
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    WORDS,
    TEXTS,
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)), max_leaves=8
)
ITEMS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": WORDS, "content": VALUES}),
        st.fixed_dictionaries({"role": st.just("user"), "content": TEXTS}),
        st.fixed_dictionaries({"type": WORDS, "id": VALUES, "name": VALUES, "input": VALUES, "arguments": VALUES, "call_id": WORDS}),
        st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(st.dictionaries(KEYS, VALUES, max_size=5), max_size=2)}),
    ),
    max_size=3,
)  # fmt: skip
BODIES = st.builds(
    lambda told, items, fields: {**items, **fields, **told},
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    st.fixed_dictionaries({}, optional={"messages": ITEMS, "input": ITEMS, "tools": ITEMS}),
    st.fixed_dictionaries(
        {}, optional={"prompt": TEXTS, "message": TEXTS, "content": TEXTS, "session_id": st.just("s"), "system": VALUES}
    ),
)

DIALECTS = {route.dialect.name: route.dialect for route in HTTP_ROUTES}


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
@settings(max_examples=60)
@given(body=BODIES)
def test_a_body_is_a_request_that_a_worker_takes_or_an_error_that_names_a_field(
    dialect: Dialect, body: dict[str, Any]
) -> None:
    fields = decode_payload(json.dumps(body).encode(), max_bytes=1 << 20)
    assert isinstance(fields, dict)
    try:
        found = dialect.parse(fields)
    except RequestError as error:
        refusal = error_event(error)
    else:
        _assert_answerable(dialect, found)
        return
    assert refusal["fields"]
    assert dialect.failure(refusal).status in (400, 413)


def _assert_answerable(dialect: Dialect, found: Asked) -> None:
    if not found.request:
        assert dialect.idle is not None
        assert dialect.idle(found, occasion()).status == 200
        return
    policy = RequestPolicy(models=None)
    raw = read_request(json.dumps(dict(found.request)).encode(), policy=policy)
    assert raw is not None
    if "tool_choice" not in found.request:  # which tools are offered beside those of the body, the worker knows
        assert check_request(raw, policy=policy).mode in found.request
    answer = answered(("content", "Hi"))
    assert rendered(dialect.stream(found, occasion()), answer.events)
    assert dialect.whole(found, occasion()).answer(answer.done).status == 200
