"""A grammar takes what its schema takes, and nothing else that matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.gbnf import NotConvertible, grammar_of, tool_grammar
from llamacpp_mqtt_deploy.core.toolparse import ToolStyle
from tests.support.gbnf_reader import fits

LINKED = {
    "$defs": {"node": {"properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}},
    "$ref": "#/$defs/node",
}
INHERITED = {
    "$defs": {"base": {"properties": {"id": {"type": "integer"}}, "required": ["id"]}},
    "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"name": {"type": "string"}}}],
    "required": ["name"],
}

# A schema, JSON values that fit it, and values that do not.
CASES: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1, "a", None, {"a": [1, {}]}, [], [True, 1.5e3]], []),
    ({}, [1, "a", None, {"a": [1, {}]}], []),
    ({"type": "string"}, ["", "a", 'q"\\\n', "é"], [1, None, ["a"]]),
    ({"minLength": 2}, ["ab", "abc"], ["", "a", 12]),
    ({"type": "string", "maxLength": 2}, ["", "a", "ab"], ["abc"]),
    ({"minLength": 1, "maxLength": 1}, ["a"], ["", "ab"]),
    ({"type": "string", "minLength": 1}, ["a", "ab"], [""]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "2024-2-1", ""]),
    ({"type": "string", "format": "time"}, ["23:59:59Z", "00:00:00.123+01:00"], ["24:00:00Z", "12:00"]),
    ({"type": "string", "format": "date-time"}, ["2024-02-29T12:00:00Z"], ["2024-02-29", "12:00:00Z"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ({"type": "string", "format": "hostname"}, ["anything at all"], [3]),
    ({"type": "integer"}, [0, -5, 123456], [1.5, "1", None]),
    ({"type": "number"}, [0, -5, 1.25, 1e-05], ["1", None]),
    ({"type": "integer", "minimum": 0}, [0, 7, 10], [-1, 1.5]),
    ({"minimum": 0}, [0, 7, 1.5], [-1, -0.5]),
    ({"type": "integer", "minimum": 1}, [1, 10, 25], [0, -1]),
    ({"type": "integer", "exclusiveMinimum": 0}, [1, 10], [0, -1]),
    ({"type": "integer", "exclusiveMinimum": -1}, [0, 1, 10], [-1]),
    ({"type": "integer", "minimum": -1, "maximum": 2}, [-1, 0, 1, 2], [-2, 3]),
    ({"type": "integer", "exclusiveMinimum": -2, "exclusiveMaximum": 3}, [-1, 0, 1, 2], [-2, 3]),
    ({"type": "integer", "minimum": 5, "maximum": 5}, [5], [4, 6]),
    ({"type": "integer", "minimum": 1, "maximum": 1000}, [1, 999, 1000], [0, 1001]),
    ({"type": "boolean"}, [True, False], [None, 1]),
    ({"type": "null"}, [None], [False, 0]),
    ({"type": "string", "nullable": True}, ["a", None], [1]),
    ({"type": "string", "nullable": False}, ["a"], [None]),
    ({"type": ["string", "null"]}, ["a", None], [1]),
    ({"enum": ["a", 2, None, 'y"']}, ["a", 2, None, 'y"'], ["b", 3, "", {}]),
    ({"const": 1}, [1], [2, [1], "1"]),
    ({"anyOf": [{"type": "integer"}, {"enum": ["x"]}]}, [3, "x"], ["y", None]),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}], "title": "one"}, [3, None], ["y"]),
    ({"type": "object"}, [{}, {"a": 1, "b": [2]}], [[], 1]),
    ({"additionalProperties": {"type": "integer"}}, [{}, {"a": 1}, {"a": 1, "b": 2}], [{"a": "x"}, {"a": 1, "b": "x"}]),
    ({"properties": {"a": {"type": "integer"}}}, [{}, {"a": 1}], [{"a": "x"}, {"b": 1}, {"a": 1, "b": 1}]),
    ({"properties": {"a": {}, "b": {}}, "required": ["a"]}, [{"a": 1}, {"a": 1, "b": 2}], [{}, {"b": 2}]),
    ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, [{"b": 2}, {"a": 1, "b": 2}], [{}, {"a": 1}]),
    (
        {"properties": {"a": {}, "b": {}, "c": {}}},
        [{}, {"a": 1}, {"b": 1}, {"c": 1}, {"a": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{"d": 1}],
    ),
    (
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        [{}, {"a": "x"}, {"b": 1}, {"a": "x", "b": 1, "c": 2}],
        [{"b": "x"}, {"a": "x", "b": "x"}],
    ),
    ({"required": ["a"]}, [{"a": 1}, {"a": None, "b": 2}], [{}, {"b": 2}]),
    ({"required": ["a"], "additionalProperties": {"type": "integer"}}, [{"a": 1}], [{}, {"a": "x"}]),
    ({"additionalProperties": False}, [{}], [{"a": 1}]),
    ({"properties": {'quo"te': {}}, "required": ['quo"te']}, [{'quo"te': 1}], [{}]),
    ({"items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], [1, "a"], {}]),
    ({"type": "array"}, [[], [1, "a", [None]]], [1]),
    ({"minItems": 1}, [[1], [1, 2]], [[]]),
    ({"minItems": 2, "items": {"type": "integer"}}, [[1, 2], [1, 2, 3]], [[], [1], [1, "a"]]),
    ({"type": "array", "maxItems": 2}, [[], [1], [1, 2]], [[1, 2, 3]]),
    ({"minItems": 2, "maxItems": 3}, [[1, 2], [1, 2, 3]], [[], [1], [1, 2, 3, 4]]),
    ({"maxItems": 0}, [[]], [[1]]),
    ({"prefixItems": [{"type": "integer"}, {"type": "string"}]}, [[1, "a"]], [[], [1], ["a", 1], [1, "a", 2]]),
    (LINKED, [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}], [{}, {"v": 1, "next": {}}]),
    (INHERITED, [{"id": 1, "name": "x"}], [{"id": 1}, {"name": "x"}, {"id": "1", "name": "x"}]),
    ({"$defs": {"a/b~": [{"type": "null"}]}, "$ref": "#/$defs/a~1b~0/0"}, [None], [1]),
    ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "integer"}}}, [{"a": 1, "b": 2}], [{"a": "x"}]),
]


def _written(value: Any) -> list[str]:
    """The value as models write JSON: with blanks, without, and on lines."""
    forms = [{"indent": None}, {"separators": (",", ":")}, {"indent": 2}]
    return [json.dumps(value, ensure_ascii=False, **form) for form in forms]  # type: ignore[arg-type]


@pytest.mark.parametrize("schema,fitting,others", CASES, ids=lambda value: json.dumps(value)[:60])
def test_a_grammar_takes_the_values_of_its_schema_and_no_others(
    schema: Any, fitting: list[Any], others: list[Any]
) -> None:
    grammar = grammar_of(schema)
    assert [text for value in fitting for text in _written(value) if not fits(grammar, text)] == []
    assert [value for value in others if fits(grammar, json.dumps(value))] == []


def test_a_choice_of_whole_values_is_written_in_one_way() -> None:
    assert fits(grammar_of({"const": {"x": [1, "é"]}}), '{"x": [1, "é"]}')
    assert not fits(grammar_of({"const": {"x": [1]}}), '{"x": [2]}')


WEATHER = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [("weather", WEATHER), ("now", None)]
ONE: dict[ToolStyle, str] = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Rome"}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]',
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}',
}
TWO: dict[ToolStyle, str] = {
    "hermes": ONE["hermes"] + '\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]',
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]now[ARGS]{}',
}


@pytest.mark.parametrize("style", ONE)
def test_a_grammar_of_tools_takes_calls_as_the_template_writes_them(style: ToolStyle) -> None:
    single, several = (tool_grammar(style, TOOLS, several=several) for several in (False, True))
    assert fits(single, ONE[style])
    assert fits(several, ONE[style])
    assert not fits(single, "")
    assert not fits(several, "I would rather talk.")
    for wrong in (ONE[style].replace("weather", "unknown"), ONE[style].replace('"Rome"', "3")):
        assert not fits(several, wrong)
    if style in TWO:
        assert fits(several, TWO[style])
        assert not fits(single, TWO[style])


def _nested(wrap: Callable[[Any], Any], levels: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = wrap(schema)
    return schema


@pytest.mark.parametrize(
    "levels,wrap",
    [
        (32, lambda inner: {"type": "array", "items": inner}),
        (32, lambda inner: {"prefixItems": [inner]}),
        (32, lambda inner: {"properties": {"a": inner}}),
        (32, lambda inner: {"additionalProperties": inner}),
        (32, lambda inner: {"anyOf": [inner]}),
        (32, lambda inner: {"oneOf": [{"type": "null"}, inner]}),
        (16, lambda inner: {"type": ["array"], "items": inner}),
        (16, lambda inner: {"allOf": [{"properties": {"a": inner}}]}),
    ],
)
def test_a_schema_may_be_nested_thirty_two_levels_deep(levels: int, wrap: Callable[[Any], Any]) -> None:
    grammar_of(_nested(wrap, levels))
    with pytest.raises(NotConvertible, match="deep"):
        grammar_of(_nested(wrap, levels + 1))


def test_a_chain_of_references_and_allOf_in_allOf_go_as_deep() -> None:  # noqa: N802
    def chain(links: int) -> Any:
        definitions: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(links - 1)}
        return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{links - 1}": {"type": "integer"}}}

    def parents(number: int) -> Any:
        return {"allOf": [parents(number - 1)]} if number else {"properties": {"a": {"type": "integer"}}}

    assert fits(grammar_of(chain(32)), "1")
    with pytest.raises(NotConvertible, match="deep"):
        grammar_of(chain(33))
    assert fits(grammar_of(parents(33)), '{"a": 1}')
    with pytest.raises(NotConvertible, match="allOf"):
        grammar_of(parents(34))


def test_the_arguments_of_a_tool_are_held_to_their_own_schema_and_named_in_a_refusal() -> None:
    deep = _nested(lambda inner: {"type": "array", "items": inner}, 32)
    assert fits(
        tool_grammar("llama3", [("f", deep)], several=False),
        '{"name": "f", "parameters": ' + "[" * 32 + "1" + "]" * 32 + "}",
    )
    with pytest.raises(NotConvertible, match="deep"):
        tool_grammar("llama3", [("f", {"type": "array", "items": deep})], several=False)
    with pytest.raises(NotConvertible, match="the arguments of f: `not` cannot be enforced"):
        tool_grammar("hermes", [("e", None), ("f", {"not": {}})], several=True)
    local = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}
    other = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "boolean"}}}
    grammar = tool_grammar("llama3", [("wähle", local), ("f", other)], several=False)
    assert fits(grammar, '{"name": "wähle", "parameters": 1}')
    assert not fits(grammar, '{"name": "wähle", "parameters": true}')
    assert fits(grammar, '{"name": "f", "parameters": true}')


def test_repeats_go_up_to_a_thousand() -> None:
    assert fits(grammar_of({"maxItems": 1000}), json.dumps([0] * 1000))
    grammar_of({"type": "string", "minLength": 1000, "maxLength": 1000})
    for bounds in ({"maxLength": 1001}, {"minItems": -1}, {"minLength": 1.5}, {"maxItems": True}, {"minItems": "1"}):
        with pytest.raises(NotConvertible, match="whole number from 0 to 1000"):
            grammar_of(bounds)


def test_a_grammar_has_four_thousand_rules_and_256_kibibytes_at_most() -> None:
    assert grammar_of({"anyOf": [{"const": 1}] * 3999}).count("\nr") == 4001  # and one is called root
    with pytest.raises(NotConvertible, match="large"):
        grammar_of({"anyOf": [{"const": 1}] * 4000})
    spare = 256 * 1024 - len(grammar_of({"enum": [""]}))
    assert len(grammar_of({"enum": ["x" * spare]})) == 256 * 1024
    with pytest.raises(NotConvertible, match="large"):
        grammar_of({"enum": ["x" * (spare + 1)]})


def test_a_long_name_of_the_clients_is_repeated_in_part_only() -> None:
    with pytest.raises(NotConvertible) as caught:
        grammar_of({"properties": {"x" * 300: 3}})
    assert str(caught.value) == f"the schema/{'x' * 189}: a schema must be an object"
    name = "d" * 100
    with pytest.raises(NotConvertible) as caught:
        grammar_of({"$ref": f"#/$defs/{name}", "$defs": {name: 3}})
    assert str(caught.value) == f"#/$defs/{'d' * 72}: a schema must be an object"
    with pytest.raises(NotConvertible) as caught:
        grammar_of({"type": "t" * 100})
    assert str(caught.value) == f"the schema: unknown type '{'t' * 79}"


@pytest.mark.parametrize(
    "schema,named",
    [
        ({"type": "integer", "minimum": 0, "maximum": 1000}, "bounds"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "bounds"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "bounds"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "bounds"),
        ({"type": "number", "exclusiveMinimum": 0}, "bounds"),
        ({"type": "number", "exclusiveMaximum": 9}, "bounds"),
        ({"type": "integer", "maximum": 9}, "bounds"),
        ({"prefixItems": [{}], "items": {}}, "prefixItems"),
        ({"prefixItems": [{}], "minItems": 1}, "prefixItems"),
        ({"prefixItems": [{}], "maxItems": 0}, "prefixItems"),
        ({"prefixItems": {}}, "prefixItems"),
        ({"$ref": "#/x", "type": "string"}, "together with `type`"),
        ({"$ref": "other.json"}, "within the schema"),
        ({"$ref": 3}, "within the schema"),
        ({"$defs": [{}], "$ref": "#/$defs/1"}, "nowhere"),
        ({"$defs": [{}], "$ref": "#/$defs/x"}, "nowhere"),
        ({"enum": []}, "at least one value"),
        ({"enum": "ab"}, "must be a list"),
        ({"anyOf": []}, "at least one schema"),
        ({"anyOf": {}}, "must be a list"),
        ({"allOf": {}}, "must be a list"),
        ({"allOf": [3]}, "objects"),
        ({"allOf": [{"properties": []}]}, "objects"),
        ({"allOf": [{"items": {}}]}, "plain objects"),
        ({"allOf": [{"minProperties": 1}]}, "plain objects"),
        ({"allOf": [{"properties": {}}], "minLength": 1}, "plain objects"),
        ({"type": "colour"}, "unknown type 'colour'"),
        ({"type": "object", "properties": []}, "`properties` must be an object"),
        ({"items": 3}, "must be an object"),
    ],
)
def test_a_schema_that_would_be_enforced_only_in_part_is_refused_with_the_reason(schema: Any, named: str) -> None:
    with pytest.raises(NotConvertible, match=named):
        grammar_of(schema)
