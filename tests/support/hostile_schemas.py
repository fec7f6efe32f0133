"""JSON schemas that hurt engines or look as if they could, and harmless ones that look alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _doubling(keyword: str, steps: int, width: int, end: Schema) -> Schema:
    """Each definition holds the next one `width` times."""
    definitions: dict[str, Any] = {f"a{n}": {keyword: [_ref(f"a{n + 1}")] * width} for n in range(steps)}
    return _ref("a0") | {"$defs": definitions | {f"a{steps}": end}}


_OBJECT: Schema = {"type": "object", "properties": {"x": {"type": "string"}}}

KILLERS: Mapping[str, Schema] = {
    "a reference to itself in allOf": {"allOf": [_ref("a")], "$defs": {"a": _ref("a")}},
    "two references in a circle in allOf": {"allOf": [_ref("a")], "$defs": {"a": _ref("b"), "b": _ref("a")}},
}
"""Overflow the stack of llama-server (xllamacpp 2026): measured, each ends the server."""

REFUSED: Mapping[str, Schema] = {
    **KILLERS,
    "a circle through allOf": _ref("a") | {"$defs": {"a": {"allOf": [_ref("a")]}}},
    "a circle through anyOf": _ref("a") | {"$defs": {"a": {"anyOf": [_ref("a"), {"type": "null"}]}}},
    "a circle through oneOf and allOf": _ref("a")
    | {"$defs": {"a": {"allOf": [_ref("b")]}, "b": {"oneOf": [_ref("a")]}}},
    "a circle through not": _ref("a") | {"$defs": {"a": {"not": _ref("a")}}},
    "a reference to itself": _ref("a") | {"$defs": {"a": _ref("a")}},
    "the root in allOf": {"allOf": [{"$ref": "#"}]},
    "the root alone": {"$ref": "#"},
    "an item of the list that holds it": {"allOf": [{"$ref": "#/allOf/0"}]},
    "a circle that nobody uses": {"type": "string", "$defs": {"a": _ref("a")}},
    "definitions taken for a schema": {"$ref": "#/$defs", "$defs": {"allOf": [{"$ref": "#/$defs"}]}},
    "a target that is missing": _ref("none"),
    "a target in a list that is too short": {"$ref": "#/allOf/9", "allOf": [{}]},
    "a target that is a number": {"allOf": [{"$ref": "#/maxLength"}], "maxLength": 5},
    "a target that is an example": {"$ref": "#/default", "default": {"type": "string"}},
    "an anchor": {"$ref": "#here", "$defs": {"a": {"$anchor": "here"}}},
    "another machine": {"properties": {"a": {"$ref": "http://example.org/schema.json"}}},
    "a file": {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
    "another machine in an example": {"enum": [{"$ref": "http://example.org/schema.json"}]},
    "a number for a reference": {"$ref": 7},
    "allOf that doubles twenty times": _doubling("allOf", 20, 2, _OBJECT),
    "anyOf that doubles twenty times": _doubling("anyOf", 20, 2, _OBJECT),
    "allOf that doubles with a recursion at its end": _doubling(
        "allOf", 20, 2, {"type": "object", "properties": {"x": {"$ref": "#"}}}
    ),
    "allOf by eight": _doubling("allOf", 8, 8, _OBJECT),
}

ACCEPTED: Mapping[str, Schema] = {
    "a tree": _ref("n")
    | {"$defs": {"n": {"type": "object", "properties": {"c": {"type": "array", "items": _ref("n")}}}}},
    "a list of pairs": _ref("n")
    | {"$defs": {"n": {"type": "object", "properties": {"c": {"anyOf": [_ref("n"), {"type": "null"}]}}}}},
    "a recursion through allOf and a property": _ref("n")
    | {"$defs": {"n": {"allOf": [{"type": "object", "properties": {"c": _ref("n")}}]}}},
    "a property that is called not": _ref("f")
    | {"$defs": {"f": {"type": "object", "properties": {"not": _ref("f"), "allOf": {"type": "array", "items": _ref("f")}}}}},
    "a property that is called $ref": {"type": "object", "properties": {"$ref": {"type": "string"}}},
    "the root in a property": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "other values": _ref("a") | {"$defs": {"a": {"type": "object", "additionalProperties": _ref("a")}}},
    "one definition used often": {
        "type": "object",
        "properties": {f"p{n}": _ref("a") for n in range(40)},
        "$defs": {"a": _OBJECT},
    },
    "a little doubling": _doubling("anyOf", 5, 2, _OBJECT),
    "a name with a slash": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "string"}}},
    "nested lists with bounds": {
        "type": "array", "minItems": 100,
        "items": {"type": "array", "minItems": 100, "items": {"type": "array", "minItems": 100, "items": {}}},
    },
    "a pattern with bounds in bounds": {"type": "string", "pattern": "^((((a{1,900}){1,900}){1,900}){1,900})$"},
    "a pattern of brackets": {"type": "string", "pattern": "^" + "(" * 3000 + "a" + ")" * 3000 + "$"},
    "an endless pattern": {"type": "string", "pattern": "^(a*)*$"},
    "a pattern that ends early": {"type": "string", "pattern": "^(("},
    "a long text": {"type": "string", "minLength": 100_000_000},
    "a long list": {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000},
    "all whole numbers": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "words of the wrong kind": {"type": {"a": 1}, "properties": [1], "allOf": "x", "enum": 5, "items": 5, "required": 5},
    "numbers for schemas": {"allOf": [1], "anyOf": [1]},
}  # fmt: skip
"""Of use, or at worst refused by the engine with an error."""
