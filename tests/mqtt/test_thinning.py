"""A flood at QoS 0 is thinned out, and nothing else is touched."""

from __future__ import annotations

import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.mqtt import thinning
from llamacpp_mqtt_deploy.mqtt.buffered_socket import READ_BYTES, BufferedSocket
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient
from llamacpp_mqtt_deploy.mqtt.packets import publish_packet
from llamacpp_mqtt_deploy.mqtt.thinning import Thinning
from llamacpp_mqtt_deploy.ports import Delivery
from tests.support.certificates import Authority

PUBACK = b"\x40\x02\x00\x07"
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
    found, states = Thinning(3), []
    for full in (False, True):
        found.note_read(full=full, now=0.0)
        states.append(found.is_on)
    assert states == [False, True]
    found.thinned(b"".join(_flood(MORE_THAN_CALM)), 0.5)
    found.note_read(full=False, now=1.2)
    assert found.is_on, "that one brought many"
    found.thinned(b"".join(_flood(thinning.CALM_MESSAGES)), 1.2)
    found.note_read(full=True, now=1.5)
    assert not found.is_on


def test_a_burst_that_the_inbox_has_places_for_is_not_thinned() -> None:
    found = Thinning(3)
    found.note_read(full=True, now=0.0)
    burst = b"".join(_flood(thinning.FREE_MESSAGES))
    assert found.thinned(burst, 0.0) == burst
    assert found.dropped == 0


def test_of_each_client_some_messages_pass_and_of_all_together_not_many() -> None:
    found = _flooded()
    modest = [_publish("llm/request/modest/a"), _publish("llm/control/modest")]
    packets = [*_flood(500), modest[0], *_flood(500), modest[1]]
    left = found.thinned(b"".join(packets), 1.0)
    kept = _flood(thinning.OF_OWNER_IN_WINDOW)
    assert left == b"".join([*kept, *modest])
    assert found.dropped == 1000 - len(kept)
    assert found.thinned(b"".join(_flood(10)), 1.0 + thinning.WINDOW_S / 2) == b"", "not with each read anew"
    assert found.thinned(b"".join(_flood(10)), 1.0 + thinning.WINDOW_S) == b"".join(kept)
    many = [_publish(f"llm/request/u{number}/s") for number in range(1000)]
    assert found.thinned(b"".join(many), 5.0) == b"".join(many[: thinning.IN_WINDOW])


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
    names = chance.choices(list(kinds), [60, 1, 10, 5, 20, 2, 2], k=300)
    packets = [kinds[name](number) for number, name in enumerate(names)]
    raw = b"".join(packets)
    cut = len(raw) - chance.randrange(len(packets[-1]) + 1)
    whole = packets if cut == len(raw) else packets[:-1]
    found = _flooded()
    left = found.thinned(raw[:cut], 1.0)
    passed = 0
    expected = []
    for name, packet in zip(names, whole, strict=False):
        thinnable = name in ("flood", "large")
        passed += thinnable
        if not thinnable or passed <= thinning.OF_OWNER_IN_WINDOW:
            expected.append(packet)
    tail = raw[sum(map(len, whole)) : cut]
    assert left == b"".join(expected) + tail


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
    assert found.thinned(PUBACK + raw, 1.0) == PUBACK + raw


# --- a client that is flooded ------------------------------------------------------------------------------------------------


def _read_until_puback(sock: socket.socket) -> list[Delivery]:
    """The messages that a client takes until the PUBACK behind the flood."""
    sock.setblocking(False)
    client = GatheringClient(CallbackAPIVersion.VERSION2, client_id="w", protocol=paho.MQTTv311)
    client.version = "3.1.1"
    client.buffered = client._sock = BufferedSocket(sock)
    client.buffered.thinning = Thinning(3)
    taken: list[Delivery] = []
    mids: list[int] = []
    client.on_delivery = taken.append
    client.on_puback = lambda mid, _code: mids.append(mid)
    until = time.monotonic() + 30
    while not mids:
        assert time.monotonic() < until
        client.read_some()
        if not client.holds_unread():
            select.select([sock], [], [], 1.0)
    assert mids == [7]
    return taken


def _sending(sock: socket.socket) -> threading.Thread:
    """Writes packet by packet, as brokers do."""

    def send() -> None:
        for packet in (*_flood(6 * thinning.FREE_MESSAGES), _publish("llm/request/ada", qos=1), PUBACK):
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
