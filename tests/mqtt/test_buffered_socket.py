"""The socket under paho: packets go out together, come in together, and the end of a connection is not hidden."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from llamacpp_mqtt_deploy.mqtt.buffered_socket import MOST_UNSENT_BYTES, BufferedSocket


@pytest.fixture
def ends() -> Iterator[tuple[BufferedSocket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        there.settimeout(10)
        yield BufferedSocket(here), there


Ends = tuple[BufferedSocket, socket.socket]


def test_packets_wait_for_the_flush_and_go_out_in_order(ends: Ends) -> None:
    buffered, there = ends
    assert (buffered.send(b"one "), buffered.send(bytearray(b"two"))) == (4, 3)
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(10)
    assert buffered.unsent
    assert buffered.flush()
    assert (there.recv(100), bytes(buffered.unsent)) == (b"one two", b"")


def test_what_a_full_socket_does_not_take_is_kept_and_bounded(ends: Ends) -> None:
    buffered, there = ends
    data = bytes(range(256)) * 1024
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += buffered.send(data)
            buffered.flush()
    assert buffered.unsent
    assert len(buffered.unsent) <= MOST_UNSENT_BYTES + len(data)
    received = b""
    while len(received) < sent:
        received += there.recv(1 << 20)
        buffered.flush()
    assert received == data * (sent // len(data))
    assert not buffered.unsent


def test_one_read_serves_many_small_ones_and_says_when_there_is_no_more(ends: Ends) -> None:
    buffered, there = ends
    there.sendall(b"abcdef")
    assert (buffered.recv(1), buffered.pending(), buffered.recv(2), buffered.recv(10)) == (b"a", 5, b"bc", b"def")
    there.sendall(b"later")
    with pytest.raises(BlockingIOError):  # the socket was dry when it was read; the loop says when it is not
        buffered.recv(1)
    buffered.is_dry = False
    assert buffered.recv(10) == b"later"


def test_the_end_of_the_connection_is_told(ends: Ends) -> None:
    buffered, there = ends
    there.sendall(b"x")
    there.close()
    assert buffered.recv(1) == b"x"
    with pytest.raises(BlockingIOError):
        buffered.recv(1)
    buffered.is_dry = False
    assert buffered.recv(1) == b""


def test_a_write_that_fails_is_told_to_whoever_reads_or_writes_next(ends: Ends) -> None:
    buffered, there = ends
    there.close()
    buffered.send(b"lost")
    assert not buffered.flush()
    with pytest.raises(OSError, match="Broken pipe"):
        buffered.recv(1)
    with pytest.raises(OSError, match="Broken pipe"):
        buffered.send(b"more")
    assert not buffered.unsent


def test_closing_writes_what_is_left(ends: Ends) -> None:
    buffered, there = ends
    buffered.send(b"farewell")
    buffered.close()
    assert (there.recv(100), there.recv(100)) == (b"farewell", b"")
