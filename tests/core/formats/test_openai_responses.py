"""OpenAI's responses: what a body asks of the bus, and whether OpenAI's own SDK reads what comes back."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats.openai_responses import ResponsesStream, ResponsesWhole
from llamacpp_mqtt_deploy.core.formats.openai_responses_body import (
    REFUSED,
    parse_responses,
    response_id,
    session_of_response,
)
from tests.support.answer_events import Answered, answered, answers, asked, occasion
from tests.support.http_streams import rendered, sse

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}


def stream(answer: Answered, **echo: Any) -> list[dict[str, Any]]:
    events = []
    for name, data in sse(rendered(ResponsesStream(asked(**echo), occasion()), answer.events)):
        event = json.loads(data)
        assert event["type"] == name
        events.append(event)
    return events


def parsed(**fields: Any) -> dict[str, Any]:
    return dict(parse_responses({"input": "Hello"} | fields).request)


def texts(response: Any) -> str:
    return "".join(part.text for item in response.output if item.type == "message" for part in item.content)


def calls(response: Any) -> dict[str, tuple[str, str]]:
    return {item.call_id: (item.name, item.arguments) for item in response.output if item.type == "function_call"}


# --- answers ---------------------------------------------------------------------------------------------------------


@given(answers())
def test_every_order_of_events_is_a_stream_that_the_sdk_reads(answer: Answered) -> None:
    events = stream(answer)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [event["type"] for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    ends = {"response.completed", "response.incomplete", "response.failed"}
    assert [name for name in names if name in ends] == names[-1:]
    if answer.error is not None:
        assert names[-1] == "response.failed"
        assert events[-1]["response"]["error"]["message"]
        return
    assert names[-1] == ("response.incomplete" if answer.finish == "length" else "response.completed")
    for event in events:
        EVENTS.validate_python(event)
    response = Response.model_validate(events[-1]["response"])
    assert texts(response) == answer.content == _joined(events, "response.output_text.delta")
    assert _joined(events, "response.reasoning_text.delta") == answer.reasoning
    assert calls(response) == {
        call["id"]: (call["function"]["name"], call["function"]["arguments"]) for call in answer.calls
    }
    _assert_items_follow_each_other(events)


def _joined(events: list[dict[str, Any]], name: str) -> str:
    return "".join(event["delta"] for event in events if event["type"] == name)


def _assert_items_follow_each_other(events: list[dict[str, Any]]) -> None:
    """Each item from its `added` to its `done`, numbered from 0, with the same id; the last response holds what was told."""
    opened: dict[str, Any] | None = None
    finished: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "response.output_item.added":
                assert opened is None
                assert event["output_index"] == len(finished)
                opened = event["item"]
            case "response.output_item.done":
                assert opened is not None
                assert event["item"]["id"] == opened["id"]
                finished.append(event["item"])
                opened = None
            case name if "item_id" in event:
                assert opened is not None, name
                assert event["item_id"] == opened["id"]
                assert event["output_index"] == len(finished)
            case _:
                assert opened is None
    assert events[-1]["response"]["output"] == finished


@given(answers())
def test_a_whole_answer_is_what_the_sdk_takes_for_one(answer: Answered) -> None:
    if answer.error or answer.done.get("content_omitted"):
        return
    response = Response.model_validate_json(ResponsesWhole(asked(), occasion()).answer(answer.done).body)
    assert texts(response) == answer.content
    assert len(calls(response)) == len(answer.calls)
    assert response.status == ("incomplete" if answer.finish == "length" else "completed")
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 4


def test_the_events_of_a_text_come_in_their_order() -> None:
    assert [event["type"] for event in stream(answered(("content", "Hel"), ("content", "lo")))] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_the_events_of_a_function_call_come_in_their_order() -> None:
    deltas = [{"index": 0, "id": "a", "name": "look", "arguments": "{"}, {"index": 0, "arguments": "}"}]
    answer = answered(*(("tool_calls", [delta]) for delta in deltas), finish="tool_calls")
    assert [event["type"] for event in stream(answer)[2:-1]] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]


def test_an_answer_that_a_limit_cut_is_incomplete_and_so_is_its_last_item() -> None:
    *_, end = stream(answered(("content", "Hel"), finish="length"))
    assert end["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in end["response"]["output"]] == ["incomplete"]


def test_a_response_repeats_what_was_asked() -> None:
    found = parse_responses({"input": "Hi", "instructions": "Be brief.", "tools": [TOOL], "metadata": {"a": "b"}})
    reply = ResponsesWhole(found, occasion()).answer(answered(("content", "Hi")).done)
    response = Response.model_validate_json(reply.body)
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert response.tools[0].type == "function"


def test_an_overflow_in_the_middle_is_told_by_the_code_that_programs_look_for() -> None:
    error = {"code": "context_overflow", "message": "Too long.", "retryable": False, "details": {}}
    *_, end = stream(answered(("content", "Hel"), error=error))
    assert end["response"]["error"] == {"code": "context_length_exceeded", "message": "Too long."}


# --- conversations ---------------------------------------------------------------------------------------------------


def test_the_id_of_a_response_leads_back_to_the_session_that_keeps_its_conversation() -> None:
    found = parse_responses({"input": "Hi"})
    told = json.loads(ResponsesWhole(found, occasion(session="web/s1")).answer(answered(("content", "Hi")).done).body)
    again = parse_responses({"input": "And?", "previous_response_id": told["id"]})
    assert (again.session, again.request) == ("s1", {"prompt": "And?"})


@pytest.mark.parametrize("session", ["a", "a.b", "A-_.9" * 12])
def test_any_session_comes_back_from_a_response_id(session: str) -> None:
    assert session_of_response(response_id("r.1~2", session)) == session


@pytest.mark.parametrize("previous", ["", "resp_1", "resp_~1", "resp_a/b~1", "x_a~1", "resp_a\nb~1", "resp_+~1"])
def test_an_id_that_leads_to_no_session_is_refused(previous: str) -> None:
    assert session_of_response(previous) is None
    with pytest.raises(RequestError) as caught:
        parsed(previous_response_id=previous)
    assert list(caught.value.details["fields"]) == ["previous_response_id"]


def test_what_is_not_stored_is_a_context_of_its_own() -> None:
    found = parse_responses({"input": "Hi", "store": False, "instructions": "Be brief."})
    assert found.request == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    }
    told = json.loads(ResponsesWhole(found, occasion()).answer(answered(("content", "Hi")).done).body)
    assert session_of_response(told["id"]) is None


def test_the_results_of_functions_go_on_with_the_conversation() -> None:
    output = {"type": "function_call_output", "call_id": "a", "output": "blue"}
    assert parsed(input=[output], previous_response_id="resp_s~r", tools=[TOOL])["tool_results"] == [
        {"tool_call_id": "a", "content": "blue"}
    ]


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_instructions_and_one_message_begin_a_conversation() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    ]
    request = parsed(input=items, instructions="Be brief.", max_output_tokens=9, temperature=0, include=["x"])
    assert request == {"prompt": "Hi", "system_prompt": "Be brief.\n\nBe kind.", "max_tokens": 9, "temperature": 0}


def test_a_whole_context_becomes_messages() -> None:
    items = [
        {"role": "user", "content": "Sky?"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "blue"}]},
        {"type": "function_call_output", "call_id": "b", "output": "grey"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Blue.", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]},
    ]
    function = {"name": "look", "arguments": "{}"}
    told = [{"id": name, "type": "function", "function": function} for name in ("a", "b")]
    assert parsed(input=items)["messages"] == [
        {"role": "user", "content": "Sky?"},
        {"role": "assistant", "content": None, "tool_calls": told, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "a", "content": "blue"},
        {"role": "tool", "tool_call_id": "b", "content": "grey"},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
    ]


def test_much_reasoning_in_many_items_is_put_together_at_once() -> None:
    def reasoning(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}

    items = [reasoning("a" * 4_000_000), *[reasoning("b")] * 20_000, {"role": "assistant", "content": "Hi"}]
    started = time.process_time()
    [message] = parsed(input=items)["messages"]
    assert time.process_time() - started < 5.0  # 80 GB are written where each item copies what came before
    assert message["reasoning_content"] == "a" * 4_000_000 + "b" * 20_000


def test_tools_choice_and_format_have_their_own_shapes_here() -> None:
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    request = parsed(tools=[TOOL], tool_choice={"type": "function", "name": "look"}, text={"format": schema})
    function = {"name": "look", "parameters": {"type": "object"}, "strict": True}
    assert request["tools"] == [{"type": "function", "function": function}]
    assert request["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert request["response_format"]["json_schema"] == {"name": "x", "schema": {"type": "object"}, "strict": True}


@pytest.mark.parametrize(
    "fields,path",
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ""}, "input"),
        ({"input": [{"role": "judge", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].file_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "x"}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"previous_response_id": "resp_s~r", "input": [{"role": "assistant", "content": "x"}]}, "input"),
        *(({field: [{"a": 1}]}, field) for field in sorted(REFUSED)),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(**fields)
    assert list(caught.value.details["fields"]) == [path]
