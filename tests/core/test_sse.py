"""The decoder of server-sent events gives the same events at any cut."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.sse import EventTooLong, SseDecoder


def decode(*chunks: bytes) -> list[bytes]:
    decoder = SseDecoder()
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return events + decoder.end()


def naive(document: bytes) -> list[bytes]:
    """The whole document at once, straight from the standard but for events without text, which are none."""
    text = document.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events: list[bytes] = []
    data: list[bytes] = []
    for line in [*text.split(b"\n"), b""]:
        if not line:
            if b"".join(data).strip():
                events.append(b"\n".join(data))
            data = []
        elif line.split(b":")[0] in (b"data", b"error"):
            value = line.split(b":", 1)[1] if b":" in line else b""
            data.append(value[1:] if value.startswith(b" ") else value)
    return events


line_ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
values = st.one_of(
    st.text("aé漢😀\u2028\u2029\u0085\x0b{}: ", max_size=12).map(str.encode),
    st.binary(max_size=8).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b"")),
)
lines = st.one_of(
    values.map(lambda value: b"data: " + value),
    values.map(lambda value: b"data:" + value),
    values.map(lambda value: b"error: " + value),
    values.map(lambda value: b":" + value),
    values.map(lambda value: b"event: " + value),
    st.sampled_from([b"", b"", b"", b"data", b"id: 1", b"retry: 5", b"datax: 1", b" data: 1"]),
)
documents = st.builds(
    lambda bom, parts: bom + b"".join(line + end for line, end in parts),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(lines, line_ends), max_size=12),
)
simple_documents = st.lists(values, max_size=6).map(lambda all_: b"".join(b"data: " + v + b"\n\n" for v in all_))


def cut(document: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(document) + 1) for place in places), len(document)]
    return [document[start:end] for start, end in itertools.pairwise(marks)]


@given(st.one_of(documents, simple_documents), st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cut_gives_the_events_of_the_whole_document(document: bytes, places: list[int]) -> None:
    assert decode(*cut(document, places)) == naive(document)


@given(documents)
def test_single_bytes_give_the_events_of_the_whole_document(document: bytes) -> None:
    assert decode(*(bytes([byte]) for byte in document)) == naive(document)


def test_several_events_in_one_read_come_out_one_by_one() -> None:
    assert SseDecoder().feed(b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n') == [
        b'{"a":1}',
        b'{"b":2}',
        b"[DONE]",
    ]


def test_pings_give_nothing() -> None:
    assert decode(b":\n\n", b"data: 1\n\n:\n\n:\n\ndata: 2\n\n") == [b"1", b"2"]


@pytest.mark.parametrize(
    "ping",
    [b"data:\n\n", b"data: \n\n", b"data\n\n", b"data:   \n\n", b"event: ping\r\ndata:\r\n\r\n", b"data:\ndata:\n\n"],
)
def test_an_event_without_text_keeps_a_connection_open_and_gives_nothing(ping: bytes) -> None:
    document = ping + b"data: 1\n\n" + ping + b"data: 2\n\n" + ping.rstrip()
    assert decode(document) == [b"1", b"2"]
    assert decode(*(bytes([byte]) for byte in document)) == [b"1", b"2"]
    assert decode(ping, b"data: 1\n\ndata: 2\n\n", ping, ping) == [b"1", b"2"]


def test_lines_may_end_in_a_carriage_return_alone() -> None:
    assert SseDecoder().feed(b"data: a\rdata: b\n\n") == [b"a\nb"]


def test_lines_of_one_event_are_joined() -> None:
    assert decode(b"data: a\ndata: b\n\n") == [b"a\nb"]


def test_line_separators_of_unicode_stay_inside_their_event() -> None:
    payload = '{"content":"a\u2028b\u0085c"}'.encode()
    assert decode(b"data: " + payload + b"\n\n") == [payload]


def test_a_crlf_cut_in_two_ends_one_line() -> None:
    assert decode(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


def test_the_error_line_of_older_servers_is_an_event() -> None:
    assert decode(b'error: {"code":500}\n\n') == [b'{"code":500}']


def test_a_last_event_without_its_blank_line_still_counts() -> None:
    assert decode(b"data: [DONE]") == [b"[DONE]"]


@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize(
    "endless",
    [b"data: " + b"x" * 2000, b":" + b"x" * 2000, b"data: xxxxxxxxxx\n" * 200, b"data: " + b"x" * 2000 + b"\n\n"],
)
def test_an_event_without_end_is_refused_before_it_fills_the_memory(endless: bytes, size: int) -> None:
    decoder = SseDecoder(max_event_bytes=1000)
    chunks = [endless[start : start + size] for start in range(0, len(endless), size)]
    with pytest.raises(EventTooLong):
        deque(map(decoder.feed, chunks), maxlen=0)


def test_an_event_may_have_eight_mebibytes_where_nothing_else_is_said() -> None:
    most = 8 * 1024 * 1024
    for head in (b"", b": in a comment\n"):  # the way for whole events, and the general one
        value = b"x" * (most - len(b"data: \n\n") - len(head))
        assert SseDecoder().feed(head + b"data: " + value + b"\n\n") == [value]
    with pytest.raises(EventTooLong, match="8388608 bytes"):
        SseDecoder().feed(b"x" * (most + 1))
    decoder = SseDecoder()
    assert decoder.feed(b"x" * most) == []


def test_an_event_of_many_lines_is_bounded_by_their_sum_and_each_event_begins_anew() -> None:
    decoder = SseDecoder(max_event_bytes=20)
    for _ in range(5):
        assert decoder.feed(b"data: 0123456789\ndata:\n") == []
        assert decoder.feed(b"data: 0123456789\n") == []
        assert decoder.feed(b"\n") == [b"0123456789\n\n0123456789"]
    with pytest.raises(EventTooLong):
        decoder.feed(b"data: 0123456789\ndata: 0123456789x\n")


def test_it_is_known_whether_a_part_of_an_event_is_held() -> None:
    decoder = SseDecoder()
    assert decoder.between_events
    for part, between in (
        (b"da", False),
        (b"ta: a\n", False),
        (b"\n", True),
        (b": b\n", True),
        (b"\r", False),
        (b"\n", True),
    ):
        decoder.feed(part)
        assert decoder.between_events is between, part
    decoder.feed(b"data: [DONE]")
    assert decoder.end() == [b"[DONE]"]
    assert decoder.between_events
    assert decoder.end() == []


def test_a_mark_of_byte_order_counts_at_the_beginning_alone() -> None:
    mark = b"\xef\xbb\xbf"
    assert decode(mark + b"data: a\n\n") == [b"a"]
    assert decode(b"data: a\n\n" + mark + b"data: b\n\n") == [b"a"]
    assert decode(b"data: a\n\n", mark + b"data: b\n\n") == [b"a"]
    assert decode(b"\n", mark + b"data: b\n\n") == []
    assert decode(b"data: a\n" + mark + b"data: b\n\n") == [b"a"]
