"""The framing of HTTP chunks comes off at any cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.core.transfer_coding import BadChunk, ChunkedDecoder, PlainBody


def _framed(bodies: list[bytes], extension: bytes = b"") -> bytes:
    chunks = [b"%x%s\r\n%s\r\n" % (len(body), extension, body) for body in bodies if body]
    return b"".join(chunks) + b"0\r\n\r\n"


@given(st.lists(st.binary(max_size=40), max_size=20), st.data(), st.sampled_from([b"", b";name=value", b" ; x"]))
def test_any_cut_gives_the_same_body(bodies: list[bytes], data: st.DataObject, extension: bytes) -> None:
    raw = _framed(bodies, extension)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    decoder = ChunkedDecoder()
    out = b"".join(decoder.feed(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True))
    assert out == b"".join(bodies)
    assert decoder.ended


@given(st.lists(st.binary(min_size=1, max_size=40) | st.just(b"x" * 2000) | st.just(b"\r\n3\r\n"), max_size=20))
def test_chunks_that_come_together_are_told_one_by_one(bodies: list[bytes]) -> None:
    decoder = ChunkedDecoder()
    assert decoder.parts(_framed(bodies)) == bodies
    assert decoder.ended


@pytest.mark.parametrize("raw", [b"xyz\r\n", b"-5\r\nhello\r\n", b"5\r\nhello!\r\n", b"\r\n", b"1_0\r\n", b"f" * 9000])
def test_what_is_no_chunk_is_refused(raw: bytes) -> None:
    with pytest.raises(BadChunk):
        ChunkedDecoder().feed(raw)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_body_or_a_refusal(raw: bytes) -> None:
    decoder = ChunkedDecoder()
    try:
        for at in range(len(raw)):
            decoder.feed(raw[at : at + 1])
    except BadChunk:
        pass


def _cut(raw: bytes, data: st.DataObject) -> list[bytes]:
    pieces = []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        pieces.append(raw[:size])
        raw = raw[size:]
    return pieces


@given(st.binary(max_size=50), st.binary(max_size=9), st.data())
def test_a_body_of_a_known_length_ends_there_at_any_cut(body: bytes, behind: bytes, data: st.DataObject) -> None:
    decoder = PlainBody(len(body))
    assert (decoder.ends_with_connection, decoder.ended) == (False, not body)
    found = b""
    for piece in _cut(body + behind, data):
        found += decoder.feed(piece)
        assert decoder.ended == (len(found) == len(body))
    assert found == body


def test_a_body_without_a_length_goes_on_until_the_connection_ends() -> None:
    decoder = PlainBody(None)
    assert [decoder.feed(piece) for piece in (b"one", b"", b"two")] == [b"one", b"", b"two"]
    assert (decoder.ends_with_connection, decoder.ended) == (True, False)
    assert not ChunkedDecoder().ends_with_connection


def test_a_size_may_have_sixteen_digits_and_its_line_eight_kibibytes() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"0" * 15 + b"3\r\nabc\r\n0\r\n\r\n") == b"abc"
    assert decoder.ended
    with pytest.raises(BadChunk, match="no size"):
        ChunkedDecoder().feed(b"0" * 16 + b"3\r\nabc")
    decoder = ChunkedDecoder()
    assert decoder.feed(b"3;" + b"x" * 8190) == b""
    assert decoder.feed(b"\r\nabc") == b"abc"
    decoder = ChunkedDecoder()
    decoder.feed(b"3;" + b"x" * 8190)
    with pytest.raises(BadChunk, match="without end"):
        decoder.feed(b"x")


def test_bytes_behind_the_end_of_a_body_are_left_alone() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"2\r\nab\r\n0\r\nnot a chunk") == b"ab"
    assert decoder.feed(b"5\r\nhello") == b""
    assert decoder.ended


def test_more_bytes_than_a_chunk_said_are_refused() -> None:
    with pytest.raises(BadChunk, match="more bytes"):
        ChunkedDecoder().feed(b"2\r\nabc\r\n")


def test_lines_may_end_without_a_carriage_return() -> None:
    decoder = ChunkedDecoder()
    assert [decoder.feed(part) for part in (b"2\nab", b"\n0", b"\n\n")] == [b"ab", b"", b""]
    assert decoder.ended
