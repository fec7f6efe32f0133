"""MQTT over websockets: what goes in and out of frames, and over a socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from llamacpp_mqtt_deploy.mqtt.buffered_socket import MOST_UNSENT_BYTES, BufferedSocket
from llamacpp_mqtt_deploy.mqtt.websocket_frames import (
    MOST_CONTROL_BYTES,
    FrameError,
    Frames,
    closing,
    framed,
)

MOST_HELD_BYTES = 10 + MOST_CONTROL_BYTES


# --- frames ---


def _frame(opcode: int, data: bytes, *, fin: bool = True) -> bytes:
    return Frame(Opcode(opcode), data, fin=fin).serialize(mask=False, extensions=[])


def _read_as_server(raw: bytes) -> Frame:
    """What another implementation reads, which requires the mask."""
    reader = StreamReader()
    reader.feed_data(raw)
    reader.feed_eof()
    parser = Frame.parse(reader.read_exact, mask=True, max_size=None, extensions=[])
    try:
        while True:
            next(parser)
    except StopIteration as stop:
        assert not reader.buffer, "and nothing else"
        return cast("Frame", stop.value)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 125, 126, 65_535, 65_536, 300_001])
def test_another_implementation_reads_what_is_sent(size: int) -> None:
    data = bytes(number % 251 for number in range(size))
    frame = _read_as_server(framed(data))
    assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.BINARY, True, data)
    assert size < 3 or framed(data)[:-3] != framed(bytearray(data))[:-3], "a new mask for each"


def test_the_end_is_announced() -> None:
    frame = _read_as_server(closing())
    assert (frame.opcode, bytes(frame.data)) == (Opcode.CLOSE, b"\x03\xe8")


_PIECES = st.lists(
    st.one_of(
        st.tuples(st.just("whole"), st.binary(max_size=200)),
        st.tuples(st.just("large"), st.binary(min_size=1, max_size=3).map(lambda some: some * 25_000)),
        st.tuples(st.just("parts"), st.lists(st.binary(max_size=140), min_size=2, max_size=4)),
        st.tuples(st.just("ping"), st.binary(max_size=125)),
        st.tuples(st.just("pong"), st.binary(max_size=125)),
    ),
    max_size=8,
)


@given(pieces=_PIECES, cuts=st.lists(st.integers(1, 70_000), max_size=60), small=st.booleans())
def test_frames_are_read_however_they_are_cut(pieces: list[tuple[str, object]], cuts: list[int], small: bool) -> None:
    raw, carried, pings = b"", b"", []
    for kind, what in pieces:
        if kind == "parts":
            assert isinstance(what, list)
            for number, part in enumerate(what):
                raw += _frame(2 if number == 0 else 0, part, fin=number == len(what) - 1)
                raw += _frame(9, b"between")
                pings.append(b"between")
            carried += b"".join(what)
            continue
        assert isinstance(what, bytes)
        raw += _frame({"ping": 9, "pong": 10}.get(kind, 2), what)
        if kind == "ping":
            pings.append(what)
        elif kind != "pong":
            carried += what
    frames, read, answers = Frames(), b"", []
    for size in [*(cut % 7 + 1 if small else cut for cut in cuts), len(raw)]:
        read += frames.decoded(raw[:size])
        raw = raw[size:]
        assert len(frames._held) <= MOST_HELD_BYTES
        if reply := frames.reply():
            answers.append(bytes(_read_as_server(reply).data))
    assert read == carried
    assert answers[-1:] == pings[-1:]
    assert len(answers) <= len(pings)
    rest = iter(pings)
    assert all(answer in rest for answer in answers), "each answers a ping, in their order"


def test_the_end_is_seen_and_answered_once_all_before_it_is_read() -> None:
    frames = Frames(_frame(2, b"early"))
    assert frames.decoded(_frame(2, b"last") + _frame(8, b"\x03\xe9bye") + _frame(2, b"not any more")) == b"earlylast"
    assert frames.is_closed
    assert _read_as_server(frames.reply()).opcode == Opcode.CLOSE


@pytest.mark.parametrize(
    "raw",
    [
        _frame(1, b"text"),
        _frame(0, b"nothing to go on with"),
        _frame(2, b"one", fin=False) + _frame(2, b"another"),
        Frame(Opcode.BINARY, b"masked").serialize(mask=True, extensions=[]),
        b"\xc2\x01x",
        b"\x83\x01x",
        b"\x8b\x00",
        b"\x09\x01x",
        b"\x89\x7e\x00\x80" + b"x" * 128,
    ],
    ids=["text", "continuation", "order", "masked", "reserved", "opcode", "control", "ping-parts", "long-ping"],
)
def test_what_no_server_may_send_ends_the_connection(raw: bytes) -> None:
    with pytest.raises(FrameError):
        Frames().decoded(_frame(2, b"good") + raw)


# --- over a socket ---


Ends = tuple[BufferedSocket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    here, there = socket.socketpair()
    with here, there:
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        here.setblocking(False)
        there.settimeout(10)
        yield BufferedSocket(here, Frames()), there


def _again(buffered: BufferedSocket, size: int) -> bytes:
    buffered.is_dry = False  # as the loop says it
    return buffered.recv(size)


def test_packets_go_in_and_out_of_frames(ends: Ends) -> None:
    buffered, there = ends
    assert buffered.send(b"packet") == 6
    assert buffered.flush()
    assert bytes(_read_as_server(there.recv(100)).data) == b"packet"
    there.sendall(_frame(2, b"ab", fin=False) + _frame(0, b"cd")[:3])
    assert (buffered.recv(1), buffered.recv(10)) == (b"a", b"bc")
    there.sendall(b"d" + _frame(2, b"ef")[:1])
    assert _again(buffered, 10) == b"d"
    with pytest.raises(BlockingIOError):
        _again(buffered, 10)
    there.sendall(_frame(2, b"ef")[1:3])
    assert _again(buffered, 10) == b"e"


def test_a_head_alone_is_no_end_of_the_connection(ends: Ends) -> None:
    buffered, there = ends
    there.sendall(_frame(2, b"x")[:1])
    with pytest.raises(BlockingIOError):
        buffered.recv(1)
    assert buffered.take_pubacks() == []
    assert buffered.failure is None


def test_the_answer_to_a_ping_goes_behind_a_frame_that_is_written_in_part(ends: Ends) -> None:
    # paho writes it into that frame, and what follows is no websocket any more.
    buffered, there = ends
    big = b"x" * 100_000
    buffered.send(big)
    assert buffered.flush()
    assert buffered.unsent, "the socket took a part of it"
    there.sendall(_frame(9, b"there?") + _frame(2, b"m"))
    assert buffered.recv(1) == b"m"
    expected = len(framed(big)) + len(_frame(10, b"there?")) + 4
    raw = b""
    while len(raw) < expected:
        buffered.flush()
        raw += there.recv(1 << 20)
    first = len(framed(big))
    assert bytes(_read_as_server(raw[:first]).data) == big
    pong = _read_as_server(raw[first:])
    assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"there?")


def test_a_flood_of_pings_is_not_piled_up(ends: Ends) -> None:
    buffered, there = ends
    buffered.send(b"x" * 2 * MOST_UNSENT_BYTES)
    size = len(buffered.unsent)
    for _ in range(100):
        there.sendall(_frame(9, b"?" * 100) * 50)
        with pytest.raises(BlockingIOError):
            _again(buffered, 1)
    assert len(buffered.unsent) == size


def test_a_close_frame_ends_the_connection_and_is_answered(ends: Ends) -> None:
    buffered, there = ends
    there.sendall(_frame(2, b"last") + _frame(8, b"\x03\xe8"))
    assert (buffered.recv(10), buffered.recv(10), buffered.recv(10)) == (b"last", b"", b"")
    buffered.close()
    assert _read_as_server(there.recv(100)).opcode == Opcode.CLOSE


def test_closing_says_so_to_the_other_side(ends: Ends) -> None:
    buffered, there = ends
    buffered.send(b"farewell")
    buffered.close()
    raw = there.recv(100)
    assert bytes(_read_as_server(raw[:14]).data) == b"farewell"
    assert _read_as_server(raw[14:]).opcode == Opcode.CLOSE


def test_what_is_no_frame_is_told_to_whoever_reads_next(ends: Ends) -> None:
    buffered, there = ends
    there.sendall(_frame(1, b"text"))
    assert buffered.take_pubacks() == []
    assert not buffered.is_dry
    with pytest.raises(FrameError):
        buffered.recv(1)
