"""Messages, tools and formats come out in OpenAI's shape, and nothing in them makes an engine fetch, recurse or guess."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.conversation import check_tools
from llamacpp_mqtt_deploy.core.requests import RequestPolicy
from tests.support.parsing import CALL, HELLO, PNG, WEATHER, ask, parse, refused

# --- messages --------------------------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PNG}}],
    },
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "12 °C"},
    {"role": "assistant", "content": "Cold.", "reasoning_content": "12 is cold."},
    {"role": "user", "content": "", "name": "eve"},
]


def test_messages_in_openais_shape_come_out_unchanged() -> None:
    found = parse({"messages": MESSAGES})
    assert list(found.messages) == MESSAGES
    assert found.has_images
    assert not parse({"messages": MESSAGES[2:]}).has_images
    only_text = {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
    assert not parse({"messages": [only_text]}).has_images


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "Hi"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "Hm", "reasoning_content": "Hm?", "tool_calls": [CALL, CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"function": {"name": "", "arguments": ""}}]},
    ],
)
def test_the_message_of_a_done_can_be_put_into_messages_unchanged(message: dict[str, Any]) -> None:
    found = parse({"messages": [HELLO, message, HELLO]}).messages[1]
    assert found == {name: value for name, value in message.items() if value is not None}


def test_unknown_fields_of_a_message_are_left_out() -> None:
    assert parse({"messages": [HELLO | {"cache_control": {"type": "x"}, "id_slot": 3}]}).messages == (HELLO,)
    part = {"type": "text", "text": "x", "annotations": []}
    assert parse({"messages": [{"role": "user", "content": [part]}]}).messages[0]["content"] == [
        {"type": "text", "text": "x"}
    ]


def test_a_developer_message_is_a_system_message() -> None:
    assert parse({"messages": [{"role": "developer", "content": "x"}, HELLO]}).messages[0]["role"] == "system"


def image(url: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://example.org/cat.png",
        "file:///etc/passwd",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64,",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA AA",
        PNG + "\n",
        " " + PNG,
        "DATA:image/png;base64,AAAA",
        PNG + "#http://example.org",
        7,
        None,
    ],
)
def test_an_image_that_is_no_inline_picture_is_refused(url: Any) -> None:
    assert list(refused({"messages": [image(url)]})) == ["messages[0].content[0].image_url.url"]


@pytest.mark.parametrize(
    "message, field",
    [
        (7, "messages[1]"),
        ({}, "messages[1]"),
        ({"role": "function", "content": "x"}, "messages[1]"),
        ({"role": ["user"], "content": "x"}, "messages[1]"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 7}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"type": {}}]}, "messages[1].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]"),
        ({"role": "system", "content": image(PNG)["content"]}, "messages[1].content[0].type"),
        ({"role": "assistant", "content": None}, "messages[1]"),
        ({"role": "assistant", "tool_calls": []}, "messages[1]"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "tool", "content": "x"}, "messages[1].tool_call_id"),
    ],
)
def test_a_message_out_of_shape_is_refused_by_its_place(message: Any, field: str) -> None:
    assert field in refused({"messages": [HELLO, message]})


def test_the_number_of_messages_and_parts_is_bounded() -> None:
    assert "messages" in refused({"messages": []})
    assert "messages" in refused({"messages": [HELLO] * 2049})
    assert len(parse({"messages": [HELLO] * 2048}).messages) == 2048
    parts = [{"type": "text", "text": "x"}] * 257
    assert "messages[0].content" in refused({"messages": [{"role": "user", "content": parts}]})
    assert len(parse({"messages": [{"role": "user", "content": parts[1:]}]}).messages[0]["content"]) == 256


@pytest.mark.parametrize("name, words", [("", "at least 1 long"), ("x" * 257, "at most 256 long"), (7, "a string")])
def test_the_name_of_a_speaker_has_one_to_256_characters(name: Any, words: str) -> None:
    assert refused({"messages": [HELLO | {"name": name}]}) == {"messages[0].name": words}
    for fits in ("x", "x" * 256):
        assert parse({"messages": [HELLO | {"name": fits}]}).messages[0]["name"] == fits


def test_the_words_of_a_refusal_say_what_was_expected_of_each_part() -> None:
    wrong = [
        ({"role": "tool", "content": "x", "tool_call_id": "c" * 1025}, "tool_call_id", "at most 1024 long"),
        ({"role": "tool", "content": "x"}, "tool_call_id", "a value; it is missing"),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": 5}]},
            "tool_calls[0].function",
            "an object",
        ),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "tool"}]}, "tool_calls[0].type", "function"),
        ({"role": "assistant", "content": "x", "reasoning_content": 5}, "reasoning_content", "a string"),
    ]
    for message, path, words in wrong:
        assert refused({"messages": [message]}) == {f"messages[0].{path}": words}


def test_other_words_of_a_refusal_are_those_of_the_library() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": 1}}
    assert refused({"prompt": "x", "tools": [tool]}) == {"tools[0].function.strict": "a valid boolean"}


def test_a_megabyte_of_wrong_messages_is_refused_at_once() -> None:
    floods: list[list[Any]] = [[{}] * 200_000, [[]] * 200_000, [{"role": "user", "content": [{}] * 250}] * 250]
    for wrong in floods:
        started = time.process_time()
        assert refused({"messages": wrong})
        assert time.process_time() - started < 5.0


# --- tools and formats -----------------------------------------------------------------------------------------------


def test_tools_come_out_with_known_fields_only() -> None:
    noisy = {"type": "function", "lora": 1, "function": WEATHER["function"] | {"x": 1, "strict": True}}  # type: ignore[operator]
    found = ask(tools=[noisy], tool_choice="required", parallel_tool_calls=False)
    assert found.tools == ({"type": "function", "function": WEATHER["function"] | {"strict": True}},)  # type: ignore[operator]
    assert (found.tool_choice, found.parallel_tool_calls) == ("required", False)


def test_an_empty_list_of_tools_says_that_none_are_wanted() -> None:
    assert ask(tools=[]).tools == ()
    assert ask().tools is None


def test_tool_choice_names_an_offered_tool() -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    assert ask(tools=[WEATHER], tool_choice=choice).tool_choice == choice
    own = RequestPolicy(tool_names=("get_weather",))
    assert parse({"prompt": "x", "tool_choice": choice}, own).tool_choice == choice
    assert "none is offered" in refused({"prompt": "x", "tool_choice": choice})["tool_choice.function.name"]
    other = {"prompt": "x", "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "fly"}}}
    assert "(get_weather)" in refused(other)["tool_choice.function.name"]
    assert "tool_choice.function.name" in refused({"prompt": "x", "tools": [], "tool_choice": choice}, own)
    assert ask(tool_choice="auto").tool_choice is None
    assert [ask(tools=[WEATHER], tool_choice=word).tool_choice for word in ("auto", "none", "required")] == [
        "auto",
        "none",
        "required",
    ]
    assert "tools to choose from" in refused({"prompt": "x", "tool_choice": "required"})["tool_choice"]


def test_at_most_eight_of_the_offered_tools_are_named_in_a_refusal() -> None:
    tools = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(9)]
    choice = {"type": "function", "function": {"name": "fly"}}
    fields = refused({"prompt": "x", "tools": tools, "tool_choice": choice})
    assert "(f0, f1, f2, f3, f4, f5, f6, f7)" in fields["tool_choice.function.name"]


DEEP: dict[str, Any] = {}
for _ in range(25):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://example.org/schema.json"},
        {"properties": {"a": {"anyOf": [{"$ref": "file:///etc/passwd"}]}}},
        {"$ref": 7},
        {"description": "x" * 17_000},
        DEEP,
        [],
        "object",
    ],
)
def test_a_schema_that_is_too_large_or_leads_outside_is_refused(schema: Any) -> None:
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert list(refused({"prompt": "x", "response_format": wrapped})) == ["response_format.json_schema.schema"]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert list(refused({"prompt": "x", "tools": [tool]})) == ["tools[0].function.parameters"]


def test_a_schema_may_have_sixteen_kibibytes_and_twenty_four_levels() -> None:
    def deep(levels: int) -> dict[str, Any]:
        return {"items": deep(levels - 1)} if levels > 1 else {}

    def wide(size: int) -> dict[str, Any]:
        return {"description": "x" * (size - 18)}

    for schema, fits in ((wide(16_384), True), (wide(16_385), False), (deep(24), True), (deep(25), False)):
        body = {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
        if fits:
            assert parse(body).tools
        else:
            assert "16384 bytes" in str(refused(body)) or "24 levels" in str(refused(body))


def test_tools_of_a_route_that_share_a_name_are_told() -> None:
    assert check_tools([WEATHER, WEATHER]) == ["two tools are called get_weather"]
    assert check_tools([{"type": "function", "function": {}}]) == [
        "tools[0].function.name: expected a value; it is missing"
    ]


def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"const": None}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert ask(response_format=named).response_format == named
    bare = ask(response_format={"type": "json_schema", "json_schema": {"schema": schema}}).response_format
    assert bare == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert ask(response_format={"type": "json_object"}).response_format == {"type": "json_object"}
    assert ask(response_format={"type": "text"}).response_format is None
    beside = {"type": "json_object", "schema": schema}
    assert "response_format" in refused({"prompt": "x", "response_format": beside})


def test_a_raw_grammar_is_never_forwarded() -> None:
    found = ask(grammar='root ::= "x"', json_schema={})
    assert found == ask() or found.warnings
    assert "grammar" not in repr(found.sampling)
    assert 'did you mean "response_format"' in found.warnings[0]


@pytest.mark.parametrize(
    "own, broken",
    [
        ([WEATHER], False),
        ([], False),
        ([{"function": {"name": "x"}}], True),
        ([{"type": "function", "function": {}}], True),
        ([WEATHER, WEATHER], True),
    ],
)
def test_the_tools_of_a_route_are_checked_like_those_of_a_request(own: list[dict[str, Any]], broken: bool) -> None:
    assert bool(check_tools(own)) is broken
