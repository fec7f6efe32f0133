"""From untrusted bytes to a plain text or a JSON object, everything refused before anything recurses."""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import Any, NoReturn

import orjson

from llamacpp_mqtt_deploy.core.errors import BadRequest, PayloadTooLarge

MAX_DEPTH = 32
MAX_MARKS = 65536
"""Brackets and commas of an object; 2048 messages and 128 tools of 50 fields have half of that. Each of its values takes time in which
nobody else is served."""
"""Deepest nesting of objects and lists; every parser and serializer on the way recurses."""

MAX_NAME_SHOWN = 64
"""Characters of a client's own word that are repeated in an answer."""

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"

# A whole JSON string, or all that follows an unclosed quote. Possessive, so that no payload makes it backtrack.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

_NOT_MARKS = bytes(set(range(256)) - set(b"[]{},"))

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")

# The largest integers that the JSON writer of events, SQLite and most other languages can hold.
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1
_MAX_INT_CHARS = 20


def decode_payload(payload: bytes, *, max_bytes: int, left_out: int = 0) -> str | dict[str, Any] | None:
    """The content of a message: a text, a JSON object when its first non-blank byte is `{`, None when it is blank.
    `left_out`: it has so many bytes more, which are not here.

    An object that comes out has at most `MAX_DEPTH` levels and `MAX_MARKS` brackets and commas, no doubled key, no lone
    surrogate, and only numbers that are finite and fit 64 bits. Raises PayloadTooLarge and BadRequest; work is linear in the size of the payload.
    """
    if left_out or len(payload) > max_bytes:
        raise too_large(len(payload) + left_out, max_bytes)
    payload = payload.removeprefix(_BOM)
    if is_blank(payload):
        return None
    text = _decoded(payload)
    if not payload.lstrip(_BLANK).startswith(b"{"):
        return text
    if _has_too_many_marks(payload):
        raise _refused(f"more than {MAX_MARKS} brackets and commas", "a JSON object with fewer values")
    return _object(payload, text)


def too_large(size: int, max_bytes: int, **details: Any) -> PayloadTooLarge:
    """The refusal of a message that is longer than it may be."""
    return PayloadTooLarge(
        f"payload: {size} bytes, this worker takes at most {max_bytes}",
        fields={"payload": f"at most {max_bytes} bytes"},
        **details,
    )


def is_blank(payload: bytes) -> bool:
    """Whether it holds nothing but white space."""
    return not payload.removeprefix(_BOM).strip(_BLANK)


def shown(word: str) -> str:
    """A client's own word in quotes, short enough and printable, for a message that answers him."""
    clipped = word if len(word) <= MAX_NAME_SHOWN else word[:MAX_NAME_SHOWN] + "..."
    return json.dumps(clipped)


def nesting(payload: bytes) -> int:
    """How deep the objects and lists of a JSON text go; brackets in strings do not count."""
    brackets = _STRINGS.sub(b"", payload).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def marks(payload: bytes) -> int:
    """How many brackets and commas it has, those in strings included."""
    return len(payload.translate(None, _NOT_MARKS))


def _has_too_many_marks(payload: bytes) -> bool:
    """Whether a JSON text has more than `MAX_MARKS` outside of its strings, or more strings than go with them."""
    if len(payload) <= MAX_MARKS or (marks(payload) <= MAX_MARKS and payload.count(b'"') <= 4 * MAX_MARKS):
        return False  # as all but hostile ones, pictures included
    found = end = 0
    for number, string in enumerate(_STRINGS.finditer(payload)):
        found += marks(payload[end : string.start()])
        end = string.end()
        if found > MAX_MARKS or number > 2 * MAX_MARKS:
            return True
    return found + marks(payload[end:]) > MAX_MARKS


def _decoded(payload: bytes) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"not valid UTF-8 at byte {error.start}", "UTF-8 text") from None


def _object(payload: bytes, text: str) -> dict[str, Any]:
    found = _flat(payload)
    return _checked(payload, text) if found is None else found


def _flat(payload: bytes) -> dict[str, Any] | None:
    """The object where it is as simple as most are: nothing but texts and numbers in it. None when that is not sure.

    The general way takes two regular expressions and Python's own parser, which calls back for each object and number: 0.1 ms
    more of a request that comes to a worker at rest.
    """
    if b"\\\\" in payload:
        return None  # a quote behind two backslashes ends its text
    try:
        body: dict[str, Any] = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    quotes = 2 * len(body)
    for value in body.values():
        if type(value) is str:
            quotes += 2
        elif type(value) is float:
            if not 0.0 < abs(value) < _SURE_FLOAT:
                return None
        elif isinstance(value, dict | list):
            return None
    # A key that stands twice would have brought quotes that no entry accounts for.
    return body if payload.count(b'"') - payload.count(b'\\"') == quotes else None


_SURE_FLOAT = 2.0**53
"""From here on what is no fraction may be an integer that was too large."""


def _checked(payload: bytes, text: str) -> dict[str, Any]:
    if nesting(payload) > MAX_DEPTH:
        raise _refused(f"nested more than {MAX_DEPTH} levels deep", f"at most {MAX_DEPTH} levels of objects and lists")
    reader = _JsonReader()
    try:
        body = json.loads(
            text,
            object_pairs_hook=reader.pairs,
            parse_int=reader.integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as error:
        reason = f'begins with "{{" but is not valid JSON ({error.msg}, line {error.lineno} column {error.colno})'
        raise _refused(reason, "a JSON object, or a text that does not begin with {") from None
    assert isinstance(body, dict)
    if _SURROGATE_ESCAPE.search(payload):
        _check_surrogates(body)
    return body


def _check_surrogates(body: dict[str, Any]) -> None:
    # Pairs of escapes have become characters by now; only halves are left to fail.
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise _refused(
                f"half of a surrogate pair (a \\ud800 escape without its partner) in {shown(name)}",
                "text without lone surrogates",
                name=name,
            ) from None


_MISFIT = object()
"""Stands for a number that is too large, until the object around it refuses it."""


class _JsonReader:
    """The hooks of one reading: a number that is too large waits for the object around it, which knows its key."""

    def __init__(self) -> None:
        self._too_large: str | None = None

    def integer(self, digits: str) -> object:
        # Python raises ValueError of its own for more than 4300 digits, and takes quadratic time before.
        if len(digits) <= _MAX_INT_CHARS and _MIN_INT <= (number := int(digits)) <= _MAX_INT:
            return number
        self._too_large = self._too_large or digits
        return _MISFIT

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if self._too_large is not None:
            name = next((name for name, value in pairs if value is _MISFIT), None)
            where = f" in {shown(name)}" if name else ""
            reason = f"the number {self._too_large[:24]}...{where} is too large"
            raise _refused(reason, "whole numbers of at most 64 bits", name=name or "payload")
        if len(found) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise _refused(f"the key {shown(name)} stands twice in one object", "each key once", name=name)
                seen.add(name)
        return found


def _float(digits: str) -> float:
    number = float(digits)
    if math.isfinite(number):
        return number
    raise _refused(f"the number {digits[:24]} is too large", "numbers that fit a double")


def _constant(name: str) -> NoReturn:
    raise _refused(f"{name} is no JSON number", "finite numbers")


def _refused(reason: str, expected: str, *, name: str = "payload") -> BadRequest:
    # A name of the client's may hold half of a surrogate pair itself, which no event could carry.
    key = name[:MAX_NAME_SHOWN].encode("utf-8", "replace").decode()
    return BadRequest(f"payload: {reason}", fields={key: expected})
