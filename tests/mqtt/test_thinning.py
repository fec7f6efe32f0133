"""A flood at QoS 0 is thinned out, and nothing else is touched."""

from __future__ import annotations

import itertools
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.mqtt import buffered_socket, thinning
from llamacpp_mqtt_deploy.mqtt.buffered_socket import READ_BYTES, BufferedSocket
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient
from llamacpp_mqtt_deploy.mqtt.packets import publish_packet
from llamacpp_mqtt_deploy.mqtt.thinning import Thinning
from llamacpp_mqtt_deploy.ports import Delivery
from tests.support.certificates import Authority

PUBACK = b"\x40\x02\x00\x07"
HEAD_BYTES = 30
"""No topic of these tests ends behind it."""
MORE_THAN_CALM = thinning.CALM_MESSAGES + 1


def _publish(topic: str, payload: bytes = b"x", *, qos: int = 0, retain: bool = False) -> bytes:
    return publish_packet(
        topic.encode(), payload, qos=qos, retain=retain, dup=False, mid=9 if qos else 0, properties=b""
    )


def _flood(count: int, level: str = "flood") -> list[bytes]:
    return [_publish(f"llm/request/{level}/s{number}", b"%d" % number) for number in range(count)]


def _flooded(now: float = 0.0) -> Thinning:
    """In the middle of a flood: nothing is free any more."""
    found = Thinning(3)
    found.note_read(full=True, now=now)
    found.thinned(b"".join(_flood(thinning.FREE_MESSAGES)), now)
    return found


def test_a_read_that_brings_all_it_may_begins_it_and_calm_ends_it() -> None:
    found = Thinning(3)

    def after_a_read(*, full: bool, now: float) -> bool:
        found.note_read(full=full, now=now)
        return found.is_on

    assert [after_a_read(full=full, now=0.0) for full in (False, True)] == [False, True]
    found.thinned(b"".join(_flood(MORE_THAN_CALM)), 0.5)
    assert after_a_read(full=False, now=1.2), "that one brought many"
    found.thinned(b"".join(_flood(thinning.CALM_MESSAGES)), 1.2)
    assert not after_a_read(full=False, now=1.5)
    assert [after_a_read(full=True, now=now) for now in (2.0, 2.9, 3.8)] == [True] * 3
    assert [after_a_read(full=False, now=now) for now in (4.7, 4.8)] == [True, False], "the last of those was full"


def test_a_burst_that_the_inbox_has_places_for_is_not_thinned() -> None:
    found = Thinning(3)
    found.note_read(full=True, now=0.0)
    burst = b"".join(_flood(thinning.FREE_MESSAGES))
    assert found.thinned(burst, 0.0) == (burst, 0)
    assert found.dropped == 0


def test_of_each_client_some_messages_pass_and_of_all_together_not_many() -> None:
    found = _flooded()
    modest = [_publish("llm/request/modest/a"), _publish("llm/control/modest")]
    packets = [*_flood(500), modest[0], *_flood(500), modest[1]]
    left, _ = found.thinned(b"".join(packets), 1.0)
    kept = _flood(thinning.OF_OWNER_IN_WINDOW)
    assert left == b"".join([*kept, *modest])
    assert found.dropped == 1000 - len(kept)
    assert found.thinned(b"".join(_flood(10)), 1.0 + thinning.WINDOW_S / 2) == (b"", 0), "not with each read anew"
    assert found.thinned(b"".join(_flood(10)), 1.0 + thinning.WINDOW_S) == (b"".join(kept), 0)
    many = [_publish(f"llm/request/u{number}/s") for number in range(1000)]
    assert found.thinned(b"".join(many), 5.0)[0] == b"".join(many[: thinning.IN_WINDOW])


def test_what_was_dropped_is_told_once_with_a_topic() -> None:
    found = _flooded()
    found.thinned(b"".join(_flood(100, "ada")), 1.0)
    assert found.told() == (100 - thinning.OF_OWNER_IN_WINDOW, b"llm/request/ada/s99")
    assert found.told()[0] == 0
    assert found.dropped == 0


@pytest.mark.parametrize("seed", range(30))
def test_every_other_packet_stays_as_it_is_and_in_order(seed: int) -> None:
    chance = random.Random(seed)
    kinds: dict[str, Callable[[int], bytes]] = {
        "flood": lambda n: _publish(f"llm/request/flood/{n}", bytes(chance.randrange(300))),
        "large": lambda n: _publish(f"llm/request/flood/{n}", bytes(chance.randrange(20_000))),
        "qos 1": lambda n: _publish(f"llm/request/flood/{n}", bytes(chance.randrange(300)), qos=1),
        "retained": lambda n: _publish(f"llm/status/{n}", b"{}", retain=True),
        "puback": lambda _: PUBACK,
        "pingresp": lambda _: b"\xd0\x00",
        "suback": lambda n: b"\x90\x03\x00" + bytes([n % 256]) + b"\x01",
    }
    names = chance.choices(list(kinds), [60, 2, 10, 5, 20, 2, 2], k=300)
    packets = [kinds[name](number) for number, name in enumerate(names)]
    left, not_told = _read_in_pieces(_flooded(), packets, [chance.randrange(1, 30_000) for _ in range(300)])
    passed = []
    for name, packet in zip(names, packets, strict=True):
        if left.startswith(packet):
            left = left[len(packet) :]
            passed += [packet] if name in ("flood", "large") else []
        else:
            assert name in ("flood", "large"), "only of the flood something is missing"
    assert left == b""
    assert 1 <= len(passed) <= thinning.OF_OWNER_IN_WINDOW + not_told


def _read_in_pieces(found: Thinning, packets: list[bytes], sizes: list[int]) -> tuple[bytes, int]:
    """What is left of the packets where reads bring so many bytes each: what was dropped is skipped, and a packet that was begun is read
    to its end, before the next look. And how many were begun whose owner could not be told yet."""
    raw, left, skip, begun, at, not_told = b"".join(packets), b"", 0, 0, 0, 0
    ends = list(itertools.accumulate(map(len, packets)))
    for size in [*sizes, len(raw)]:
        piece = raw[at : at + size]
        at += len(piece)
        skipped = min(skip, len(piece))
        skip, piece = skip - skipped, piece[skipped:]
        left += piece[:begun]
        begun, piece = max(0, begun - len(piece)), piece[begun:]
        if piece:
            kept, skip = found.thinned(piece, 1.0)
            left += kept
            begun = 0 if skip else next(end for end in ends if end >= at) - at
            assert not skip or at + skip in ends, "to the end of a packet"
            not_told += begun > 0 and at - max((end for end in ends if end < at), default=0) < HEAD_BYTES
    assert (skip, begun) == (0, 0)
    return left, not_told


def test_a_large_message_is_dropped_before_it_is_read() -> None:
    found = _flooded()
    large = [_publish(f"llm/request/flood/s{number}", bytes(900_000)) for number in range(3)]
    assert found.thinned(large[0][:500_000], 1.0) == (large[0][:500_000], 0), "the first of a client passes"
    assert found.thinned(PUBACK + large[1][:500_000], 1.0) == (PUBACK, len(large[1]) - 500_000)
    assert found.dropped == 1
    assert found.thinned(large[2][:10], 1.0) == (large[2][:10], 0), "whose it is cannot be told yet"
    small = [_publish(f"llm/request/ada/s{number}", bytes(300_000)) for number in range(thinning.OF_OWNER_IN_WINDOW)]
    left, _ = found.thinned(b"".join(small), 1.0)
    assert left == b"".join(small[:3]), "so many bytes of one client"
    others = [_publish(f"llm/request/u{number}/s", bytes(900_000)) for number in range(10)]
    left, _ = found.thinned(b"".join(others), 1.0)
    assert left == b"".join(others[:3]), "and so many of all"


def test_a_burst_that_passes_is_bounded_in_bytes() -> None:
    found = Thinning(3)
    found.note_read(full=True, now=0.0)
    large = [_publish(f"llm/request/flood/s{number}", bytes(1_000_000)) for number in range(30)]
    left, _ = found.thinned(b"".join(large), 0.0)
    assert left == b"".join(large[:17]), "16 MiB, and the first of a client"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x30",
        b"\x30\x80",
        b"\x30\xff\xff\xff\xff\x01",
        b"\x30\x00",
        b"\x30\x01\x00",
        b"\x30\x02\x00\x09",
        b"\x30\x05\xff\xffabc",
        b"\x00\x00",
    ],
)
def test_what_is_no_packet_is_left_to_whoever_reads_it(raw: bytes) -> None:
    found = _flooded()
    assert found.thinned(PUBACK + raw, 1.0) == (PUBACK + raw, 0)


# --- a client that is flooded ------------------------------------------------------------------------------------------------


def _read_until_puback(sock: socket.socket) -> list[Delivery | paho.MQTTMessage]:
    """The messages that a client takes until the PUBACK behind the flood."""
    sock.setblocking(False)
    client = GatheringClient(CallbackAPIVersion.VERSION2, client_id="w", protocol=paho.MQTTv311)
    client.version = "3.1.1"
    client.buffered = client._sock = BufferedSocket(sock)
    client.buffered.thinning = Thinning(3)
    taken: list[Delivery | paho.MQTTMessage] = []
    mids: list[int] = []
    client.on_delivery = taken.append
    client.on_message = lambda _client, _data, message: taken.append(message)  # what no read brings whole
    client.on_puback = lambda mid, _code: mids.append(mid)
    until = time.monotonic() + 30
    while not mids:
        assert time.monotonic() < until
        client.read_some()
        if not client.holds_unread():
            select.select([sock], [], [], 1.0)
    assert mids == [7]
    return taken


def _sending(sock: socket.socket, flood: Sequence[bytes] = ()) -> threading.Thread:
    """Writes packet by packet, as brokers do."""

    def send() -> None:
        for packet in (*(flood or _flood(6 * thinning.FREE_MESSAGES)), _publish("llm/request/ada", qos=1), PUBACK):
            sock.sendall(packet)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection; what is written has room in it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * READ_BYTES)
        yield one, other


def test_a_flood_is_thinned_out_by_the_client_that_reads_it(tcp: tuple[socket.socket, socket.socket]) -> None:
    _sending(tcp[1]).join(30)  # it is all there before the first read
    taken = _read_until_puback(tcp[0])
    assert thinning.FREE_MESSAGES < len(taken) < 2 * thinning.FREE_MESSAGES
    assert taken[-1].topic == "llm/request/ada"


def test_of_large_messages_most_are_not_even_read(
    tcp: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffered_socket, "time", SimpleNamespace(monotonic=lambda: 0.0))  # all of it at one moment
    large = [_publish(f"llm/request/flood/s{number}", bytes(900_000)) for number in range(100)]
    _sending(tcp[1], large)
    *passed, last = _read_until_puback(tcp[0])
    # Of what passes free, and the client's first; had each to be read whole, all would have.
    assert 17 <= len(passed) <= 30
    assert {len(delivery.payload) for delivery in passed} == {900_000}, "whole ones"
    assert last.topic == "llm/request/ada"


def test_over_tls_records_are_gathered_and_the_flood_is_thinned_out(
    tcp: tuple[socket.socket, socket.socket], authority: Authority
) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*authority.issue("flooding"))
    trusting = ssl.create_default_context(cafile=str(authority.ca_file))
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(server.wrap_socket, tcp[1], server_side=True)
        with trusting.wrap_socket(tcp[0], server_hostname="127.0.0.1") as reader, accepting.result(30) as writer:
            _sending(writer).join(30)
            taken = _read_until_puback(reader)
    assert thinning.FREE_MESSAGES < len(taken) < 3 * thinning.FREE_MESSAGES
    assert taken[-1].topic == "llm/request/ada"
