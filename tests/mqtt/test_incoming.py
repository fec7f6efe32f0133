"""Messages that come in: read without paho as paho reads them, and left to paho where they are rare or wrong."""

from __future__ import annotations

import gc
import socket
from collections.abc import Sequence
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.incoming import leading_publish
from llamacpp_mqtt_deploy.mqtt.packets import publish_packet
from llamacpp_mqtt_deploy.mqtt.session import Publish
from llamacpp_mqtt_deploy.ports import Delivery
from tests.support.fed_wire import Connection, block, varint

PINGRESP = b"\xd0\x00"
SUBACK = b"\x90\x04\x00\x05\x00\x01"
PUBREL = b"\x62\x02\x00\x07"


def told_of(listener: socket.socket, version: Version, pieces: Sequence[bytes], *, own_way: bool) -> tuple[Any, ...]:
    """All that the wire tells, answers and raises when it reads these pieces."""
    with Connection(listener, version, own_way=own_way) as connection:
        for piece in pieces:
            if not connection.feed(piece):
                break
        answers = b"" if connection.problem else connection.sent()
        return connection.told.events, connection.problem, connection.wire.closed, answers


# --- packets, most of them sound ---


TEXTS = st.text(max_size=12).map(str.encode) | st.sampled_from([b"a\0b", "\ufeff".encode(), b"\xff", b"\xed\xa0\x80"])
BLOCKS = TEXTS.map(block)
PROPERTIES: st.SearchStrategy[bytes] = st.one_of(
    st.integers(0, 2).map(lambda number: bytes((0x01, number))),
    st.binary(min_size=4, max_size=4).map(lambda raw: b"\x02" + raw),
    BLOCKS.map(lambda raw: b"\x03" + raw),
    BLOCKS.map(lambda raw: b"\x08" + raw),
    st.binary(max_size=70).map(lambda raw: b"\x09" + block(raw)),
    st.integers(0, 300_000).map(lambda number: b"\x0b" + varint(number)),
    st.tuples(BLOCKS, BLOCKS).map(lambda pair: b"\x26" + pair[0] + pair[1]),
    st.integers(0, 3).map(lambda alias: b"\x23" + alias.to_bytes(2, "big")),
)


@st.composite
def publishes(draw: st.DrawFn, version: Version) -> bytes:
    qos = draw(st.sampled_from([0, 1, 1, 1, 2]))
    properties = b""
    if version == "5":
        single: list[bytes] = draw(st.lists(PROPERTIES, max_size=5, unique_by=lambda each: each[0]))
        said = b"".join([*single, *draw(st.lists(PROPERTIES, max_size=1))])
        properties = varint(len(said)) + said
    topic = draw(TEXTS | st.just(b"llm/v1/request/r1"))
    packet = publish_packet(
        topic,
        draw(st.binary(max_size=40) | st.integers(0, 20_000).map(bytes)),
        qos=min(qos, 1),
        retain=draw(st.booleans()),
        dup=draw(st.booleans()),
        mid=draw(st.integers(0, 65_535)),
        properties=properties,
    )
    return packet if qos < 2 else bytes((packet[0] & 0xF9 | 0x04,)) + packet[1:]


def others(version: Version) -> st.SearchStrategy[bytes]:
    pubacks = st.integers(0, 65_535).map(lambda mid: b"\x40\x02" + mid.to_bytes(2, "big"))
    suback = b"\x90\x03\x00\x05\x01" if version == "3.1.1" else SUBACK
    return pubacks | st.sampled_from([PINGRESP, suback, PUBREL])


@st.composite
def pieces_of(draw: st.DrawFn, packets: st.SearchStrategy[bytes]) -> list[bytes]:
    """Packets, cut anywhere into what one read brings."""
    raw = b"".join(draw(st.lists(packets, min_size=1, max_size=6)))
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=4)))
    return [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@settings(deadline=None)
@given(data=st.data())
def test_messages_arrive_as_they_do_through_paho(
    listener: socket.socket, version: Version, data: st.DataObject
) -> None:
    pieces = data.draw(pieces_of(publishes(version) | others(version)))
    assert told_of(listener, version, pieces, own_way=True) == told_of(listener, version, pieces, own_way=False)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_packet_ends_as_it_does_through_paho(
    listener: socket.socket, version: Version, data: st.DataObject
) -> None:
    raw = bytearray(data.draw(publishes(version)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(raw) - 1, 60)))
        raw[at] = data.draw(st.integers(0, 255))
    after = data.draw(publishes(version) | st.just(b""))
    pieces = [bytes(raw), after]
    assert told_of(listener, version, pieces, own_way=True) == told_of(listener, version, pieces, own_way=False)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@settings(deadline=None)
@given(pieces=st.lists(st.binary(max_size=60), min_size=1, max_size=3))
@example(pieces=[b"\x00\x05", b"\x30\x05\x00\x01a\x00x"])
@example(pieces=[b"\x00", b"\x05\x30", b"\x05\x00\x01a\x00x"])
def test_bytes_without_sense_end_as_they_do_through_paho(
    listener: socket.socket, version: Version, pieces: list[bytes]
) -> None:
    assert told_of(listener, version, pieces, own_way=True) == told_of(listener, version, pieces, own_way=False)


# --- single cases ---

REQUEST = publish_packet(b"t", b"hi", qos=1, retain=False, dup=False, mid=7, properties=b"\x00")


def common(properties: bytes, *, topic: bytes = b"t") -> Delivery | None:
    """What is made of a message with these properties; None when it is left to paho."""
    raw = publish_packet(
        topic, b"hi", qos=1, retain=True, dup=True, mid=7, properties=varint(len(properties)) + properties
    )
    assert all(leading_publish(memoryview(raw[:size]), "5", 1.0, 3) is None for size in range(len(raw))), "not whole"
    found = leading_publish(memoryview(raw + REQUEST), "5", 1.0, 3)
    assert found is None or found[1] == len(raw)
    return found and found[0]


def test_the_properties_of_a_request_are_read_in_any_order() -> None:
    expected = Delivery(
        topic="t",
        payload=b"hi",
        qos=1,
        retain=True,
        received_at=1.0,
        response_topic="answers/to",
        correlation=b"\x00\x01",
        expiry_s=30.0,
        receipt=(3, 7),
    )
    asked = [b"\x08" + block(b"answers/to"), b"\x09" + block(b"\x00\x01"), b"\x02\x00\x00\x00\x1e"]
    beside = [b"\x01\x01", b"\x03" + block(b"application/json"), b"\x26" + block(b"a") + block(b"b"), b"\x0b\x80\x01"]
    assert common(b"".join([*asked, *beside, beside[2], beside[3]])) == expected
    assert common(b"".join([*reversed(beside), *reversed(asked)])) == expected


@pytest.mark.parametrize(
    "properties",
    [
        b"\x23\x00\x01",
        b"\x11\x00\x00\x00\x01",
        b"\x01\x02",
        b"\x01\x01\x01\x01",
        b"\x0b\x00",
        b"\x0b\x80\x80\x80\x80\x01",
        b"\x02\x00\x00",
        b"\x08\x00\x05abc",
        b"\x08\x00\x01\xff",
        b"\x09",
        b"\x83\x00\x00\x00",
    ],
    ids=[
        "topic alias",
        "of another packet",
        "format 2",
        "twice",
        "subscription 0",
        "number too long",
        "cut off",
        "too long",
        "no UTF-8",
        "empty",
        "kind in two bytes",
    ],
)
def test_what_is_rare_or_wrong_is_left_to_paho(properties: bytes) -> None:
    assert common(properties) is None


def test_a_topic_that_is_no_text_is_left_to_paho() -> None:
    assert common(b"", topic=b"\xff") is None


def test_a_common_message_does_without_paho_and_is_acknowledged_when_we_say_so(listener: socket.socket) -> None:
    with Connection(listener, "5") as connection:
        connection.wire._client.on_message = None
        assert connection.feed(b"\x40\x02\x00\x01" + REQUEST + b"\x40\x02\x00\x02")
        first, delivery, last = connection.told.events[1:]
        assert (first, last) == (("puback", 1, 0), ("puback", 2, 0))
        assert (delivery.topic, delivery.payload, delivery.receipt) == ("t", b"hi", (3, 7))
        assert connection.sent() == b""
        connection.wire.acknowledge(7)
        assert connection.sent() == b"\x40\x02\x00\x07"


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@given(mid=st.integers(1, 65535))
@settings(max_examples=20)
def test_an_acknowledgement_has_the_bytes_that_paho_would_send(
    listener: socket.socket, version: Version, mid: int
) -> None:
    with Connection(listener, version) as connection:
        connection.wire.acknowledge(mid)
        ours = connection.sent()
        connection.wire._client.ack(mid, 1)
        assert ours == connection.sent() != b""


def test_acknowledgements_keep_their_order_where_the_socket_takes_no_more(listener: socket.socket) -> None:
    """MQTT-4.6.0-2. What does not go to the socket at once waits with paho; what follows must not overtake it."""
    with Connection(listener, "5") as connection:
        wire, read = connection.wire, b""
        publish = Publish("t", b"x" * 70_000, 1, False, None, None, None)
        while wire.publish(publish, retain=False, expiry_s=None, flying=()) is not None:
            wire.on_writable()
        for mid in (1, 2, 3):
            wire.acknowledge(mid)
        while more := connection.sent():
            read += more
            if b"\x40\x02\x00\x01" not in read:
                wire.acknowledge(4)
        order = [read.find(b"\x40\x02\x00" + bytes([mid])) for mid in (1, 2, 3)]
        assert -1 not in order
        assert order == sorted(order)
        assert read.find(b"\x40\x02\x00\x04") > order[-1]


def test_messages_leave_nothing_to_the_garbage_collector(listener: socket.socket) -> None:
    with Connection(listener, "5") as connection:
        connection.feed(REQUEST)
        left: list[int] = []
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                for _ in range(20):
                    assert connection.feed(REQUEST)
                left.append(gc.collect())
        finally:
            gc.enable()
        # A thread that an earlier test has left behind may leave something once; these messages would do so each time.
        assert min(left) == 0
        assert len(connection.told.events) == 102


@pytest.mark.parametrize("coming", [REQUEST, b"\x40\x02\x00\x01"], ids=["messages", "acknowledgements"])
def test_a_broker_that_sends_is_alive_while_its_answer_to_a_ping_is_late(
    listener: socket.socket, coming: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(paho, "time_func", lambda: clock[0])
    with Connection(listener, "5", keepalive_s=10) as connection:
        for _ in range(9):
            clock[0] += 4.0
            connection.feed(coming)
            connection.wire.on_time(clock[0])
            assert connection.wire.closed is None
        assert b"\xc0\x00" in connection.sent()
        clock[0] += 30.0
        connection.wire.on_time(clock[0])
        assert connection.wire.closed is not None, "a broker that is silent for so long is gone"
