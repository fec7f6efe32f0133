"""What an engine gets and gives."""

from __future__ import annotations

from dataclasses import fields, replace

from llamacpp_mqtt_deploy.core.deltas import EngineCall

OTHER = ({"role": "user", "content": "other"},)
FULL = EngineCall(
    messages=({"role": "user", "content": "hi"},),
    model="m",
    sampling={"max_tokens": 5},
    tools=({"type": "function"},),
    tool_choice="auto",
    parallel_tool_calls=True,
    response_format={"type": "json_object"},
    thinking=True,
    thinking_budget=9,
    chunk_timeout_s=3.0,
    once=True,
)


def test_a_call_with_other_messages_keeps_everything_else() -> None:
    plain = EngineCall(messages=())
    left_out = [field.name for field in fields(EngineCall) if getattr(FULL, field.name) == getattr(plain, field.name)]
    assert not left_out, "each field has a value of its own above"
    assert FULL.with_messages(OTHER) == replace(FULL, messages=OTHER)
