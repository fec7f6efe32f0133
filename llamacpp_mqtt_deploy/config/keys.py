"""Every key a user can set, read off the settings models: its description, its default and what it expects, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import isclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.schema.attribute_docs import described

# Sections of tables to which the user gives names.
NAMED_TABLES = frozenset({"routes", "levels"})
# Stands for such a name.
ANY_NAME = "NAME"
MASK = "********"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the configuration file. `default` is None both for "absent" and where `default_text` says it in words."""

    path: tuple[str, ...]
    description: str
    default: object
    expected: str
    secret: bool

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table of the configuration file with its own keys, without those of the tables below it."""

    path: tuple[str, ...]
    description: str
    keys: tuple[Key, ...]


def document() -> dict[str, Any]:
    """The JSON Schema of the configuration file."""
    return described(Settings.model_json_schema(), [Settings])


@cache
def tables() -> tuple[Table, ...]:
    """All tables in the order of the models; `[routes.NAME]` stands for every route."""
    schema = document()
    return tuple(_tables(schema, schema, ()))


@cache
def keys() -> Mapping[str, Key]:
    """All keys by their dotted name."""
    return {key.dotted: key for table in tables() for key in table.keys}


def find(path: Sequence[str]) -> Key | None:
    """The key of this path, where a route's name may be anything; None when there is no such key."""
    return keys().get(".".join(_generic(path)))


def is_secret(path: Sequence[str]) -> bool:
    """Whether the value must not be shown. Unknown keys count as secret: they may be a password with a typing mistake."""
    field = _field(_generic(path))
    return field is None or _holds_a_secret(field)


def names_a_secret(path: Sequence[str]) -> bool:
    """Whether this is a known key for a secret."""
    field = _field(_generic(path))
    return field is not None and _holds_a_secret(field)


def expected_at(path: Sequence[str]) -> str:
    """What belongs here, in words: for a key, a table, or an item of a list (its path goes on with the index)."""
    key = find(path)
    if key is not None:
        return key.expected
    for end in range(len(path) - 1, 0, -1):
        key = find(path[:end])
        if key is not None:
            return key.expected
    return "a table"


def nearest(path: Sequence[str]) -> str | None:
    """The known key that an unknown one most likely means, dotted; None when nothing comes near."""
    *section, name = _generic(path)
    siblings = {table.path[len(section)] for table in tables() if table.path[:-1] == tuple(section) and table.path}
    siblings |= {key.path[-1] for table in tables() if table.path == tuple(section) for key in table.keys}
    shown = [*path[:-1]]
    close = difflib.get_close_matches(name, sorted(siblings), n=3, cutoff=0.6)
    close.sort(
        key=lambda near: sorted(near) != sorted(name)
    )  # `prot` is a `port` with two letters swapped, not a `root`
    if close:
        return ".".join([*shown, close[0]])
    same_name = [key.dotted for key in keys().values() if key.path[-1] == name and key.path[0] not in NAMED_TABLES]
    return same_name[0] if same_name else None


def _generic(path: Sequence[str]) -> tuple[str, ...]:
    if len(path) > 1 and path[0] in NAMED_TABLES:
        return (path[0], ANY_NAME, *path[2:])
    return tuple(path)


@cache
def _field(path: tuple[str, ...]) -> FieldInfo | None:
    """The field of a key, None for tables and for what is unknown.

    Asks the models rather than their JSON Schema, which takes as long to make as all the rest of loading.
    """
    model: type[BaseModel] = Settings
    names = iter(path)
    for name in names:
        field = model.model_fields.get(name)
        if field is None:
            return None
        values = get_args(field.annotation)[-1:] if get_origin(field.annotation) is dict else ()
        below = next(
            (kind for kind in (field.annotation, *values) if isclass(kind) and issubclass(kind, BaseModel)), None
        )
        if below is None:
            return field if next(names, None) is None else None
        model = below
        if values:
            next(names, None)  # the name that the user gave
    return None


def _holds_a_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))


def _tables(schema: Mapping[str, Any], node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Table]:
    own: list[Key] = []
    below: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []
    for name, raw in node.get("properties", {}).items():
        child, where = _resolve(schema, raw), (*path, name)
        if "properties" in child:
            below.append((where, child))
        elif (values := _values_of_a_dict(schema, child)) is not None:
            below.append(((*where, ANY_NAME), values))
        else:
            own.append(
                Key(
                    path=where,
                    description=" ".join(str(raw.get("description", "")).split()),
                    default=raw.get("default"),
                    expected=expected(schema, raw),
                    secret="password" in _formats(raw),
                )
            )
    if own or path:
        yield Table(path=path, description=" ".join(str(node.get("description", "")).split()), keys=tuple(own))
    for where, child in below:
        yield from _tables(schema, child, where)


def _resolve(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in node:
        return node
    resolved: Mapping[str, Any] = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return resolved


def _values_of_a_dict(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The model of the values where this is a dict of models (`routes`), else None."""
    for values in [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]:
        if isinstance(values, Mapping):
            resolved = _resolve(schema, values)
            if "properties" in resolved:
                return resolved
    return None


def _formats(node: Mapping[str, Any]) -> list[str]:
    return [str(branch.get("format", "")) for branch in [node, *node.get("anyOf", [])]]


def expected(schema: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """What a JSON Schema node asks for, in words a person reads in an error message."""
    node = _resolve(schema, node)
    if "anyOf" in node:
        branches = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
        return " or ".join(expected(schema, branch) for branch in branches)
    if "enum" in node or "const" in node:
        choices = [f'"{choice}"' for choice in node.get("enum", [node.get("const")])]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    match node.get("type"):
        case "integer":
            return f"a whole number{_bounds(node)}"
        case "number":
            return f"a number{_bounds(node)}"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list, each item {expected(schema, node.get('items', {}))}"
        case "object":
            values = node.get("additionalProperties")
            return f"a table, each value {expected(schema, values)}" if isinstance(values, Mapping) else "a table"
        case "string" if "pattern" in node:
            pattern = str(node["pattern"])
            if "(/" in pattern:
                return "1 to 4 topic levels of letters, digits, _ . or -"
            return "1 to 64 letters, digits, _ . or -" if "{1,64}" in pattern else f"text that matches {pattern}"
        case "string":
            return "the path of a file" if node.get("format") == "path" else "text"
        case _:
            return "a value"


def _bounds(node: Mapping[str, Any]) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    above = node.get("exclusiveMinimum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    parts = []
    if above is not None:
        parts.append(f"above {_number(above)}")
    if low is not None:
        parts.append(f"of at least {_number(low)}")
    if high is not None:
        parts.append(f"up to {_number(high)}")
    return f" {' and '.join(parts)}" if parts else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values of nested tables with their paths; a list, and a table below a key (`fields`), count as one value."""
    if isinstance(value, Mapping) and _field(_generic(path)) is None and (value or not path):
        for name, child in value.items():
            yield from leaves(child, (*path, str(name)))
    elif path:
        yield path, value


def shown(path: Sequence[str], value: object, *, most: int = 80) -> str:
    """A value for a person: secrets hidden, long ones cut, never more than one line."""
    if value is None:
        return ""
    if is_secret(path):
        return MASK
    if isinstance(value, Path):
        value = str(value)
    text = toml_value(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def toml_value(value: object) -> str:
    """A value as it stands in a TOML file; a long or many-lined text stays one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return f"{value:.1f}"
        case int() | float():
            return str(value)
        case Mapping():
            return "{" + ", ".join(f"{_toml_key(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case _:
            return _quoted(str(value))


def _toml_key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "").replace("-", "").isalnum() else _quoted(name)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(named.get(c) or (c if c.isprintable() else _escape(c)) for c in escaped) + '"'


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
