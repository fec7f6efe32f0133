"""Writes the GBNF grammar that holds a model to a JSON Schema, or to the tool calls that a request demands.

Our own writer: no text of a client reaches the grammar except as an escaped literal. The converter that comes with
llama-cpp-python (0.3.36) does not escape backslashes, so that an `enum` could write rules, and it follows names of `$ref`
that mean different things into the same rule. What cannot be enforced is refused by name, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from llamacpp_mqtt_deploy.core.toolparse import ToolStyle

MAX_RULES = 4000
MAX_CHARS = 256 * 1024
MAX_DEPTH = 32
MAX_REPEATS = 1000
"""llama.cpp writes `{m,n}` out into rules and refuses more than 2000."""
MAX_RANGE = 1000
"""Whole numbers between two bounds that are written out one by one."""

_ANNOTATIONS = frozenset(
    {
        "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$schema", "$id",
        "$comment", "$defs", "definitions", "$anchor", "strict", "name", "contentMediaType", "contentEncoding", "nullable",
    }
)  # fmt: skip
_KNOWN = _ANNOTATIONS | {
    "type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "properties", "required", "additionalProperties", "items",
    "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum",
}  # fmt: skip
_CONSTRAINTS = frozenset(
    {
        "pattern", "multipleOf", "not", "if", "then", "else", "patternProperties", "propertyNames", "uniqueItems", "contains",
        "minContains", "maxContains", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas",
        "unevaluatedProperties", "unevaluatedItems", "additionalItems", "dependencies", "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip

_BASE: Mapping[str, str] = {
    # As llama.cpp's server: blanks are allowed and bounded, or a model could write them for ever.
    "space": r'| " " | "\n"{1,2} [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\"" space',
    "integer": r'"-"? ([0-9] | [1-9] [0-9]{0,15}) space',
    "number": r'"-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9] [0-9]{0,2})? space',
    "boolean": r'("true" | "false") space',
    "null": r'"null" space',
    "value": "object | array | string | number | boolean | null",
    "object": r'"{" space ( string ":" space value ("," space string ":" space value)* )? "}" space',
    "array": r'"[" space ( value ("," space value)* )? "]" space',
}
_FORMATS: Mapping[str, str] = {
    "date": r'[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "time": r'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{3})? ("Z" | [-+] [0-9]{2} ":" [0-9]{2})',
    "uuid": r'[0-9a-fA-F]{8} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{4} "-" [0-9a-fA-F]{12}',
}
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class NotConvertible(ValueError):
    """The schema cannot be enforced; the text says which part and why."""


def grammar_of(schema: Any) -> str:
    """The grammar of one JSON value that fits the schema. Raises NotConvertible."""
    writer = _Writer(schema)
    writer.rules["root"] = writer.visit(schema, "the schema", 0)
    return writer.text()


def tool_grammar(style: ToolStyle, tools: Sequence[tuple[str, Any]], *, several: bool) -> str:
    """The grammar of an answer that calls at least one of these tools (name, schema of its arguments), in a template's style."""
    writer = _Writer({})
    calls = []
    for number, (name, schema) in enumerate(tools):
        writer.document = schema if isinstance(schema, dict) else {}
        writer.scope = f"t{number}"
        arguments = writer.visit(writer.document or {"type": "object"}, f"the arguments of {name}", 0)
        quoted = json.dumps(name, ensure_ascii=False)
        key = "parameters" if style == "llama3" else "arguments"
        if style == "mistral_args":
            head, tail = f"[TOOL_CALLS]{name}[ARGS]", ""
        else:
            head, tail = f'{{"name": {quoted}, "{key}": ', "}"
        calls.append(writer.add(f"{literal(head)} {arguments} {literal(tail)}"))
    one = writer.add(" | ".join(calls))
    line = literal("\n")
    match style:
        case "hermes":
            one = writer.add(f"{literal('<tool_call>')} {line}? {one} {line}? {literal('</tool_call>')}")
            root = f"{one} ({line}? {one})*" if several else one
        case "mistral_args":
            root = f"{one}+" if several else one
        case "mistral":
            more = f'("," space {one})*' if several else ""
            root = f"{literal('[TOOL_CALLS][')} {one} {more} {literal(']')}"
        case _:
            root = one
    writer.rules["root"] = root
    return writer.text()


def literal(text: str) -> str:
    """A GBNF literal of exactly this text."""
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else f"\\U{ord(c):08X}") for c in text) + '"'


class _Writer:
    def __init__(self, document: Any) -> None:
        self.document = document
        self.scope = ""
        self.rules: dict[str, str] = {}
        self._refs: dict[tuple[str, str], str] = {}

    def text(self) -> str:
        used = {**_BASE, **self.rules}
        text = "\n".join(f"{name} ::= {rule}" for name, rule in used.items()) + "\n"
        if len(text) > MAX_CHARS:
            raise NotConvertible("the schema is too large")
        return text

    def add(self, rule: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = rule
        if len(self.rules) > MAX_RULES:
            raise NotConvertible("the schema is too large")
        return name

    def visit(self, schema: Any, where: str, depth: int) -> str:
        """A rule's name or a group for this part of the schema."""
        if depth > MAX_DEPTH:
            raise NotConvertible(f"{where}: nested too deeply")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise NotConvertible(f"{where}: a schema must be an object")
        for key in schema:
            if key in _CONSTRAINTS:
                raise NotConvertible(f"{where}: `{key}` cannot be enforced by this engine")
        rule = self._one(schema, where, depth)
        return self.add(f"{rule} | null") if schema.get("nullable") is True else rule

    def _one(self, schema: dict[str, Any], where: str, depth: int) -> str:
        keys = {key for key in schema if key in _KNOWN - _ANNOTATIONS}
        if "$ref" in keys:
            self._alone(keys, "$ref", where)
            return self._reference(schema["$ref"], where, depth)
        if "const" in keys:
            return self._choice([schema["const"]], where)
        if "enum" in keys:
            return self._choice(schema["enum"], where)
        for union in ("anyOf", "oneOf"):
            if union in keys:
                self._alone(keys - {"type"}, union, where)
                return self._union(schema[union], f"{where}/{union}", depth)
        if "allOf" in keys:
            return self._one(self._merged(schema, where, depth), where, depth + 1)
        kind = schema.get("type")
        if isinstance(kind, list):
            if not kind:
                raise NotConvertible(f"{where}: `type` is empty")
            return self._union([{**schema, "type": one} for one in kind], where, depth)
        if kind is None:
            kind = _guess(keys)
        match kind:
            case None:
                return "value"
            case "object":
                return self._object(schema, where, depth)
            case "array":
                return self._array(schema, where, depth)
            case "string":
                return self._string(schema, where)
            case "integer" | "number":
                return self._number(schema, where, kind)
            case "boolean" | "null":
                return str(kind)
            case _:
                raise NotConvertible(f"{where}: unknown type {_short(kind)}")

    def _alone(self, keys: set[str], key: str, where: str) -> None:
        others = sorted(keys - {key})
        if others:
            raise NotConvertible(f"{where}: `{key}` together with `{others[0]}` cannot be enforced by this engine")

    def _reference(self, reference: Any, where: str, depth: int) -> str:
        known = self._refs.get((self.scope, str(reference)))
        if known is not None:
            return known
        target = self._resolve(reference, where)
        # The name stands before the rule is written, so that a schema may contain itself.
        name = self.add("")
        self._refs[self.scope, str(reference)] = name
        self.rules[name] = self.visit(target, str(reference)[:80], depth + 1)
        return name

    def _resolve(self, reference: Any, where: str) -> Any:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise NotConvertible(f"{where}: only references within the schema (`#/...`) are followed")
        target = self.document
        for part in reference.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
                target = target[int(key)]
            else:
                raise NotConvertible(f"{where}: {_short(reference)} leads nowhere")
        return target

    def _choice(self, values: Any, where: str) -> str:
        if not isinstance(values, list) or not values:
            raise NotConvertible(f"{where}: `enum` must be a list with at least one value")
        options = " | ".join(literal(json.dumps(value, ensure_ascii=False)) for value in values)
        return self.add(f"({options}) space")

    def _union(self, schemas: Any, where: str, depth: int) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise NotConvertible(f"{where}: must be a list with at least one schema")
        return self.add(" | ".join(self.visit(one, f"{where}/{n}", depth + 1) for n, one in enumerate(schemas)))

    def _merged(self, schema: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
        """`allOf` over objects, as inheritance writes it."""
        parts = schema["allOf"]
        if not isinstance(parts, list) or depth > MAX_DEPTH:
            raise NotConvertible(f"{where}: `allOf` must be a list")
        merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for part in (*parts, {key: value for key, value in schema.items() if key != "allOf"}):
            one = self._resolve(part["$ref"], where) if isinstance(part, dict) and "$ref" in part else part
            if isinstance(one, dict) and "allOf" in one:
                one = self._merged(one, where, depth + 1)
            if not isinstance(one, dict) or not isinstance(one.get("properties", {}), dict):
                raise NotConvertible(f"{where}: `allOf` must hold objects")
            foreign = sorted(
                (set(one) & (_KNOWN | _CONSTRAINTS)) - _ANNOTATIONS - set(merged) - {"additionalProperties"}
            )
            if foreign or one.get("type", "object") != "object":
                raise NotConvertible(
                    f"{where}: `allOf` with anything but plain objects cannot be enforced by this engine"
                )
            twice = sorted(set(one.get("properties", {})) & set(merged["properties"]))
            if twice:
                raise NotConvertible(f"{where}: `allOf` describes {_short(twice[0])} twice")
            merged["properties"].update(one.get("properties", {}))
            merged["required"] += _names(one.get("required", []), where)
        return merged

    def _object(self, schema: dict[str, Any], where: str, depth: int) -> str:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise NotConvertible(f"{where}: `properties` must be an object")
        required = _names(schema.get("required", []), where)
        # A schema that lists properties and says nothing of others is closed, as with llama.cpp's server: a model held to an
        # open one could write properties for ever.
        more = schema.get("additionalProperties", not properties)
        extra = None
        if more is not False:
            value = self.visit(more, f"{where}/additionalProperties", depth + 1)
            extra = self.add(f'string ":" space {value}')
        every = {**properties, **{name: more for name in required if name not in properties}}
        if more is False and len(every) > len(properties):
            raise NotConvertible(f"{where}: `required` names a property that is not allowed")
        # Two chains from the last property to the first: what may follow when something stands before it, and when nothing does.
        rest = self.add(f'("," space {extra})*' if extra else '""')
        first = self.add(f'({extra} ("," space {extra})*)?' if extra else '""')
        for name, one in reversed(every.items()):
            value = self.visit(one, f"{where}/{name}"[:200], depth + 1)
            pair = self.add(f'{literal(json.dumps(name, ensure_ascii=False))} space ":" space {value}')
            if name in required:
                first = self.add(f"{pair} {rest}")
                rest = self.add(f'"," space {pair} {rest}')
            else:
                first = self.add(f"{pair} {rest} | {first}")
                rest = self.add(f'("," space {pair})? {rest}')
        return self.add(f'"{{" space {first} "}}" space')

    def _array(self, schema: dict[str, Any], where: str, depth: int) -> str:
        low, high = self._bounds(schema, "minItems", "maxItems", where)
        if "prefixItems" in schema:
            if not isinstance(schema["prefixItems"], list) or "items" in schema or low or high is not None:
                raise NotConvertible(
                    f"{where}: `prefixItems` together with bounds or `items` cannot be enforced by this engine"
                )
            parts = [self.visit(one, f"{where}/{n}", depth + 1) for n, one in enumerate(schema["prefixItems"])]
            inside = ' "," space '.join(parts)
            return self.add(f'"[" space {inside} "]" space')
        item = self.visit(schema.get("items", True), f"{where}/items", depth + 1)
        if high == 0:
            return self.add('"[" space "]" space')
        more = f'("," space {item}){_times(max(0, low - 1), None if high is None else high - 1)}'
        inside = f"{item} {more}"
        return self.add(f'"[" space {inside if low else f"({inside})?"} "]" space')

    def _string(self, schema: dict[str, Any], where: str) -> str:
        form = schema.get("format")
        if isinstance(form, str) and form in (*_FORMATS, "date-time"):
            rule = f'{_FORMATS["date"]} "T" {_FORMATS["time"]}' if form == "date-time" else _FORMATS[form]
            return self.add(rf'"\"" {rule} "\"" space')
        low, high = self._bounds(schema, "minLength", "maxLength", where)
        return self.add(rf'"\"" char{_times(low, high)} "\"" space') if low or high is not None else "string"

    def _number(self, schema: dict[str, Any], where: str, kind: str) -> str:
        low, high = schema.get("minimum"), schema.get("maximum")
        if kind == "integer":
            above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
            low = above + 1 if _is_whole(above) and low is None else low
            high = below - 1 if _is_whole(below) and high is None else high
            if low == 0 and high is None:
                return self.add("([0-9] | [1-9] [0-9]{0,15}) space")
            if low == 1 and high is None:
                return self.add("[1-9] [0-9]{0,15} space")
            if _is_whole(low) and _is_whole(high) and 0 <= high - low < MAX_RANGE:
                return self.add(f"({' | '.join(literal(str(n)) for n in range(int(low), int(high) + 1))}) space")
        elif low == 0 and high is None and "exclusiveMinimum" not in schema and "exclusiveMaximum" not in schema:
            return self.add(_BASE["number"].removeprefix('"-"? '))
        if low is not None or high is not None or "exclusiveMinimum" in schema or "exclusiveMaximum" in schema:
            raise NotConvertible(
                f"{where}: these bounds of a number cannot be enforced by this engine; whole numbers with at most "
                f"{MAX_RANGE} values, or a minimum of 0, can"
            )
        return kind

    def _bounds(self, schema: dict[str, Any], lowest: str, highest: str, where: str) -> tuple[int, int | None]:
        low, high = schema.get(lowest), schema.get(highest)
        low = 0 if low is None else low
        for name, bound in ((lowest, low), (highest, high)):
            if bound is not None and (not _is_whole(bound) or not 0 <= bound <= MAX_REPEATS):
                raise NotConvertible(
                    f"{where}: `{name}` must be a whole number from 0 to {MAX_REPEATS} with this engine"
                )
        if high is not None and high < low:
            raise NotConvertible(f"{where}: `{highest}` is below `{lowest}`")
        return int(low), None if high is None else int(high)


def _times(low: int, high: int | None) -> str:
    if high is None:
        return {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    return f"{{{low},{high}}}"


def _guess(keys: set[str]) -> str | None:
    """The type that a schema without `type` means."""
    if keys & {"properties", "required", "additionalProperties"}:
        return "object"
    if keys & {"items", "prefixItems", "minItems", "maxItems"}:
        return "array"
    if keys & {"minLength", "maxLength"}:
        return "string"
    if keys & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
        return "number"
    return None


def _names(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise NotConvertible(f"{where}: `required` must be a list of names")
    return value


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    return repr(value)[:80]
