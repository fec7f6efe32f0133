"""Malformed bytes are refused with a sentence, at once, and with no exception but ours."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core import payloads
from llamacpp_mqtt_deploy.core.errors import BadRequest, PayloadTooLarge
from llamacpp_mqtt_deploy.core.payloads import _checked, _flat, decode_payload, nesting, shown

MIB = 1024 * 1024
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)


def read(payload: bytes, max_bytes: int = MIB) -> object:
    return decode_payload(payload, max_bytes=max_bytes)


def refusal(payload: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read(payload)
    json.dumps(caught.value.details["fields"], ensure_ascii=False).encode()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
    return caught.value


@given(st.one_of(st.binary(), st.binary().map(b"{".__add__), st.text('{}[]"\\:,ud8a0 1e9nN').map(str.encode)))
def test_any_bytes_give_a_letter_or_a_refusal(payload: bytes) -> None:
    try:
        found = read(payload)
    except BadRequest as refused:
        found = refused.details["fields"]
        expected: tuple[type, ...] = (dict,)
    else:
        expected = (str, dict, type(None))
    assert isinstance(found, expected)
    json.dumps(found, ensure_ascii=False).encode()


@given(OBJECTS, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf", b" \r\n\t"]))
def test_an_object_comes_out_as_it_went_in(body: dict[str, object], escaped: bool, before: bytes) -> None:
    text = json.dumps(body, ensure_ascii=escaped)
    if nesting(text.encode()) <= 32:
        assert read(before + text.encode()) == body


@given(st.text())
def test_a_text_is_the_prompt_unless_it_begins_with_a_brace(text: str) -> None:
    payload = text.encode()
    if not text.strip(" \t\r\n"):
        assert read(payload) is None
    elif not text.lstrip(" \t\r\n").startswith("{") and not text.startswith("\ufeff"):
        assert read(payload) == text
        assert read(b"\xef\xbb\xbf" + payload) == text


@pytest.mark.parametrize("text", ["[1]", '"{}"', "null", "42", "<b>{}</b>", "héllo\0"])
def test_json_that_is_no_object_is_a_text(text: str) -> None:
    assert read(text.encode()) == text


@given(VALUES)
def test_nesting_is_counted_as_a_parser_would(value: object) -> None:
    def depth(value: object) -> int:
        if isinstance(value, list):
            return 1 + max(map(depth, value), default=0)
        return 1 + max(map(depth, value.values()), default=0) if isinstance(value, dict) else 0

    assert nesting(json.dumps(value).encode()) == depth(value)


def test_the_deepest_allowed_nesting_is_read_and_one_more_is_refused() -> None:
    assert isinstance(read(b'{"a":' + b"[" * 31 + b"]" * 31 + b"}"), dict)
    assert "nested" in refusal(b'{"a":' + b"[" * 32 + b"]" * 32 + b"}").message


BOMBS = {
    "brackets": b'{"a":' + b"[" * 1_000_000,
    "closed brackets": b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "braces": b'{"a":' * 160_000,
    "quotes": b"{" + b'"' * 1_000_000,
    "backslashes": b'{"' + b"\\" * 1_000_001,
    "escaped quotes": b'{"a":"' + b'\\"' * 500_000,
    "digits": b'{"a":' + b"9" * 1_000_000 + b"}",
    "exponent": b'{"a":1e' + b"9" * 1_000_000 + b"}",
    "flat brackets": b'{"a":[' + b"[]," * 330_000 + b"[]}",
    "blanks": b"{" + b" " * 1_000_000,
    "surrogates": b'{"a":"' + b"\\ud800" * 170_000 + b'"}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_payload_made_to_exhaust_the_parser_is_refused_at_once(name: str) -> None:
    started = time.process_time()
    refusal(BOMBS[name])
    assert time.process_time() - started < 5.0  # a quadratic way would take minutes


@pytest.mark.parametrize(
    "inner, marks",
    [
        (b"[[],[]]", 7),
        (b'[{"b":1},"c"]', 5),
        (b'"[{,}]"', 0),
        (b'["\\"[[[,","\\\\",[]]', 6),
        (b'"' + b",]" * 1000 + b'"', 0),
    ],
)
def test_brackets_and_commas_outside_of_strings_are_bounded(
    inner: bytes, marks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = b'{"a":' + inner + b"}" + b" " * 100
    whole = read(payload)
    monkeypatch.setattr(payloads, "MAX_MARKS", marks + 2)
    assert read(payload) == whole
    monkeypatch.setattr(payloads, "MAX_MARKS", marks + 1)
    with pytest.raises(BadRequest, match="brackets and commas"):
        read(payload)


def test_strings_are_bounded_with_what_must_stand_between_them_and_texts_are_not() -> None:
    with pytest.raises(BadRequest, match="brackets and commas"):
        read(b"{" + b'""' * 3 * payloads.MAX_MARKS + b"}")
    assert read(b"[" * 2 * payloads.MAX_MARKS) == "[" * 2 * payloads.MAX_MARKS


@pytest.mark.parametrize(
    "payload, words",
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"m":{"b":1,"b":1}}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":-1e999}', "too large"),
        (b'{"a":18446744073709551616}', "too large"),
        (b'{"a":-9223372036854775809}', "too large"),
        (b'{"a":"\\ud83d"}', "surrogate"),
        (b'{"a":["\\ude00\\ud83d"]}', "surrogate"),
        (b'{"a":{"\\uDFFF":1}}', "surrogate"),
        (b'{"\\ud800":1}', "surrogate"),
        (b'{"\\ud800":1,"\\ud800":1}', "twice"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (b"\xff\xfe{\x00", "UTF-8"),
        (b"caf\xe9", "UTF-8 at byte 3"),
        (b'{"a":1', "not valid JSON"),
        (b'{"a":1} x', "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        (b'{"a":"line\nline"}', "not valid JSON"),
        (b'{"a":01}', "not valid JSON"),
    ],
)
def test_what_json_forbids_is_refused_with_its_name(payload: bytes, words: str) -> None:
    assert words in refusal(payload).message


def test_a_pair_of_surrogate_escapes_is_one_character() -> None:
    assert read(b'{"a":"\\ud83d\\ude00 \\\\ud800"}') == {"a": "😀 \\ud800"}


def test_the_largest_numbers_are_read() -> None:
    assert read(b'{"a":[18446744073709551615,-9223372036854775808,1e308,-0]}') == {
        "a": [18446744073709551615, -9223372036854775808, 1e308, 0]
    }


def test_a_payload_over_the_limit_is_too_large() -> None:
    assert read(b"x" * 256, max_bytes=256) == "x" * 256
    with pytest.raises(PayloadTooLarge, match="257 bytes, this worker takes at most 256") as caught:
        read(b"x" * 257, max_bytes=256)
    assert caught.value.details["fields"] == {"payload": "at most 256 bytes"}


def test_a_clients_word_is_shown_short_and_printable() -> None:
    assert shown("a\n\ud800é") == '"a\\n\\ud800\\u00e9"'
    assert len(shown("x" * 1000)) < 100
    assert shown("x" * 64) == '"' + "x" * 64 + '"'
    assert shown("x" * 65) == '"' + "x" * 64 + '..."'


def test_a_refusal_repeats_the_beginning_of_a_number_and_of_a_name_only() -> None:
    refused = refusal(b'{"' + b"k" * 100 + b'":[' + b"8" * 40 + b"," + b"9" * 40 + b"]}")
    assert refused.message == f"payload: the number {'8' * 24}... is too large"
    named = refusal(b'{"' + b"k" * 100 + b'":' + b"9" * 40 + b"}")
    assert named.message == f'payload: the number {"9" * 24}... in "{"k" * 64}..." is too large'
    assert list(named.details["fields"]) == ["k" * 64]
    assert refusal(b'{"a":1' + b"0" * 400 + b".5}").message == f"payload: the number 1{'0' * 23} is too large"


def test_a_half_pair_is_named_by_its_field_and_a_key_that_stands_twice_by_itself() -> None:
    assert list(refusal(b'{"a":1,"b":"\\ud83d"}').details["fields"]) == ["b"]
    assert list(refusal(b'{"a":{"c":1,"b":1,"b":2}}').details["fields"]) == ["b"]


SIMPLE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SIMPLE = st.dictionaries(SIMPLE_TEXT, SCALARS, max_size=4)
NUMBERS = [
    "0",
    "-0",
    "-0.0",
    "0.0",
    "1e3",
    "1E400",
    "1e-400",
    "1.5",
    "007",
    "+1",
    "1.",
    "NaN",
    "Infinity",
    "true",
    "null",
]
BORDERS = [str(number) for number in (2**53, 2**64, 2**64 - 1, -(2**63), -(2**63) - 1, 10**400)]


@st.composite
def nearly_simple(draw: st.DrawFn) -> bytes:
    """An object as clients write them, with a key twice, odd numbers, odd blanks and broken bytes among them."""
    body, doubled = draw(SIMPLE), draw(st.booleans())
    text = json.dumps(body, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    if body and doubled:
        name = json.dumps(draw(st.sampled_from(sorted(body))), ensure_ascii=False)
        text = f"{text[:-1]}, {name}: {draw(st.sampled_from(NUMBERS + BORDERS))}}}"
    raw = bytearray(text.encode())
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(raw)))
        raw[place : place + draw(st.integers(0, 1))] = draw(
            st.binary(max_size=1) | st.sampled_from([b'"', b",", b"\\", b"{", b"\x7f"])
        )
    return bytes(raw)


@settings(max_examples=2000)
@given(nearly_simple())
def test_a_simple_object_is_read_as_all_others_are(payload: bytes) -> None:
    found = _flat(payload) if payload.lstrip().startswith(b"{") else None
    if found is not None:
        in_general = _checked(payload, payload.decode())
        assert found == in_general
        assert [*map(type, found.values())] == [*map(type, in_general.values())]
        assert [*found] == [*in_general]


def test_requests_of_everyday_take_the_short_way() -> None:
    assert _flat(b'{"prompt": "Hello, world", "max_tokens": 200, "temperature": 0.7, "new": true, "model": null}')
    assert _flat('{ "request_id" : "r1",\n "prompt": "Grüße {[\\" \\n \\u00e4 \\ud83d\\ude00" }'.encode())
    assert _flat(b'{"prompt": "a", "metadata": {"a": 1}}') is None, "not flat: the general way"
    assert _flat(b'{"prompt": "a", "prompt": "b"}') is None, "the general way refuses it"
