"""Ollama's API: what a body asks of the bus, and whether Ollama's own client reads what comes back."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from ollama import ChatResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats.model_lists import (
    ServedModel,
    anthropic_models,
    ollama_running,
    ollama_show,
    ollama_tags,
    ollama_version,
    openai_models,
)
from llamacpp_mqtt_deploy.core.formats.ollama import (
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OllamaGenerateStream,
    OllamaGenerateWhole,
    OllamaStream,
    OllamaWhole,
)
from llamacpp_mqtt_deploy.core.formats.ollama_body import REFUSED, parse_ollama_chat, parse_ollama_generate
from tests.support.answer_events import Answered, answered, answers, asked, occasion
from tests.support.http_streams import json_lines, rendered

HELLO = [{"role": "user", "content": "Hello"}]
PNG = "iVBORw0KGgoAAAAA"
NOW = datetime(2026, 11, 21, tzinfo=UTC)
MODEL = ServedModel(name="tiny", since=NOW, context_tokens=4096, tools=True, thinking=True)


def parsed(**fields: Any) -> dict[str, Any]:
    return dict(parse_ollama_chat({"model": "tiny", "messages": HELLO} | fields).request)


# --- answers ---------------------------------------------------------------------------------------------------------


@given(answers())
def test_every_order_of_events_is_a_stream_that_the_client_adds_up_to_the_answer(answer: Answered) -> None:
    lines = json_lines(rendered(OllamaStream(asked(), occasion()), answer.events))
    if answer.error is not None:
        assert list(lines[-1]) == ["error"]
        assert not any(line.get("done") for line in lines)
        return
    told = [ChatResponse.model_validate(line) for line in lines]
    assert [line.done for line in told] == [False] * (len(told) - 1) + [True]
    assert "".join(line.message.content or "" for line in told) == answer.content
    assert "".join(line.message.thinking or "" for line in told) == answer.reasoning
    calls = [
        (call.function.name, dict(call.function.arguments)) for line in told for call in line.message.tool_calls or ()
    ]
    wanted = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in answer.calls]
    assert sorted(map(repr, calls)) == sorted(map(repr, wanted))
    assert told[-1].done_reason == ("length" if answer.finish == "length" else "stop")


@given(answers())
def test_a_generation_is_told_as_response(answer: Answered) -> None:
    lines = json_lines(rendered(OllamaGenerateStream(asked(), occasion()), answer.events, pings=False))
    if answer.error is None:
        told = [GenerateResponse.model_validate(line) for line in lines]
        assert "".join(line.response for line in told) == answer.content
        assert told[-1].done


def test_the_end_tells_tokens_and_times_in_nanoseconds() -> None:
    *_, end = json_lines(rendered(OllamaStream(asked(), occasion()), answered(("content", "Hi")).events))
    assert end == {
        "model": "demo",
        "created_at": "2026-11-21T17:30:00.000000Z",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "stop",
        "total_duration": 50_250_000,
        "load_duration": 0,
        "prompt_eval_count": 11,
        "prompt_eval_duration": 18_500_000,
        "eval_count": 7,
        "eval_duration": 30_250_000,
    }


def test_a_whole_answer_is_what_the_client_takes_for_one() -> None:
    answer = answered(("reasoning", "hm"), ("content", "Hi"))
    chat = ChatResponse.model_validate_json(OllamaWhole(asked(), occasion()).answer(answer.done).body)
    assert (chat.message.content, chat.message.thinking, chat.done) == ("Hi", "hm", True)
    told = GenerateResponse.model_validate_json(OllamaGenerateWhole(asked(), occasion()).answer(answer.done).body)
    assert (told.response, told.thinking, told.done) == ("Hi", "hm", True)


def test_a_call_is_told_once_with_its_arguments_as_an_object() -> None:
    deltas = [{"index": 0, "id": "a", "name": "look", "arguments": '{"at":'}, {"index": 0, "arguments": ' "sky"}'}]
    answer = answered(*(("tool_calls", [delta]) for delta in deltas), finish="tool_calls")
    lines = json_lines(rendered(OllamaStream(asked(), occasion()), answer.events, pings=False))
    call = {"id": "a", "function": {"index": 0, "name": "look", "arguments": {"at": "sky"}}}
    assert [line["message"].get("tool_calls") for line in lines] == [[call], None]


def test_an_error_is_a_sentence_under_error_with_its_status() -> None:
    reply = OLLAMA_CHAT.failure({"code": "model_not_found", "message": "No such model."})
    assert (reply.status, json.loads(reply.body)) == (404, {"error": "No such model."})


def test_a_cancelled_answer_is_an_error() -> None:
    lines = json_lines(rendered(OllamaStream(asked(), occasion()), answered(finish="cancelled").events, pings=False))
    assert [list(line) for line in lines] == [["error"]]


# --- lists of models -------------------------------------------------------------------------------------------------


def test_the_client_reads_the_lists_of_models() -> None:
    assert [each.model for each in ListResponse.model_validate_json(ollama_tags([MODEL]).body).models] == ["tiny"]
    running = ProcessResponse.model_validate_json(ollama_running([MODEL], expires=NOW).body)
    assert [each.name for each in running.models] == ["tiny"]
    shown = ShowResponse.model_validate_json(ollama_show(MODEL).body)
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 4096
    assert json.loads(ollama_version().body)["version"].count(".") == 2


def test_openai_and_anthropic_clients_read_the_lists_of_models() -> None:
    from anthropic.types import ModelInfo
    from openai.types import Model

    assert [Model.model_validate(each).id for each in json.loads(openai_models([MODEL]).body)["data"]] == ["tiny"]
    listed = json.loads(anthropic_models([MODEL]).body)
    assert [each["id"] for each in listed["data"]] == ["tiny"]
    assert ModelInfo.model_validate(listed["data"][0]).max_input_tokens == 4096
    assert json.loads(anthropic_models([]).body)["first_id"] is None


# --- bodies ----------------------------------------------------------------------------------------------------------


def test_options_become_fields_and_those_that_steer_the_server_are_ignored() -> None:
    options = {"num_predict": 9, "temperature": 0.5, "seed": 2**40 + 3, "stop": ["END"], "num_ctx": 8192, "mirostat": 1}
    assert parsed(options=options, keep_alive="5m") == {
        "messages": HELLO,
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["END"],
    }


def test_an_answer_without_a_limit_is_asked_for_by_a_negative_number() -> None:
    assert "max_tokens" not in parsed(options={"num_predict": -1})


def test_answers_stream_unless_the_body_says_otherwise() -> None:
    assert parse_ollama_chat({"messages": HELLO}).streams
    assert not parse_ollama_chat({"messages": HELLO, "stream": False}).streams


@pytest.mark.parametrize("name,model", [("tiny:latest", "tiny"), ("tiny:4b", "tiny:4b"), ("default", None)])
def test_the_tag_that_clients_add_is_left_out(name: str, model: str | None) -> None:
    assert parse_ollama_chat({"messages": HELLO, "model": name}).model == model


@pytest.mark.parametrize(
    "told,request_format",
    [
        ("json", {"type": "json_object"}),
        ({"type": "object"}, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}),
        ("", None),
        (None, None),
    ],
)
def test_a_format_constrains_the_answer(told: Any, request_format: Any) -> None:
    assert parsed(format=told).get("response_format") == request_format


@pytest.mark.parametrize("think,thinking", [(True, True), (False, False), ("high", True), (None, None)])
def test_thinking_is_turned_on_and_off(think: Any, thinking: bool | None) -> None:
    assert parsed(think=think).get("thinking") is thinking


def test_results_find_the_calls_that_they_answer_by_the_name_of_the_tool() -> None:
    calls = [{"function": {"name": "a", "arguments": {"x": 1}}}, {"function": {"name": "b", "arguments": {}}}]
    talk = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "tool", "content": "of a"},
    ]
    _, assistant, of_b, of_a = parsed(messages=talk)["messages"]
    assert [call["id"] for call in assistant["tool_calls"]] == ["call_0", "call_1"]
    assert assistant["tool_calls"][0]["function"] == {"name": "a", "arguments": '{"x":1}'}
    assert (of_b["tool_call_id"], of_a["tool_call_id"]) == ("call_1", "call_0")


def test_a_result_takes_the_oldest_call_that_has_none() -> None:
    def call(name: str, **more: str) -> dict[str, Any]:
        return {"function": {"name": name}} | more

    calls = [call("a"), call("b", id="x"), call("a"), call("b"), call("b", id="x")]
    results: list[dict[str, Any]] = [
        {"tool_name": "a"}, {"tool_call_id": "x"}, {"tool_name": "b"}, {"tool_call_id": "elsewhere"}, {}, {"tool_call_id": "x"},
    ]  # fmt: skip
    talk = [
        *HELLO,
        {"role": "assistant", "tool_calls": calls},
        *({"role": "tool", "content": "", **result} for result in results),
    ]
    told = [message["tool_call_id"] for message in parsed(messages=talk)["messages"][2:]]
    assert told == ["call_0", "x", "call_3", "elsewhere", "call_2", "x"]
    with pytest.raises(RequestError):
        parsed(messages=[*talk, {"role": "tool", "content": ""}])


@pytest.mark.parametrize("result", [{"tool_call_id": "x"}, {}])
def test_tens_of_thousands_of_calls_and_results_are_refused_at_once(result: dict[str, str]) -> None:
    calls = [{"function": {"name": "a"}}] * 40_000
    results = [{"role": "tool", "content": "", **result}] * 30_000
    started = time.process_time()
    with pytest.raises(RequestError):
        parsed(messages=[*HELLO, {"role": "assistant", "tool_calls": calls}, *results])
    assert time.process_time() - started < 10.0  # a quadratic way takes a minute


def test_pictures_become_parts_of_the_message() -> None:
    [message] = parsed(messages=[{"role": "user", "content": "What?", "images": [PNG]}])["messages"]
    assert message["content"][1] == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}


def test_a_generation_is_a_chat_of_one_message() -> None:
    found = parse_ollama_generate({"model": "tiny", "prompt": "Hi", "system": "Be brief.", "options": {"top_k": 3}})
    assert found.request == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "top_k": 3,
    }


@pytest.mark.parametrize("keep_alive,reason", [(None, "load"), ("5m", "load"), (0, "unload")])
def test_a_body_without_a_question_only_loads_the_model(keep_alive: Any, reason: str) -> None:
    found = parse_ollama_generate({"model": "tiny", "keep_alive": keep_alive})
    assert found.request == {}
    assert OLLAMA_GENERATE.idle is not None
    assert json.loads(OLLAMA_GENERATE.idle(found, occasion()).body)["done_reason"] == reason
    assert OLLAMA_CHAT.idle is not None
    loaded = OLLAMA_CHAT.idle(parse_ollama_chat({"model": "tiny", "messages": []}), occasion())
    assert ChatResponse.model_validate_json(loaded.body).done


@pytest.mark.parametrize(
    "fields,path",
    [
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, "messages[0].images[0]"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"top_p": 7}}, "options.top_p"),
        ({"options": 5}, "options"),
        ({"format": "yaml"}, "format"),
        ({"format": {"$ref": "https://example.org"}}, "format.json_schema.schema"),
        ({"think": "often"}, "think"),
        ({"stream": 1}, "stream"),
        *(({field: "x"}, field) for field in sorted(REFUSED)),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(**fields)
    assert list(caught.value.details["fields"]) == [path]
