"""Request bodies made from the schemas of the gateway's OpenAPI document: valid ones, nearly valid ones, and wild ones."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

SECRET = "sECRet-wOrds-9f3b"
"""Stands in texts that are asked, and must never be in a log."""

_TEXTS = [
    "hello",
    "\x00",
    "\x7f\u200b",
    "\ud7ff\U0001f600",
    "<|im_end|>",
    "{{x}}",
    "'; DROP",
    "a" * 20_000,
    "\r\n\r\nGET /",
    "é" * 50,
]

WILD: list[Any] = [
    None, True, 0, -1, 1e308, 2**63, "", "x", "\x00", "\ud7ff\U0001f600", "<|im_end|>", "a" * 20_000, [], {}, [[]], [{}], [None],
    {"a": {"b": {"c": []}}}, [{"role": "user", "content": None}], [{"role": "robot", "content": "x"}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}],
]  # fmt: skip

BROKEN = [b"", b" ", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 3000, b'{"a":"\\ud800"}', b'{"a":' * 40 + b"1" + b"}" * 40]  # fmt: skip

_ALSO = ["messages", "prompt", "stream", "tools", "response_format", "stop", "timeout_s", "metadata", "x", "__proto__"]


def valid_body(schema: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A body that fits the schema; `model` is the worker's own, so that somebody serves it."""
    names = [*schema["required"], *(name for name in schema["properties"] if dice.random() < 0.3)]
    body = {name: _value(schema["properties"][name], dice) for name in names}
    return body | ({"model": "default"} if "model" in body else {})


def broken_body(schema: dict[str, Any], dice: random.Random) -> bytes:
    """A body with one fault: a field left out or of another type, or a text that is cut."""
    if dice.random() < 0.2:
        return dice.choice(BROKEN)
    body: dict[str, Any] = valid_body(schema, dice)
    match dice.randrange(3):
        case 0:
            body.pop(dice.choice(list(body)))
        case 1:
            body[dice.choice(list(schema["properties"]))] = dice.choice(WILD)
        case _:
            raw = json.dumps(body).encode()
            return raw[: dice.randrange(len(raw))]
    return json.dumps(body).encode("utf-8", "surrogatepass")


def wild_body(fields: Sequence[str], dice: random.Random) -> bytes:
    """Anything in fields that the schema knows, and in some that it does not."""
    if dice.random() < 0.1:
        return dice.choice(BROKEN)
    names = dice.sample([*fields, *_ALSO], k=dice.randint(1, 5))
    return json.dumps({name: dice.choice(WILD) for name in names}).encode("utf-8", "surrogatepass")


def _value(schema: dict[str, Any], dice: random.Random) -> Any:
    if "enum" in schema:
        return dice.choice(schema["enum"])
    kinds = schema["type"]
    match dice.choice(kinds) if isinstance(kinds, list) else kinds:
        case "null":
            return None
        case "string":
            return _text(schema, dice)
        case "boolean":
            return dice.random() < 0.5
        case "integer":
            return dice.choice(
                [schema["minimum"], schema["maximum"], dice.randint(schema["minimum"], schema["maximum"])]
            )
        case "number":
            least = schema.get("minimum", 0.001)
            return dice.choice([least, schema["maximum"], dice.uniform(least, schema["maximum"])])
        case "array":
            return [_value(schema["items"], dice) for _ in range(dice.randint(schema.get("minItems", 0), 3))]
        case "object":
            return {name: _value(part, dice) for name, part in schema["properties"].items()}
    raise AssertionError(f"a schema that no value is made for: {schema}")


def _text(schema: dict[str, Any], dice: random.Random) -> str:
    if "pattern" in schema:
        return "".join(dice.choices("abcXYZ019_.-", k=dice.choice([12, 33, 64])))
    if "maxLength" in schema:
        return "".join(dice.choices("abc/:", k=dice.randint(1, schema["maxLength"])))
    return dice.choice(_TEXTS) + SECRET
