"""OpenAI's chat completions: what a body asks of the bus, and whether OpenAI's own SDK reads what comes back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llamacpp_mqtt_deploy.core.errors import BadRequest, RequestError
from llamacpp_mqtt_deploy.core.formats.openai_chat import (
    OPENAI_CHAT,
    REFUSED,
    OpenAIChatStream,
    OpenAIChatWhole,
    parse_chat,
)
from tests.support.answer_events import Answered, answered, answers, asked, occasion
from tests.support.http_streams import rendered, sse

HELLO = [{"role": "user", "content": "Hello"}]
CALL = [("tool_calls", [{"index": 0, "id": "c1", "name": "look", "arguments": '{"at":'}])]
CALL += [("tool_calls", [{"index": 0, "arguments": ' "sky"}'}])]


def chunks_of(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for _, data in sse(body) if data != "[DONE]"]


def stream(answer: Answered, **echo: Any) -> bytes:
    return rendered(OpenAIChatStream(asked(**echo), occasion()), answer.events)


# --- answers ---------------------------------------------------------------------------------------------------------


@given(answers())
def test_every_order_of_events_is_a_stream_that_the_sdk_adds_up_to_the_answer(answer: Answered) -> None:
    body = stream(answer, include_usage=True)
    data = [data for _, data in sse(body)]
    if answer.error is not None:
        assert "[DONE]" not in data
        assert list(json.loads(data[-1])) == ["error"]
        assert all("error" not in json.loads(each) for each in data[:-1])
        return
    assert data.count("[DONE]") == 1
    assert data[-1] == "[DONE]"
    state = ChatCompletionStreamState()
    chunks = [ChatCompletionChunk.model_validate_json(each, strict=False) for each in data[:-1]]
    for chunk in chunks:
        state.handle_chunk(chunk)
    whole = state.current_completion_snapshot
    message = whole.choices[0].message
    assert (message.content or "") == answer.content
    assert [call.model_dump(include={"id", "function"}) for call in message.tool_calls or []] == [
        {"id": call["id"], "function": {**call["function"], "parsed_arguments": None}} for call in answer.calls
    ] or _same_calls(message.tool_calls or [], answer.calls)
    assert whole.choices[0].finish_reason == answer.finish
    assert whole.usage is not None
    assert whole.usage.total_tokens == 18
    ends = [chunk for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert len(ends) == 1


def _same_calls(told: list[Any], calls: list[dict[str, Any]]) -> bool:
    """The same calls in any order: they are numbered in the order of their appearance."""
    found = {call.id: (call.function.name, call.function.arguments) for call in told}
    return found == {call["id"]: (call["function"]["name"], call["function"]["arguments"]) for call in calls}


@given(answers())
def test_a_whole_answer_is_what_the_sdk_takes_for_one(answer: Answered) -> None:
    if answer.events[-1]["type"] == "error" or answer.done.get("content_omitted"):
        return
    reply = OpenAIChatWhole(asked(), occasion()).answer(answer.done)
    if answer.error == "cancelled":
        assert reply.status == 503
        return
    completion = ChatCompletion.model_validate_json(reply.body)
    assert (completion.choices[0].message.content or "") == answer.content
    assert completion.choices[0].finish_reason == answer.finish
    assert _same_calls(completion.choices[0].message.tool_calls or [], answer.calls)


def test_the_first_chunk_tells_the_role_and_the_last_one_why_it_ended() -> None:
    chunks = chunks_of(stream(answered(("content", "Hel"), ("content", "lo"))))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-r1"}
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_without_choices_when_it_was_asked_for() -> None:
    *_, last = chunks_of(stream(answered(("content", "Hi")), include_usage=True))
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_thinking_is_told_as_reasoning_content_and_never_as_content() -> None:
    chunks = chunks_of(stream(answered(("reasoning", "hm"), ("content", "Yes"))))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:3]] == [{"reasoning_content": "hm"}, {"content": "Yes"}]


def test_a_tool_call_begins_with_its_id_and_name_and_grows_by_its_arguments() -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(stream(answered(*CALL, finish="tool_calls")))]
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at":'}}
    assert deltas[1] == {"tool_calls": [first]}
    assert deltas[2] == {"tool_calls": [{"index": 0, "function": {"arguments": ' "sky"}'}}]}


def test_nothing_is_sent_before_the_first_news_so_that_an_early_error_can_have_its_status() -> None:
    renderer = OpenAIChatStream(asked(), occasion())
    for event in ({"type": "queued"}, {"type": "start"}, {"type": "progress"}, {"type": "ping"}):
        assert renderer.event(event) == b""


def test_an_answer_that_was_cancelled_by_somebody_else_does_not_look_whole() -> None:
    body = stream(answered(("content", "Half"), finish="cancelled"))
    assert b"[DONE]" not in body
    assert chunks_of(body)[-1]["error"]["code"] == "cancelled"


def test_a_model_name_cannot_break_the_stream() -> None:
    renderer = OpenAIChatStream(asked(), occasion(model="a\n\ndata: [DONE]\r\n\u2028", request_id="r\n"))
    body = rendered(renderer, answered(("content", "Hi")).events)
    assert [data for _, data in sse(body)].count("[DONE]") == 1


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code,status,kind,told",
    [
        ("bad_request", 400, "invalid_request_error", None),
        ("context_overflow", 400, "invalid_request_error", "context_length_exceeded"),
        ("model_not_found", 404, "invalid_request_error", "model_not_found"),
        ("unauthorized", 401, "authentication_error", "invalid_api_key"),
        ("rate_limited", 429, "rate_limit_error", "rate_limit_exceeded"),
        ("busy", 429, "rate_limit_error", "busy"),
        ("no_worker", 503, "server_error", "no_worker"),
        ("timeout", 504, "server_error", "timeout"),
        ("something_new", 500, "server_error", "something_new"),
    ],
)
def test_an_error_has_the_status_and_the_words_of_the_api(code: str, status: int, kind: str, told: str | None) -> None:
    reply = OPENAI_CHAT.failure({"code": code, "message": "No."})
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["type"], error["code"], error["message"]) == (status, kind, told, "No.")


def test_a_full_queue_says_when_to_come_back() -> None:
    reply = OPENAI_CHAT.failure({"code": "busy", "message": "Full.", "retryable": True, "retry_after_s": 2.2})
    assert reply.headers == {"x-should-retry": "true", "Retry-After": "3"}
    assert OPENAI_CHAT.failure({"code": "session_busy", "message": "Full."}).headers["Retry-After"] == "1"


def test_an_error_names_the_field_at_fault() -> None:
    reply = OPENAI_CHAT.failure({"code": "bad_request", "message": "No.", "fields": {"top_p": "a number"}})
    assert json.loads(reply.body)["error"]["param"] == "top_p"


@pytest.mark.parametrize("code,param", [("model_not_found", "model"), ("context_overflow", "messages"), ("busy", None)])
def test_an_error_whose_code_tells_the_field_names_it_also_where_the_worker_did_not(
    code: str, param: str | None
) -> None:
    assert json.loads(OPENAI_CHAT.failure({"code": code, "message": "No."}).body)["error"]["param"] == param


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_a_body_becomes_a_request_with_the_same_fields() -> None:
    body = {
        "model": "tiny",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_completion_tokens": 9,
        "stop": ["END"],
        "seed": -7,
        "logit_bias": {"42": -100},
        "response_format": {"type": "json_object"},
        "user": "u",
        "store": False,
        "n": 1,
    }
    found = parse_chat(body)
    assert found.request == {
        "messages": HELLO,
        "temperature": 0.5,
        "max_tokens": 9,
        "stop": ["END"],
        "seed": 2**32 - 7,
        "logit_bias": {"42": -100},
        "response_format": {"type": "json_object"},
    }
    assert (found.streams, found.model, found.echo) == (True, "tiny", {"include_usage": True})


@pytest.mark.parametrize("model", [None, "", "default"])
def test_default_and_no_name_mean_the_workers_own_model(model: str | None) -> None:
    assert parse_chat({"messages": HELLO, "model": model}).model is None


@pytest.mark.parametrize("effort,thinking", [("none", False), ("low", True), ("high", True), (None, None)])
def test_reasoning_effort_turns_thinking_on_and_off(effort: str | None, thinking: bool | None) -> None:
    assert parse_chat({"messages": HELLO, "reasoning_effort": effort}).request.get("thinking") is thinking


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_cannot_be_served_is_refused_by_name(field: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({"messages": HELLO, field: {"a": 1}})
    assert list(caught.value.details["fields"]) == [field]


@pytest.mark.parametrize(
    "fields,path",
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "n": 2}, "n"),
        ({"messages": HELLO, "seed": True}, "seed"),
        ({"messages": HELLO, "stream": "yes"}, "stream"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "model": 5}, "model"),
        ({"messages": HELLO, "stream_options": 5}, "stream_options"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(fields)
    assert list(caught.value.details["fields"]) == [path]
    assert path in caught.value.message


def test_the_address_of_a_picture_is_refused_since_nobody_fetches_it() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    with pytest.raises(BadRequest, match=r"messages\[0\].content\[0\].image_url.url.*not fetched"):
        parse_chat({"messages": [{"role": "user", "content": [part]}]})


def test_the_message_of_an_answer_can_be_sent_back() -> None:
    reply = OpenAIChatWhole(asked(), occasion()).answer(answered(*CALL, finish="tool_calls").done)
    message = json.loads(reply.body)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": "c1", "content": "blue"}
    assert parse_chat({"messages": [*HELLO, message, result]}).request["messages"][1]["tool_calls"][0]["id"] == "c1"
