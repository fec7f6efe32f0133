"""Messages that are longer than anybody takes: their beginning is told, the rest costs no memory, and nothing else is lost with it."""

from __future__ import annotations

import random
import socket
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.cutting import HEADER_BYTES, KEPT_PAYLOAD_BYTES, beginning_of, has_no_length
from llamacpp_mqtt_deploy.mqtt.packets import publish_packet
from llamacpp_mqtt_deploy.ports import Delivery
from tests.support.fed_wire import Connection, block, varint

LIMIT = 100_000
LONG = LIMIT + HEADER_BYTES
SUBACK = {"5": b"\x90\x04\x00\x05\x00\x01", "3.1.1": b"\x90\x03\x00\x05\x01"}
PUBACK = b"\x40\x02\x00\x09"


def publish(
    version: Version, payload: bytes, *, topic: bytes = b"r/s", qos: int = 1, mid: int = 7, said: bytes = b""
) -> bytes:
    properties = varint(len(said)) + said if version == "5" else b""
    return publish_packet(topic, payload, qos=qos, retain=False, dup=False, mid=mid, properties=properties)


def pieces_of(stream: bytes, sizes: Iterator[int]) -> Iterator[bytes]:
    at = 0
    while at < len(stream):
        size = next(sizes)
        yield stream[at : at + size]
        at += size


def messages(connection: Connection) -> list[Delivery]:
    return [event for event in connection.told.events if isinstance(event, Delivery)]


def read(listener: socket.socket, version: Version, stream: bytes, sizes: Iterator[int]) -> list[Any]:
    """What a wire tells of this stream, which it does not outlive in one piece: CONNACK left out."""
    with Connection(listener, version, max_incoming_bytes=lambda: LIMIT) as connection:
        for piece in pieces_of(stream, sizes):
            assert connection.feed(piece), (connection.problem, connection.wire.closed)
        return connection.told.events[1:]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize("seed", range(12))
def test_wherever_it_is_cut_all_packets_are_told_in_order(listener: socket.socket, version: Version, seed: int) -> None:
    chance = random.Random(seed)
    said = b"\x08" + block(b"answers/to") + b"\x09" + block(b"abc")
    packets: list[bytes] = []
    expected: list[Any] = []
    for number in range(8):
        length = LONG + chance.choice((1, 2, 70_000, 900_000))
        payload = chance.randbytes(1000) + bytes(length)
        qos = chance.randint(0, 1)
        packets.append(publish(version, payload, qos=qos, mid=number + 1, said=said))
        expected.append((payload, qos, number + 1))
        for _ in range(chance.randint(0, 3)):
            other = chance.choice((SUBACK[version], PUBACK, publish(version, b"short", qos=0)))
            packets.append(other)
            expected.append(other)

    def sizes() -> Iterator[int]:
        while True:
            yield chance.choice((1, 2, 3, 4, 5, 1000, 65_000, 65_000, 65_000, 65_000))

    told = read(listener, version, b"".join(packets), sizes())
    assert len(told) == len(expected)
    for event, wanted in zip(told, expected, strict=True):
        if not isinstance(wanted, tuple):
            continue
        payload, qos, mid = wanted
        assert event.topic == "r/s"
        assert event.left_out > 0, "it was not held as a whole"
        assert event.payload_bytes == len(payload)
        assert len(event.payload) >= KEPT_PAYLOAD_BYTES
        assert payload.startswith(event.payload)
        assert (event.qos, event.receipt) == (qos, (3, mid) if qos else None)
        if version == "5":
            assert (event.response_topic, event.correlation) == ("answers/to", b"abc")
    others = [(event, wanted) for event, wanted in zip(told, expected, strict=True) if not isinstance(wanted, tuple)]
    for event, wanted in others:
        if wanted == PUBACK:
            assert event == ("puback", 9, 0)
        elif wanted == SUBACK[version]:
            assert event == ("suback", 5, [(1, "Granted QoS 1")])
        else:
            assert (event.payload, event.left_out) == (b"short", 0)


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_length_that_comes_in_two_reads_is_no_way_around_it(listener: socket.socket, cut: int) -> None:
    packet = publish("3.1.1", bytes(3_000_000))
    with Connection(listener, "3.1.1", max_incoming_bytes=lambda: LIMIT) as connection:
        assert connection.feed(packet[:cut])
        for piece in pieces_of(packet[cut:], iter(lambda: 65_000, 0)):
            assert connection.feed(piece)
        assert [message.left_out > 0 for message in messages(connection)] == [True]


def test_what_anybody_takes_comes_whole(listener: socket.socket) -> None:
    payload = bytes(LIMIT - 1) + b"!"
    told = read(listener, "5", publish("5", payload), iter(lambda: 65_000, 0))
    assert [(event.payload == payload, event.left_out) for event in told] == [(True, 0)]


def test_a_limit_that_changes_holds_from_the_next_message_on(listener: socket.socket) -> None:
    limits = [10 * LONG]
    packet = publish("5", bytes(2 * LONG))
    with Connection(listener, "5", max_incoming_bytes=lambda: limits[-1]) as connection:
        for limit in (10 * LONG, LIMIT):
            limits.append(limit)
            for piece in pieces_of(packet, iter(lambda: 65_000, 0)):
                assert connection.feed(piece)
        assert [message.left_out > 0 for message in messages(connection)] == [False, True]


@pytest.mark.parametrize("said", [b"\x26" + block(b"k") + block(bytes(60_000))], ids=["user properties"])
def test_properties_that_fill_it_leave_its_topic_and_receipt(listener: socket.socket, said: bytes) -> None:
    packet = publish("5", b"x" * 1000, said=said * 20)
    told = read(listener, "5", packet + publish("5", b"next", mid=8), iter(lambda: 65_000, 0))
    assert [(each.topic, each.payload, each.receipt) for each in told] == [
        ("r/s", b"", (3, 7)),
        ("r/s", b"next", (3, 8)),
    ]
    assert told[0].left_out > 1_000_000


def test_a_topic_that_is_no_text_leaves_its_receipt(listener: socket.socket) -> None:
    told = read(listener, "5", publish("5", bytes(2 * LONG), topic=b"\xff\xfe"), iter(lambda: 65_000, 0))
    assert [(each.topic, each.receipt) for each in told] == [("�" * 2, (3, 7))]


def test_an_end_in_the_middle_is_told(listener: socket.socket) -> None:
    packet = publish("5", bytes(5 * LONG))
    for most in (3, 1000, LONG // 2, 2 * LONG):
        with Connection(listener, "5", max_incoming_bytes=lambda: LIMIT) as connection:
            for piece in pieces_of(packet[:most], iter(lambda: 65_000, 0)):
                assert connection.feed(piece)
            connection.broker.close()
            for _ in range(2):
                connection.wire.on_readable()
            assert connection.wire.closed is not None


def test_it_costs_no_more_memory_than_what_is_kept(listener: socket.socket) -> None:
    piece = bytes(65_000)
    start = publish("3.1.1", b"")[:1] + varint(250_000_000) + block(b"r/s") + b"\x00\x07"
    with Connection(listener, "3.1.1", max_incoming_bytes=lambda: LIMIT) as connection:
        tracemalloc.start()
        try:
            assert connection.feed(start)
            for _ in range(1000):
                assert connection.feed(piece)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        (message,) = messages(connection)
        assert message.payload_bytes == 250_000_000 - 7
    assert peak < 3_000_000


def test_while_the_rest_comes_the_broker_is_alive(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("paho.mqtt.client.time_func", lambda: clock[0])
    with Connection(listener, "5", keepalive_s=10, max_incoming_bytes=lambda: LIMIT) as connection:
        assert connection.feed(publish("5", bytes(100 * LONG))[:1000])
        for _ in range(20):
            clock[0] += 4.0
            assert connection.feed(bytes(60_000))
            connection.wire.on_time(clock[0])
            assert connection.wire.closed is None


def test_only_publishes_are_cut() -> None:
    long = varint(50 * LONG)
    assert beginning_of(memoryview(b"\x32" + long + bytes(100)), LIMIT) is not None
    for first in (0x90, 0x40, 0x34, 0x36, 0x20):
        assert beginning_of(memoryview(bytes([first]) + long + bytes(100)), LIMIT) is None
    for malformed in (b"\x30\xff\xff\xff\xff\xff", b"\x30\xff\xff", b"\x30", b""):
        assert beginning_of(memoryview(malformed), LIMIT) is None


def test_a_length_is_waited_for_only_where_one_may_come() -> None:
    for raw in (b"\x30", b"\x32\x80", b"\x3a\xff\xff\xff"):
        assert has_no_length(memoryview(raw))
    for raw in (b"", b"\x40", b"\x30\x05", b"\x30\x80\x01", b"\x30\xff\xff\xff\xff"):
        assert not has_no_length(memoryview(raw))
