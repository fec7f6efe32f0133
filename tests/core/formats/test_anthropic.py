"""Anthropic's messages: what a body asks of the bus, and whether Anthropic's own SDK reads what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from pydantic import TypeAdapter

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats.anthropic import ANTHROPIC, AnthropicStream, AnthropicWhole, tokens_counted
from llamacpp_mqtt_deploy.core.formats.anthropic_body import REFUSED, parse_messages
from tests.support.answer_events import Answered, answered, answers, asked, occasion
from tests.support.http_streams import rendered, sse

HELLO = [{"role": "user", "content": "Hello"}]
EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def stream(answer: Answered, *, thinking: bool = True, pings: bool = False) -> list[dict[str, Any]]:
    body = rendered(AnthropicStream(asked(thinking=thinking), occasion()), answer.events, pings=pings)
    events = []
    for name, data in sse(body):
        event = json.loads(data)
        assert event["type"] == name
        events.append(event)
    return events


def parsed(**fields: Any) -> dict[str, Any]:
    return dict(parse_messages({"messages": HELLO, "max_tokens": 5} | fields).request)


# --- answers ---------------------------------------------------------------------------------------------------------


@given(answers())
def test_every_order_of_events_is_a_stream_that_the_sdk_adds_up_to_the_answer(answer: Answered) -> None:
    events = [event for event in stream(answer, pings=True) if event["type"] != "ping"]
    names = [event["type"] for event in events]
    if answer.error is not None:
        assert names[-1] == "error"
        assert names.count("error") == 1
        assert "message_stop" not in names
        return
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert names.count("message_start") == names.count("message_delta") == names.count("message_stop") == 1
    _assert_nested(events)
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        told = EVENTS.validate_python(event)
        snapshot = accumulate_event(event=told, current_snapshot=snapshot, json_bufs=buffers)
    assert "".join(block.text for block in snapshot.content if block.type == "text") == answer.content
    assert "".join(block.thinking for block in snapshot.content if block.type == "thinking") == answer.reasoning
    used = {block.id: (block.name, block.input) for block in snapshot.content if block.type == "tool_use"}
    assert used == {
        call["id"]: (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in answer.calls
    }
    assert snapshot.stop_reason == {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[answer.finish]
    assert (snapshot.usage.input_tokens, snapshot.usage.output_tokens) == (7, 7)


def _assert_nested(events: list[dict[str, Any]]) -> None:
    """One block after the other, numbered from 0; deltas only within the block that is open."""
    opened: int | None = None
    count = 0
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert opened is None
                assert event["index"] == count
                opened, count = count, count + 1
            case "content_block_delta":
                assert event["index"] == opened
            case "content_block_stop":
                assert event["index"] == opened
                opened = None
            case _:
                assert opened is None


@given(answers())
def test_a_whole_answer_is_what_the_sdk_takes_for_one(answer: Answered) -> None:
    if answer.events[-1]["type"] == "error" or answer.done.get("content_omitted") or answer.error:
        return
    reply = AnthropicWhole(asked(thinking=True), occasion()).answer(answer.done)
    message = Message.model_validate_json(reply.body)
    assert "".join(block.text for block in message.content if block.type == "text") == answer.content
    assert [block.id for block in message.content if block.type == "tool_use"] == [call["id"] for call in answer.calls]


def test_thinking_is_not_told_to_a_client_that_did_not_ask_for_it() -> None:
    answer = answered(("reasoning", "hm"), ("content", "Yes"))
    starts = [event for event in stream(answer, thinking=False) if event["type"] == "content_block_start"]
    assert [event["content_block"]["type"] for event in starts] == ["text"]
    reply = AnthropicWhole(asked(thinking=False), occasion()).answer(answer.done)
    assert [block["type"] for block in json.loads(reply.body)["content"]] == ["text"]


def test_the_arguments_of_calls_that_were_written_in_turns_come_one_call_after_the_other() -> None:
    deltas = [
        {"index": 0, "id": "a", "name": "f", "arguments": '{"x":'},
        {"index": 1, "id": "b", "name": "g", "arguments": '{"y":'},
        {"index": 0, "arguments": "1}"},
        {"index": 1, "arguments": "2}"},
    ]
    events = stream(answered(*(("tool_calls", [delta]) for delta in deltas), finish="tool_calls"))
    told = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert told == ['{"x":', "1}", '{"y":', "2}"]


def test_the_start_tells_the_tokens_of_the_prompt_where_they_are_known() -> None:
    answer = answered(("content", "Hi"))
    answer.events.insert(1, {"type": "progress", "request_id": "r1", "processed": 3, "total": 11, "cached": 4})
    start = stream(answer)[0]
    assert start["message"]["usage"]["input_tokens"] == 7
    assert start["message"]["usage"]["cache_read_input_tokens"] == 4


def test_the_stop_text_that_ended_the_answer_is_told() -> None:
    *_, delta, _ = stream(answered(("content", "Hi"), stop_sequence="END"))
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}


def test_a_call_that_was_cut_off_is_left_out_of_a_whole_answer() -> None:
    deltas = [{"index": 0, "id": "a", "name": "f", "arguments": '{"x":'}]
    reply = AnthropicWhole(asked(), occasion()).answer(answered(("tool_calls", deltas), finish="length").done)
    assert json.loads(reply.body)["content"] == []
    assert json.loads(reply.body)["stop_reason"] == "max_tokens"


def test_tokens_are_counted_in_the_shape_of_the_api() -> None:
    assert json.loads(tokens_counted(12).body) == {"input_tokens": 12}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code,status,kind",
    [
        ("bad_request", 400, "invalid_request_error"),
        ("unauthorized", 401, "authentication_error"),
        ("forbidden", 403, "permission_error"),
        ("model_not_found", 404, "not_found_error"),
        ("payload_too_large", 413, "request_too_large"),
        ("rate_limited", 429, "rate_limit_error"),
        ("internal", 500, "api_error"),
        ("no_worker", 503, "overloaded_error"),
        ("timeout", 504, "timeout_error"),
    ],
)
def test_an_error_has_the_status_and_the_words_of_the_api(code: str, status: int, kind: str) -> None:
    reply = ANTHROPIC.failure({"code": code, "message": "No."})
    assert reply.status == status
    assert json.loads(reply.body) == {"type": "error", "error": {"type": kind, "message": "No."}}


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_programs_look_for() -> None:
    error = {"code": "context_overflow", "message": "Too long.", "n_prompt_tokens": 9000, "n_ctx": 4096}
    assert (
        "prompt is too long: 9000 tokens > 4096 maximum"
        in json.loads(ANTHROPIC.failure(error).body)["error"]["message"]
    )


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_a_body_becomes_a_request() -> None:
    request = parsed(system="Be brief.", stop_sequences=["END"], top_k=5, metadata={"user_id": "u"}, stream=True)
    assert request == {
        "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
        "max_tokens": 5,
        "stop": ["END"],
        "top_k": 5,
    }


def test_system_blocks_are_joined_and_the_billing_of_a_client_is_left_out() -> None:
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
        {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Two."},
    ]
    assert parsed(system=blocks)["messages"][0]["content"] == "One.\n\nTwo."


def test_calls_and_their_results_become_messages_of_their_own() -> None:
    talk = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "sky"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "blue"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    call = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"at":"sky"}'}}
    assert parsed(messages=talk)["messages"] == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "blue"},
        {"role": "user", "content": "And?"},
    ]


def test_a_picture_in_the_result_of_a_tool_is_shown_after_it() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [picture]}
    told = parsed(messages=[{"role": "user", "content": [result]}])["messages"]
    assert told[0] == {"role": "tool", "tool_call_id": "t1", "content": ""}
    assert told[1]["content"][0]["image_url"]["url"] == "data:image/png;base64,AAAA"


def test_tools_and_the_choice_among_them() -> None:
    tool = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}, "cache_control": {}}
    request = parsed(tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    assert request["tools"] == [{"type": "function", "function": function}]
    assert (request["tool_choice"], request["parallel_tool_calls"]) == ("required", False)


@pytest.mark.parametrize(
    "thinking,told,shown",
    [
        ({"type": "enabled", "budget_tokens": 2048}, {"thinking": True, "thinking_budget": 2048}, True),
        ({"type": "adaptive"}, {"thinking": True}, True),
        ({"type": "adaptive", "display": "omitted"}, {"thinking": True}, False),
        ({"type": "disabled"}, {"thinking": False}, False),
        (None, {}, False),
    ],
)
def test_thinking_is_asked_for_and_shown(thinking: Any, told: dict[str, Any], shown: bool) -> None:
    found = parse_messages({"messages": HELLO, "thinking": thinking})
    assert {name: value for name, value in found.request.items() if name.startswith("thinking")} == told
    assert found.echo == {"thinking": shown}


def test_a_schema_for_the_answer_is_passed_on() -> None:
    request = parsed(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "low"})
    assert request["response_format"] == {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields,path",
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]}]},
            "messages[0].content[0].source.type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]},
            "messages[0].content[0].name",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": 9}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "often"}}, "thinking.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "sometimes"}}, "tool_choice.type"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        *(({field: [{"a": 1}]}, field) for field in sorted(REFUSED)),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(**fields)
    assert list(caught.value.details["fields"]) == [path]


def test_a_fault_behind_a_system_prompt_is_named_where_the_client_wrote_it() -> None:
    talk = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "x" * 2000, "name": "f", "input": {}}]},
    ]
    with pytest.raises(RequestError) as caught:
        parsed(system="Be brief.", messages=talk)
    assert list(caught.value.details["fields"]) == ["messages[1].content"]
