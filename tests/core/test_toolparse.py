"""Holds the reader of tool calls to each template's form, at any cut, and to losing nothing."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.deltas import Text, ToolCall
from llamacpp_mqtt_deploy.core.gbnf import NotConvertible, grammar_of, literal, tool_grammar
from llamacpp_mqtt_deploy.core.toolparse import MARKS, JsonExtent, ToolCallReader, ToolStyle, style_of
from tests.support.effort import seconds_of

NAMES = ("get_weather", "get_time")


def read(style: ToolStyle, pieces: list[str]) -> tuple[str, list[tuple[str, str]], ToolCallReader]:
    """The text, and name and arguments of each call."""
    ids = itertools.count()
    reader = ToolCallReader(style, names=NAMES, new_id=lambda: f"id{next(ids)}")
    out = [delta for piece in pieces for delta in reader.feed(piece)] + reader.end()
    calls: list[tuple[str, str]] = []
    for delta in out:
        if isinstance(delta, ToolCall):
            if delta.id is not None:
                assert delta.index == len(calls)
                calls.append((delta.name or "", ""))
            else:
                assert delta.name is None
                assert delta.arguments
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
        else:
            assert delta.text
    return "".join(delta.text for delta in out if isinstance(delta, Text)), calls, reader


ARGUMENTS = '{"city": "R}{\\"ome", "days": [1, {"x": 2}]}'
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": ' + ARGUMENTS + "}\n</tool_call>"
CASES: list[tuple[ToolStyle, str, str, list[tuple[str, str]]]] = [
    ("hermes", HERMES, "", [("get_weather", ARGUMENTS)]),
    ("hermes", "I look.\n" + HERMES + "\n" + HERMES, "I look.", [("get_weather", ARGUMENTS)] * 2),
    ("hermes", HERMES + "\nDone.", "Done.", [("get_weather", ARGUMENTS)]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "get_time"}</tool_call>', "", [("get_time", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call> Done.', "Done.", [("get_time", "{}")]),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": null}</tool_call>', "", [("get_time", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "get_time", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("get_time", '{"a": 1}')],
    ),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {}, "id": "7"}</tool_call>', "", [("get_time", "{}")]),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),  # type: ignore[list-item]
    ("hermes", "<tool_call>no json</tool_call>", None, []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": ["get_time"], "arguments": {}}</tool_call>', None, []),  # type: ignore[list-item]
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("hermes", "plain text < 5", "plain text < 5", []),
    ("hermes", '<tool_call>{"name": "get_ti', '<tool_call>{"name": "get_ti', []),
    ("llama3", '{"name": "get_time", "parameters": {"z": 1}}', "", [("get_time", '{"z": 1}')]),
    ("llama3", '<|python_tag|>{"name": "get_time", "parameters": {}}', "", [("get_time", "{}")]),
    (
        "llama3",
        '{"name": "get_time", "parameters": {}}; {"name": "get_weather", "parameters": {"a": "b"}}',
        "",
        [("get_time", "{}"), ("get_weather", '{"a": "b"}')],
    ),
    ("llama3", '{"type": "function", "name": "get_time", "parameters": {}}', "", [("get_time", "{}")]),
    ("llama3", '{"answer": 42} is it', '{"answer": 42} is it', []),
    ("llama3", ' {"answer": 42}', ' {"answer": 42}', []),
    (
        "llama3",
        '{"name": "get_time", "parameters": "{}"}; {"parameters": {"a": "é"}, "name": "get_weather"}',
        "",
        [("get_time", "{}"), ("get_weather", '{"a": "é"}')],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": "x\ny"}, "name": "get_time"}</tool_call>',
        "",
        [("get_time", '{"a": "x\\ny"}')],
    ),
    ("hermes", "a <tool_call>no json", "a <tool_call>no json", []),
    ("mistral", "[TOOL_CALLS] [no json", "[TOOL_CALLS] [no json", []),
    ("llama3", '{"name": "John", "parameters": {}}', '{"name": "John", "parameters": {}}', []),
    ("llama3", "hello {", "hello {", []),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "get_time", "arguments": {}}, {"name": "get_weather", "arguments": {"a": 1}}]',
        "",
        [("get_time", "{}"), ("get_weather", '{"a": 1}')],
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "get_time", "arguments": {}, "id": "abcdefghi"}]', "", [("get_time", "{}")]),
    ("mistral_args", '[TOOL_CALLS]get_time[ARGS]{"a": [1]}', "", [("get_time", '{"a": [1]}')]),
    (
        "mistral_args",
        "[TOOL_CALLS]get_time[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{}",
        "",
        [("get_time", "{}"), ("get_weather", "{}")],
    ),
    ("mistral_args", "[TOOL_CALLS]unknown[ARGS]{}", "[TOOL_CALLS]unknown[ARGS]{}", []),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
]


@pytest.mark.parametrize("style,text,said,calls", CASES)
def test_calls_are_read_in_each_form_at_any_cut(
    style: ToolStyle, text: str, said: str | None, calls: list[tuple[str, str]]
) -> None:
    expected = text if said is None else said
    for pieces in ([text], list(text), [text[n : n + 3] for n in range(0, len(text), 3)]):
        got, got_calls, _ = read(style, pieces)
        assert got == expected
        assert got_calls == calls


@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=6), st.text('{}[]",:\\ x<>', max_size=20))
def test_the_cut_does_not_matter_also_for_broken_calls(
    case: tuple[ToolStyle, str, str, list[tuple[str, str]]], cuts: list[int], junk: str
) -> None:
    style, text, *_ = case
    text = text[: len(text) * 2 // 3] + junk + text[len(text) * 2 // 3 :]
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert read(style, pieces)[:2] == read(style, [text])[:2]


@given(st.sampled_from(["hermes", "llama3", "mistral", "mistral_args"]), st.text(max_size=60))
def test_text_without_calls_passes_unchanged(style: ToolStyle, text: str) -> None:
    got, calls, _ = read(style, list(text))
    assert not calls
    assert got == text


def almost(style: ToolStyle) -> st.SearchStrategy[tuple[ToolStyle, str]]:
    """Texts out of the pieces of a call."""
    pieces = [
        "{",
        "}",
        "[",
        "]",
        '{"name": "unknown", "arguments": {}}',
        '{"parameters": {}, "name": 5}',
        "x",
        "\n",
        ",",
    ]
    return st.lists(st.sampled_from([*MARKS[style], " ", *pieces]), max_size=6).map(
        lambda found: (style, "".join(found))
    )


@settings(max_examples=300)
@given(st.sampled_from(sorted(MARKS)).flatmap(almost), st.lists(st.integers(0, 100), max_size=4))
def test_what_looks_like_a_call_and_is_none_passes_unchanged(written: tuple[ToolStyle, str], cuts: list[int]) -> None:
    style, text = written
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    for cut in (pieces, [text]):
        got, calls, reader = read(style, cut)
        assert not calls
        assert got == text
        assert reader.end() == []


def test_the_name_comes_before_the_arguments_are_complete() -> None:
    reader = ToolCallReader("hermes", names=NAMES, new_id=lambda: "id")
    assert reader.feed('<tool_call>{"name": "get_weather", "argum') == []
    assert reader.feed('ents": {"ci') == [ToolCall(0, "id", "get_weather", ""), ToolCall(0, None, None, '{"ci')]
    assert reader.feed('ty": "Rome"}') == [ToolCall(0, None, None, 'ty": "Rome"}')]
    assert (reader.begun, reader.complete) == (1, 0)
    assert reader.feed("}") == []
    assert reader.complete == 1


@pytest.mark.parametrize(
    "begun, more, ended",
    [
        ('{"arguments": {"a": "', "abcde", '"}, "name": "get_time"}'),
        ('{"name": "get_time', "\\u0041", '", "name": "get_time"}'),
        ("{", "     ", '"name": "get_time"}'),
        ('{"name"', "     ", ': "get_time"}'),
        ('{"name": "get_time"', "     ", "}"),
        ('{"name": "get_time", "arguments":', "     ", "{}}"),
    ],
)
def test_a_long_unfinished_head_costs_no_quadratic_time(begun: str, more: str, ended: str) -> None:
    reader = ToolCallReader("hermes", names=NAMES, new_id=lambda: "id")
    reader.feed("<tool_call>" + begun)

    def go_on() -> None:
        for _ in range(20_000):
            assert reader.feed(more) == []

    assert seconds_of(go_on) < 5
    told = reader.feed(ended + "</tool_call>")
    assert isinstance(told[0], ToolCall)
    assert told[0].name == "get_time"


@pytest.mark.parametrize(
    "style,begun,ended",
    [
        ("hermes", '<tool_call>{"name": "get_time", "arguments": {}', "}</tool_call>"),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": {}}', "</tool_call>"),
        ("mistral", '[TOOL_CALLS][{"name": "get_time", "arguments": {}}', "]"),
    ],
)
def test_blanks_behind_the_arguments_of_a_call_cost_no_quadratic_time(style: ToolStyle, begun: str, ended: str) -> None:
    reader = ToolCallReader(style, names=NAMES, new_id=lambda: "id")
    reader.feed(begun)

    def go_on() -> None:
        for _ in range(40_000):
            assert reader.feed(" \n \t") == []

    assert seconds_of(go_on) < 5
    assert reader.feed(ended + " Done.") == [Text("Done.")]
    assert reader.complete == 1


@given(
    st.lists(st.sampled_from([0, 1, 400, 1000, 1024]), min_size=5, max_size=5),
    st.sampled_from(["get_time", "x" * 1000]),
    st.sampled_from(['{"a": 1}}', '"1"}', '{"a": 1', "]"]),
    st.lists(st.integers(0, 8000), max_size=6),
)
def test_the_cut_does_not_matter_also_for_long_heads(blanks: list[int], name: str, end: str, cuts: list[int]) -> None:
    words = ["<tool_call>", "{", '"name"', f': "{name}"', ', "arguments":']
    text = "".join(word + " " * count for word, count in zip(words, blanks, strict=True)) + end
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert read("hermes", pieces)[:2] == read("hermes", [text])[:2]


def test_a_head_of_more_than_a_thousand_characters_is_read_when_its_object_is_whole() -> None:
    reader = ToolCallReader("hermes", names=NAMES, new_id=lambda: "id")
    head = '{"name": "get_time", "arguments":'
    assert reader.feed("<tool_call>" + head.ljust(1023) + "{")
    reader = ToolCallReader("hermes", names=NAMES, new_id=lambda: "id")
    assert reader.feed("<tool_call>" + head.ljust(1024) + "{") == []
    assert reader.feed("}}") == [ToolCall(0, "id", "get_time", "{}")]


@pytest.mark.parametrize(
    "template,style",
    [
        ("{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function=x></tool_call>{% endif %}", None),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}[TOOL_CALLS]x[ARGS]{% endif %}", "mistral_args"),
        ('{% if tools %}<|start_header_id|>"parameters"{% endif %}', "llama3"),
        ("{% if tools %}<tool_call><arg_key>", None),
        ("{% if tools %}<|python_tag|>", "llama3"),
        ("{% if tools %}<|start_header_id|>", None),
        ('{% if tools %}"parameters"', None),
        ("<|python_tag|>", None),
        ("{{ messages }}", None),
    ],
)
def test_the_form_is_known_from_the_template(template: str, style: ToolStyle | None) -> None:
    assert style_of(template) == style


@pytest.mark.parametrize(
    "pieces,end",
    [
        (["{}"], 2),
        (['{"a": [1, {"b": "}"}]}x'], 22),
        (["[1]x"], 3),
        (['"a" '], 3),
        (['"a\\"b" '], 6),
        (['"a\\\\" '], 5),
        (["12,"], 2),
        ([" 12 "], 3),
        (["true}"], 4),
        (["12]"], 2),
        (["}"], 0),
        ([","], 0),
        (["  "], None),
        (["12"], None),
        (['{"a": 1'], None),
        (['"a\\', '"'], None),
        (['"a\\', '"" '], 2),
        (['{"a"', ": {}", "}"], 1),
        (["1", "2", " "], 0),
        ([" ", " 1", ","], 0),
    ],
)
def test_the_end_of_a_json_value_is_found_in_its_last_piece(pieces: list[str], end: int | None) -> None:
    extent = JsonExtent()
    *before, last = pieces
    assert [extent.feed(piece) for piece in before] == [None] * len(before)
    assert extent.feed(last) == end


def test_the_end_of_a_json_value_is_looked_for_from_a_place_on() -> None:
    assert JsonExtent().feed('"}{}', 2) == 4


def test_what_may_become_a_name_is_held_back_for_five_hundred_characters() -> None:
    reader = ToolCallReader("mistral_args", names=NAMES, new_id=lambda: "id")
    held = "get_time[CALL_ID]" + "x" * 495
    assert reader.feed("[TOOL_CALLS]" + held) == []
    (given,) = reader.feed("x")[:1]
    assert given == Text("[TOOL_CALLS]")
    assert "".join(delta.text for delta in [*reader.feed("!"), *reader.end()] if isinstance(delta, Text)).endswith("!")


def test_keys_behind_the_arguments_are_read_over_for_four_thousand_characters() -> None:
    reader = ToolCallReader("hermes", names=NAMES, new_id=lambda: "id")
    reader.feed('<tool_call>{"name": "get_time", "arguments": {}, ')
    reader.feed('"note": "' + "x" * (4096 - 9))
    assert (reader.begun, reader.complete) == (1, 0)
    reader.feed("x")
    assert reader.complete == 1


@pytest.mark.parametrize(
    "tail",
    ['"id": "7"}', '"id": 7}', '"a": {"b": [1]}, "id": null}', '"a": "}" , "b": "\\"}"}', ' , "id" : 7 }', "}", " \n}"],
)
def test_other_keys_of_a_call_are_left_out(tail: str) -> None:
    text = '<tool_call>{"name": "get_time", "arguments": {"a": 1}, ' + tail + "</tool_call> Done."
    for pieces in ([text], list(text)):
        said, calls, reader = read("hermes", pieces)
        assert (said, calls) == ("Done.", [("get_time", '{"a": 1}')])
        assert (reader.begun, reader.complete) == (1, 1)


@pytest.mark.parametrize("broken", [" junk", ', "id" junk', ', "id": 7 junk'])
def test_what_follows_the_arguments_of_a_broken_call_is_text(broken: str) -> None:
    reader = ToolCallReader("hermes", names=NAMES, new_id=lambda: "id")
    out = reader.feed('<tool_call>{"name": "get_time", "arguments": {}' + broken)
    assert out == [ToolCall(0, "id", "get_time", ""), ToolCall(0, None, None, "{}"), Text("junk")]
    assert reader.end() == []


def test_text_between_and_behind_calls_keeps_its_blanks_only_where_it_stands_alone() -> None:
    assert read("hermes", ["one  ", HERMES, "  two  ", HERMES, "  "])[0] == "onetwo"
    assert read("hermes", ["one  "])[0] == "one  "
    assert read("mistral_args", ["one [TOOL_CALLS]get_time[ARGS]{} two "])[0] == "onetwo "
    assert read("llama3", ['{"name": "get_time", "parameters": {}} two '])[0] == "two "


# --- grammars --------------------------------------------------------------------------------------------------------


@given(st.text(max_size=30))
def test_a_literal_cannot_be_left_from_inside(text: str) -> None:
    written = literal(text)
    body = written[1:-1]
    assert written[0] == written[-1] == '"'
    # Behind each backslash stands an escape that GBNF knows; no quote stands without one; all is one printable line.
    index = 0
    while index < len(body):
        if body[index] == "\\":
            assert body[index + 1] in '\\"nrtU'
            index += 2
        else:
            assert body[index] != '"'
            assert body[index].isprintable()
            index += 1


def test_names_of_references_that_mean_different_things_stay_apart() -> None:
    first = {"$defs": {"string": {"enum": ["one"]}}, "properties": {"x": {"$ref": "#/$defs/string"}}, "required": ["x"]}
    second = {
        "$defs": {"string": {"enum": ["two"]}},
        "properties": {"x": {"$ref": "#/$defs/string"}},
        "required": ["x"],
    }
    grammar = tool_grammar("hermes", [("a", first), ("b", second)], several=True)
    assert json.dumps('"one"') in grammar
    assert json.dumps('"two"') in grammar


@pytest.mark.parametrize(
    "schema,named",
    [
        ({"type": "string", "pattern": "a"}, "pattern"),
        ({"type": "number", "minimum": 3}, "bounds"),
        ({"type": "integer", "minimum": 3}, "bounds"),
        ({"properties": {"a": {"not": {}}}}, "not"),
        ({"anyOf": [{"type": "string"}], "properties": {}}, "anyOf"),
        ({"allOf": [{"type": "string"}]}, "allOf"),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"a": {}}}]}, "twice"),
        ({"type": "array", "minItems": 5, "maxItems": 2}, "below"),
        ({"additionalProperties": False, "required": ["a"]}, "required"),
        ({"required": [3]}, "required"),
        ([], "object"),
        ({"type": []}, "empty"),
        ({"$ref": "#/a/b"}, "nowhere"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema: object, named: str) -> None:
    with pytest.raises(NotConvertible, match=named):
        grammar_of(schema)


def test_depth_and_size_are_bounded() -> None:
    deep: dict[str, object] = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(NotConvertible, match="deep"):
        grammar_of(deep)
    with pytest.raises(NotConvertible, match="large"):
        grammar_of({"properties": {f"p{n}": {"properties": {"a": {}, "b": {}}} for n in range(2000)}})
    circle: dict[str, object] = {"allOf": [{"$ref": "#"}]}
    with pytest.raises(NotConvertible):
        grammar_of(circle)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["type", "enum", "const", "anyOf", "allOf", "$ref", "properties", "required", "additionalProperties", "items",
        "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "format", "minimum", "maximum", "nullable"]  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(KEYS), json_values | st.sampled_from(["object", "array", "string", "#"]), max_size=5
    )
)
def test_any_schema_gives_a_grammar_or_a_refusal(schema: dict[str, object]) -> None:
    try:
        grammar = grammar_of(schema)
    except NotConvertible:
        return
    assert grammar.count("root ::=") == 1
