"""The real link among real brokers: refusals, outages, poison, versions, transports."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from structlog.testing import capture_logs

from llamacpp_mqtt_deploy.config.credentials import mqtt_password
from llamacpp_mqtt_deploy.config.settings import MqttSettings, Settings
from llamacpp_mqtt_deploy.mqtt import receiving
from llamacpp_mqtt_deploy.mqtt.backoff import FIRST_PAUSE_S
from llamacpp_mqtt_deploy.mqtt.connection_thread import ConnectionThread
from llamacpp_mqtt_deploy.mqtt.gathering_client import GatheringClient
from llamacpp_mqtt_deploy.mqtt.link import MqttLink
from llamacpp_mqtt_deploy.mqtt.paho_wire import PahoWire
from llamacpp_mqtt_deploy.mqtt.sending import Sending
from llamacpp_mqtt_deploy.mqtt.session import STRIKES, Publish
from llamacpp_mqtt_deploy.ports import Delivery
from llamacpp_mqtt_deploy.stopping import Deadline
from tests.support.amqtt_broker import AmqttBroker
from tests.support.bus_client import BusClient
from tests.support.cable import PUBACK, Cable
from tests.support.certificates import Authority
from tests.support.link_case import LinkCase
from tests.support.mosquitto import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import eventually
from tests.support.websocket_proxy import WebsocketProxy

StartMosquitto = Callable[..., Mosquitto]
LayCable = Callable[[int], Cable]
NewCase = Callable[..., LinkCase]


@pytest.fixture
def new_case() -> Iterator[NewCase]:
    """Open a link: `new_case(port=1883, protocol="5")`; keywords are the `[mqtt]` settings and those of `LinkCase`."""
    cases: list[LinkCase] = []

    def new(
        *,
        wait: bool = True,
        acknowledges: bool = True,
        client_id: str = "link",
        password: str | Callable[[], str | None] | None = None,
        max_payload_bytes: int | None = None,
        max_incoming_bytes: Callable[[], int] | None = None,
        **settings: Any,
    ) -> LinkCase:
        settings = {"host": "127.0.0.1", "reconnect_max_s": 0.3} | settings
        link = MqttLink(
            MqttSettings(**settings),
            client_id=client_id,
            password=password,
            max_payload_bytes=max_payload_bytes,
            max_incoming_bytes=max_incoming_bytes,
        )
        case = LinkCase(link, acknowledges=acknowledges)
        cases.append(case)
        return case.open(wait=wait)

    yield new
    for case in cases:
        case.close(last_message=False, seconds=1.0)


def subscribed(case: LinkCase, topic_filter: str = "request/#") -> LinkCase:
    assert case.link.subscribe([(topic_filter, 1)], timeout_s=5) == {}
    return case


def detail(case: LinkCase, *words: str) -> str:
    """Wait until the link's detail holds all these words."""
    eventually(lambda: all(word in case.link.info().detail for word in words), 15.0)
    return case.link.info().detail


# --- refusals ---


def test_a_wrong_password_is_named_in_one_sentence_and_logged_once(
    start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto(users={"worker": "right"})
    with capture_logs() as lines:
        case = new_case(port=broker.port, username="worker", password="wrong", wait=False)
        detail(case, "mqtt.username", "mqtt.password")
        eventually(lambda: broker.log().count("not authorised") >= 4)
    assert case.link.info().state == "refused"
    assert [line["event"] for line in lines] == ["link.refused"]
    assert "wrong" not in str(lines)


def test_a_client_without_a_name_is_told_to_set_one(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto(users={"worker": "right"})
    detail(new_case(port=broker.port, protocol="3.1.1", wait=False), "mqtt.username")


def test_the_right_password_connects(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto(users={"worker": "right"})
    assert new_case(port=broker.port, username="worker", password="right").stays_online()


def test_the_link_waits_for_a_broker_that_is_not_there_yet(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto()
    broker.stop()
    case = new_case(port=broker.port, wait=False)
    detail(case, "Nothing listens")
    assert case.link.info().state == "connecting"
    broker.start()
    assert case.online().reconnects == 0


def test_an_unknown_name_is_named(new_case: NewCase) -> None:
    case = new_case(host="no-such-host.invalid", port=1883, wait=False)
    eventually(lambda: "no-such-host.invalid" in case.link.info().detail, 20.0)


def test_a_publish_that_the_acl_forbids_is_visible_on_mqtt_5(
    start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto(
        users={"worker": "w", "bob": "b"}, acl="user worker\ntopic write allowed/#\ntopic read request/#\n"
    )
    case = new_case(port=broker.port, username="worker", password="w")
    with capture_logs() as lines:
        assert case.publish("home/door/set", b"open") is False
        assert case.publish("allowed/x", b"fine") is True
        assert case.publish("home/door/set", b"open") is False
    refused = [line for line in lines if line["event"] == "publish.refused"]
    assert len(refused) == 1
    assert refused[0]["topic"] == "home/door/set"
    assert "ACL" in refused[0]["why"]


def test_a_stranger_on_the_port_is_no_broker(new_case: NewCase) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        case = new_case(port=server.getsockname()[1], wait=False)

        def greet() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n" + b"Connection: close\r\n" * 20)
                peer.recv(1000)

        thread = threading.Thread(target=greet, name="stranger")
        thread.start()
        detail(case, "does not speak MQTT")
        thread.join(5)
        case.close(last_message=False, seconds=0.1)


# --- TLS ---


def test_tls_with_a_client_certificate_connects(
    authority: Authority, start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto(tls=(authority.ca_file, *authority.issue("broker")), client_certificates=True)
    cert_file, key_file = authority.issue("worker", client=True)
    tls = {"enabled": True, "ca_file": authority.ca_file, "cert_file": cert_file, "key_file": key_file}
    case = new_case(port=broker.tls_port, tls=tls)
    assert case.publish("x", b"y" * 100_000)
    assert subscribed(case).link.info().protocol == "5"


@pytest.mark.parametrize(
    "server, trust, words",
    [
        ({"name": "client-less"}, True, ("asks for a client certificate", "mqtt.tls.cert_file")),
        ({"name": "stale", "expired": True}, True, ("expired",)),
        ({"name": "elsewhere", "address": "127.0.0.9"}, True, ("another",)),
        ({"name": "stranger"}, False, ("not trusted", "mqtt.tls.ca_file")),
    ],
    ids=["client-certificate", "expired", "name", "authority"],
)  # fmt: skip
def test_what_tls_refuses_is_said_in_a_sentence(
    authority: Authority, start_mosquitto: StartMosquitto, new_case: NewCase, tmp_path: Path,
    server: dict[str, Any], trust: bool, words: tuple[str, ...],
) -> None:  # fmt: skip
    broker = start_mosquitto(
        tls=(authority.ca_file, *authority.issue(**server)), client_certificates="client" in server["name"]
    )
    trusted = authority if trust else Authority(tmp_path / "other", "Other Authority")
    case = new_case(port=broker.tls_port, tls={"enabled": True, "ca_file": trusted.ca_file}, wait=False)
    detail(case, *words)
    assert case.link.info().state == "refused"


def test_the_systems_list_of_authorities_may_be_renewed_while_the_worker_runs(
    authority: Authority,
    start_mosquitto: StartMosquitto,
    new_case: NewCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = start_mosquitto(tls=(authority.ca_file, *authority.issue("broker")))
    old, listed = Authority(tmp_path / "old", "Old Authority").ca_file, tmp_path / "bundle.pem"
    listed.write_bytes(old.read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(listed))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    case = new_case(port=broker.tls_port, tls={"enabled": True}, wait=False)
    detail(case, "not trusted")
    listed.write_bytes(old.read_bytes() + authority.ca_file.read_bytes())
    case.online(30)


def test_an_insecure_link_connects_and_warns(
    authority: Authority, start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto(tls=(authority.ca_file, *authority.issue("insecure", address="127.0.0.9")))
    with capture_logs() as lines:
        new_case(port=broker.tls_port, tls={"enabled": True, "insecure": True})
    assert any(line["event"] == "link.insecure" and line["log_level"] == "warning" for line in lines)


def test_tls_on_a_plain_port_is_named(mosquitto: Mosquitto, new_case: NewCase) -> None:
    detail(new_case(port=mosquitto.port, tls={"enabled": True}, wait=False), "TLS", "mqtt.port")


def test_a_missing_tls_file_is_a_wrong_setting(tmp_path: Path) -> None:
    settings = MqttSettings(tls={"enabled": True, "ca_file": tmp_path / "none.pem"})
    with pytest.raises(ValueError, match=r"mqtt\.tls\.ca_file.*no such file"):
        MqttLink(settings, client_id="x")


# --- transports ---


def test_websockets_connect_and_carry_large_events_over_a_slow_line(
    start_mosquitto: StartMosquitto, new_case: NewCase, cable_to: LayCable
) -> None:
    broker = start_mosquitto(websockets=True)
    cable = cable_to(broker.websocket_port)
    case = new_case(port=cable.port, transport="websockets")
    with BusClient(broker.port) as client:
        client.subscribe("reply/#")
        # A stalled line fills the socket's buffer, so that a frame is written in part.
        cable.stall()
        for number in range(40):
            assert case.link.publish("reply/a", b"%06d" % number + b"x" * 300_000) == "queued"
        eventually(lambda: case.link.info().unacknowledged == 40)
        threading.Event().wait(0.3)
        cable.resume()
        assert [int(client.receive().payload[:6]) for _ in range(40)] == list(range(40))
    assert case.link.flush(Deadline(10))
    assert case.link.info().reconnects == 0


@pytest.mark.parametrize("protocol, tls", [("5", False), ("3.1.1", False), ("5", True)])
def test_a_websocket_cut_anywhere_with_pings_between_carries_everything_both_ways(
    mosquitto: Mosquitto, new_case: NewCase, authority: Authority, protocol: str, tls: bool
) -> None:
    certificate = authority.issue("proxy") if tls else None
    trust = {"enabled": True, "ca_file": authority.ca_file} if tls else {}
    with WebsocketProxy(mosquitto.port, certificate=certificate) as proxy, BusClient(mosquitto.port) as client:
        client.subscribe("reply/#")
        case = subscribed(new_case(port=proxy.port, transport="websockets", protocol=protocol, tls=trust))
        eventually(lambda: proxy.pongs > 2)
        for number in range(300):
            size = 20_000 if number % 50 == 0 else number
            client.publish("request/a", b"%06d" % number + b"x" * size, qos=1)
            assert case.link.publish("reply/a", b"%06d" % number + b"y" * size) == "queued"
        assert [int(client.receive().payload[:6]) for _ in range(300)] == list(range(300))
        assert [int(case.receive().payload[:6]) for _ in range(300)] == list(range(300))
        assert case.link.flush(Deadline(10))
        before = proxy.pongs
        eventually(lambda: proxy.pongs > before + 2)
        assert case.link.info().reconnects == 0
        case.close(last_message=False, seconds=1.0)
        eventually(lambda: proxy.ends)
        assert "1000" in proxy.ends[0], "it said goodbye"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_long_messages_through_tls_are_cut_and_what_lies_between_them_comes_whole(
    start_mosquitto: StartMosquitto, new_case: NewCase, authority: Authority, protocol: str
) -> None:
    broker = start_mosquitto(tls=(authority.ca_file, *authority.issue("broker")))
    trust = {"enabled": True, "ca_file": authority.ca_file}
    case = subscribed(new_case(port=broker.tls_port, protocol=protocol, tls=trust, max_incoming_bytes=lambda: 100_000))
    with BusClient(broker.port) as client:
        sizes = [3_000_000, 7, 20_000, 1_500_001, 0, 4_000_000, 99_999, 1]
        for qos in (0, 1):
            for size in sizes:
                client.publish("request/a", b"x" * size, qos=qos)
        for size in sizes * 2:
            found = case.receive()
            assert found.payload_bytes == size
            assert (found.left_out > 0) == (size > 1_000_000)
    assert case.link.info().reconnects == 0


def test_a_wrong_path_of_a_websocket_and_a_silent_port_are_named(mosquitto: Mosquitto, new_case: NewCase) -> None:
    with WebsocketProxy(mosquitto.port) as proxy:
        case = new_case(port=proxy.port, transport="websockets", websocket_path="/wrong", wait=False)
        detail(case, "404 Not Found", "mqtt.websocket_path")
        assert case.link.info().state == "refused"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        case = new_case(port=silent.getsockname()[1], transport="websockets", wait=False)
        detail(case, "did not answer within", "websocket")
        assert case.link.info().state in ("connecting", "lost")


def test_a_port_without_websockets_is_named(mosquitto: Mosquitto, new_case: NewCase) -> None:
    detail(new_case(port=mosquitto.port, transport="websockets", wait=False), "websocket")


def test_a_unix_socket_connects_and_a_missing_one_is_named(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto(unix=True)
    case = new_case(host=str(broker.unix_path), transport="unix")
    assert case.publish("x", b"1")
    missing = new_case(host="/nonexistent/m.sock", transport="unix", wait=False)
    detail(missing, "There is no socket /nonexistent/m.sock")


def test_the_socket_does_not_wait_for_full_packets(mosquitto: Mosquitto, new_case: NewCase) -> None:
    case = new_case(port=mosquitto.port)
    wire = case.link._connection._wire  # type: ignore[attr-defined]
    with socket.socket(fileno=os.dup(wire.fd)) as plain:
        assert plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


# --- versions ---


def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(amqtt_broker: AmqttBroker, new_case: NewCase) -> None:
    case = new_case(port=amqtt_broker.port, client_id="fallback")
    assert case.link.info().protocol == "3.1.1"
    assert case.publish("x", b"1")


def test_a_broker_that_says_it_knows_only_3_1_1_is_believed_at_once(new_case: NewCase, mosquitto: Mosquitto) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            first, _ = server.accept()
            with first:
                first.recv(1000)
                first.sendall(b"\x20\x02\x00\x01")
            second, _ = server.accept()
            with second:
                assert second.recv(1000)[8] == 4
                second.sendall(b"\x20\x02\x00\x00")
                second.recv(1000)

        thread = threading.Thread(target=answer, name="old-broker")
        thread.start()
        case = new_case(port=server.getsockname()[1])
        assert case.link.info().protocol == "3.1.1"
        case.close(last_message=False)
        thread.join(5)


def test_a_broker_that_is_only_starting_does_not_cost_us_mqtt_5(
    mosquitto: Mosquitto, new_case: NewCase, cable_to: LayCable
) -> None:
    cable = cable_to(mosquitto.port)
    case = new_case(port=cable.port, client_id="starting")
    cable.hang_up_at_once()
    cable.cut()
    case.lost()
    eventually(lambda: cable.connections >= 6)
    cable.hang_up_at_once(False)
    assert case.online().protocol == "5"


# --- outages ---


def test_a_restart_of_the_broker_is_survived(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto(persistence=True)
    case = subscribed(new_case(port=broker.port, acknowledges=False))
    with BusClient(broker.port) as client:
        for number in range(3):
            client.publish("request/a", str(number).encode())
    assert [case.receive().payload for _ in range(3)] == [b"0", b"1", b"2"]
    broker.restart()
    assert case.lost().state == "lost"
    case.online()
    assert [case.receive().payload for _ in range(3)] == [b"0", b"1", b"2"]


def test_an_old_receipt_acknowledges_nothing_after_a_restart_without_saved_state(
    start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto()
    case = subscribed(new_case(port=broker.port, acknowledges=False))
    with BusClient(broker.port) as client:
        client.publish("request/a", b"old")
    old = case.receive()
    broker.kill()
    broker.start()
    case.online()
    subscribed(case)
    with BusClient(broker.port) as client:
        client.publish("request/a", b"new")
    new = case.receive()
    # Packet ids begin at 1 again: the old receipt has the new message's id.
    assert old.receipt[1] == new.receipt[1]  # type: ignore[index]
    case.link.acknowledge(old)
    assert case.publish("x", b"after the old receipt")
    case.close(last_message=False)
    again = new_case(port=broker.port)
    assert again.receive().payload == b"new"


def test_events_published_while_the_broker_is_away_arrive_later(
    start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto()
    case = new_case(port=broker.port)
    broker.kill()
    case.lost()
    done: list[bool] = []
    for number in range(150):
        assert case.link.publish("reply/a", str(number).encode(), on_done=done.append) == "queued"
    assert case.link.publish("reply/a", b"qos 0", qos=0) == "full"
    assert case.link.publish("reply/+", b"a wildcard") == "unfit"
    assert not case.link.flush(Deadline(0.1))
    broker.start()
    assert case.link.flush(Deadline(15))
    eventually(lambda: done == [True] * 150)


def test_what_expired_while_waiting_is_not_published(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto()
    case = new_case(port=broker.port)
    broker.kill()
    case.lost()
    done: list[bool] = []
    assert case.link.publish("status", b"stale", expiry_s=1, on_done=done.append) == "queued"
    assert case.link.publish("status", b"fresh", expiry_s=60, on_done=done.append) == "queued"
    threading.Event().wait(1.0)
    broker.start()
    assert case.link.flush(Deadline(15))
    eventually(lambda: done == [False, True])


def test_a_connection_that_hangs_half_open_is_noticed(
    mosquitto: Mosquitto, new_case: NewCase, cable_to: LayCable
) -> None:
    cable = cable_to(mosquitto.port)
    case = new_case(port=cable.port, client_id="half-open", keepalive_s=5)
    cable.stall()
    assert case.lost(20).state == "lost"
    cable.cut()
    cable.resume()
    case.online()


def test_a_flood_that_overruns_the_inbox_again_and_again_is_not_paused_for_longer_each_time(
    mosquitto: Mosquitto, new_case: NewCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    pause = ConnectionThread._pause

    def recorded(thread: ConnectionThread, seconds: float) -> None:
        pauses.append(seconds)
        pause(thread, min(seconds, 0.1))

    monkeypatch.setattr(ConnectionThread, "_pause", recorded)
    monkeypatch.setattr(receiving, "STALL_S", 0.05)
    case = new_case(port=mosquitto.port, client_id="overrun")
    refused: set[bytes] = set()

    def take(delivery: Delivery) -> bool:
        if delivery.payload not in refused and not delivery.payload.endswith(b"9"):
            return case._take(delivery)
        full = delivery.payload not in refused
        refused.add(delivery.payload)
        return not full and case._take(delivery)

    case.take = take
    subscribed(case, "overrun/#")
    with BusClient(mosquitto.port) as client:
        for number in range(70):
            client.publish("overrun/a", str(number).encode())
        assert [int(case.receive(15).payload) for _ in range(70)] == list(range(70))
    assert len(refused) == 7
    assert len(pauses) >= 7
    assert max(pauses) <= FIRST_PAUSE_S


def test_a_password_that_is_renewed_in_its_file_is_used_at_the_next_attempt(
    start_mosquitto: StartMosquitto, new_case: NewCase, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("old\n")
    settings = Settings(mqtt=MqttSettings(password_file=file))
    old, new = start_mosquitto(users={"worker": "old"}), start_mosquitto(users={"worker": "new"})
    new.stop()
    case = new_case(port=old.port, username="worker", password=lambda: mqtt_password(settings))
    case.link.publish("events/a", b"1")
    old.stop()
    case.lost()
    case.link.publish("events/a", b"2")
    new.port = old.port
    new.start()
    detail(case, "password_file")
    file.unlink()  # renewed by deleting and writing: nothing there for a moment
    eventually(lambda: case.link.info().state == "refused")
    file.write_text("new\n")
    case.online()
    assert case.link.flush(Deadline(10))


def test_a_certificate_that_is_renewed_on_disk_is_used_at_the_next_attempt(
    start_mosquitto: StartMosquitto, new_case: NewCase, tmp_path: Path
) -> None:
    first, second = Authority(tmp_path / "first", "First"), Authority(tmp_path / "second", "Second")
    mine = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]

    def take(authority: Authority) -> None:
        for path, found in zip(mine, (authority.ca_file, *authority.issue("worker", client=True)), strict=True):
            path.write_bytes(found.read_bytes())

    take(first)
    broker = start_mosquitto(tls=(first.ca_file, *first.issue("broker")), client_certificates=True)
    tls = dict(zip(("ca_file", "cert_file", "key_file"), mine, strict=True)) | {"enabled": True}
    case = new_case(port=broker.tls_port, tls=tls)
    broker.stop()
    case.lost()
    renewed = start_mosquitto(tls=(second.ca_file, *second.issue("broker")), client_certificates=True)
    renewed.stop()
    renewed.tls_port = broker.tls_port
    renewed.start()
    detail(case, "not trusted")
    take(second)
    case.online()
    assert case.publish("x", b"y")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_events_that_a_living_connection_does_not_acknowledge_are_sent_again_on_a_new_one(
    mosquitto: Mosquitto, new_case: NewCase, cable_to: LayCable, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.mqtt.connection_thread.PUBACK_TIMEOUT_S", 1.0)
    cable = cable_to(mosquitto.port)
    client = BusClient(mosquitto.port)
    client.subscribe("events/#")
    case = new_case(port=cable.port, protocol=protocol)
    cable.eat(PUBACK)
    done: list[bool] = []
    for number in range(3):
        case.link.publish("events/a", str(number).encode(), on_done=done.append)
    eventually(lambda: cable.eaten == 3)
    assert not done
    cable.eat()
    lost = case.lost()
    assert "acknowledged" in lost.detail
    case.online()
    eventually(lambda: done == [True] * 3)
    assert case.link.info().unacknowledged == 0
    assert [client.receive().payload for _ in range(6)] == [b"0", b"1", b"2"] * 2, "sent again, in order"
    client.close()


def test_pubacks_that_never_come_give_up_no_event(
    mosquitto: Mosquitto, new_case: NewCase, cable_to: LayCable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamacpp_mqtt_deploy.mqtt.connection_thread.PUBACK_TIMEOUT_S", 0.5)
    cable = cable_to(mosquitto.port)
    case = new_case(port=cable.port)
    cable.eat(PUBACK)
    done: list[bool] = []
    case.link.publish("events/a", b"x", on_done=done.append)
    for _ in range(STRIKES + 2):
        case.lost()
        case.online()
    assert case.link.info().poisoned == 0
    cable.eat()
    eventually(lambda: done == [True])


def test_a_frozen_broker_does_not_hold_up_closing(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto()
    case = new_case(port=broker.port)
    broker.freeze()
    assert case.link.publish("x", b"1") == "queued"
    began = time.monotonic()
    case.close(seconds=1.0)
    assert time.monotonic() - began < 4.0
    assert case.link.info().state == "closed"
    broker.thaw()


def test_closing_while_no_broker_is_there_is_quick(new_case: NewCase) -> None:
    case = new_case(port=free_port(), wait=False)
    assert case.link.publish("x", b"1") == "queued"
    began = time.monotonic()
    case.close(seconds=30.0)
    assert time.monotonic() - began < 4.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_link_thread_is_started_again_when_it_dies(mosquitto: Mosquitto, new_case: NewCase) -> None:
    case = new_case(port=mosquitto.port, client_id="mortal")

    def die(delivery: Delivery) -> bool:
        raise SystemExit

    case.take = die
    subscribed(case, "mortal/#")
    with BusClient(mosquitto.port) as client:
        client.publish("mortal/a", b"x")
        thread = case.link._connection._thread  # type: ignore[attr-defined]
        thread.join(10)
        assert not thread.is_alive()
        case.take = case._take
        assert case.link.info().state == "dead"
        assert case.lost().state == "dead"
        case.online()
        subscribed(case, "mortal/#")
        assert case.receive().payload == b"x"
        assert case.publish("x", b"1")


def test_a_defect_inside_the_link_does_not_end_it(
    mosquitto: Mosquitto, new_case: NewCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = new_case(port=mosquitto.port, client_id="defect")
    original = Sending.pump
    hits: list[int] = []

    def broken(self: Sending, wire: Any) -> None:
        if not hits:
            hits.append(1)
            raise RuntimeError("a defect")
        original(self, wire)

    monkeypatch.setattr(Sending, "pump", broken)
    assert case.publish("x", b"1")
    assert hits
    assert case.lost().state == "lost"


def test_a_publish_survives_a_client_that_raises_on_it(
    mosquitto: Mosquitto, new_case: NewCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = new_case(port=mosquitto.port, client_id="raises")
    original, faults = PahoWire.publish, [struct.error("a defect"), RuntimeError("another")]

    def broken(self: PahoWire, publish: Publish, **more: Any) -> int | None:
        if publish.payload == b"2" and faults:
            raise faults.pop(0)
        return original(self, publish, **more)

    monkeypatch.setattr(PahoWire, "publish", broken)
    done: dict[int, bool] = {}
    for number in range(5):
        on_done = functools.partial(done.__setitem__, number)
        assert case.link.publish("x", str(number).encode(), on_done=on_done) == "queued"
    assert case.link.flush(Deadline(15))
    eventually(lambda: done == dict.fromkeys(range(5), True))
    assert not faults
    assert case.until("online").reconnects == 2


# --- poison ---


def test_an_event_over_a_limit_that_the_broker_does_not_announce_is_refused_alone(
    start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    case = new_case(port=start_mosquitto(settings=["message_size_limit 1000"]).port)
    with capture_logs() as lines:
        assert case.publish("reply/a", b"x" * 5000) is False
    assert ["max_event_bytes" in line["why"] for line in lines] == [True]
    assert case.publish("reply/a", b"still here") is True
    assert case.link.info().reconnects == 0


def _unreadable_refusals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A client that hangs up on the PUBACK with which mosquitto refuses a large event, as paho's own reader does."""
    original = GatheringClient._packet_handle

    def handle(self: Any) -> Any:
        refused = self._in_packet["command"] == 0x40 and self._in_packet["packet"][2:3] == b"\x95"
        return paho.MQTT_ERR_PROTOCOL if refused else original(self)

    monkeypatch.setattr(GatheringClient, "_packet_handle", handle)
    return ["message_size_limit 1000"]


def _hidden_limit(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A broker that hangs up on a large event."""
    original = ConnectionThread.connack
    monkeypatch.setattr(
        ConnectionThread,
        "connack",
        lambda self, answer: original(self, dataclasses.replace(answer, max_packet_bytes=None)),
    )
    return ["max_packet_size 1000"]


@pytest.mark.parametrize("limit", [_unreadable_refusals, _hidden_limit])
def test_events_on_which_the_connection_breaks_are_given_up_and_no_others(
    start_mosquitto: StartMosquitto, new_case: NewCase, monkeypatch: pytest.MonkeyPatch,
    limit: Callable[[pytest.MonkeyPatch], list[str]],
) -> None:  # fmt: skip
    broker = start_mosquitto(settings=limit(monkeypatch))
    case = new_case(port=broker.port)
    done: dict[str, bool] = {}
    with BusClient(broker.port) as client, capture_logs() as lines:
        client.subscribe("reply/#")
        for number in range(60):
            name = f"{number:02}"
            payload = name.encode() + (b"x" * 5000 if number in (20, 40) else b"")
            assert case.link.publish("reply/a", payload, on_done=functools.partial(done.__setitem__, name)) == "queued"
        eventually(lambda: len(done) == 60, 30)
        found: list[bytes] = []
        while len(set(found)) < 58:
            found.append(bytes(client.receive().payload))
    assert {name for name, well in done.items() if not well} == {"20", "40"}
    first_seen = list(dict.fromkeys(found))
    assert first_seen == [f"{n:02}".encode() for n in range(60) if n not in (20, 40)]
    info = case.link.info()
    assert (info.poisoned, info.protocol) == (2, "5")
    given_up = [line for line in lines if line["event"] == "publish.given_up"]
    assert [line["bytes"] for line in given_up] == [5002, 5002]
    assert case.publish("reply/a", b"still here")


def test_a_limit_that_the_broker_announces_refuses_before_sending(
    start_mosquitto: StartMosquitto, new_case: NewCase
) -> None:
    broker = start_mosquitto(settings=["max_packet_size 4096"])
    case = new_case(port=broker.port)
    limit = case.link.max_payload_bytes()
    assert limit == case.link.info().max_payload_bytes
    assert limit is not None
    assert 2048 < limit < 4096
    assert case.publish("reply/a", b"x" * limit)
    assert case.link.publish("reply/a", b"x" * 4096) == "unfit"
    assert case.link.info().reconnects == 0


def test_a_configured_limit_refuses_before_sending(mosquitto: Mosquitto, new_case: NewCase) -> None:
    case = new_case(port=mosquitto.port, client_id="limited", max_payload_bytes=100)
    assert case.link.publish("x", b"x" * 101) == "unfit"
    assert case.publish("x", b"x" * 100)


def test_restarts_of_the_broker_give_up_no_event(mosquitto: Mosquitto, new_case: NewCase, cable_to: LayCable) -> None:
    cable = cable_to(mosquitto.port)
    case = new_case(port=cable.port, client_id="unlucky")
    for _ in range(8):
        cable.stall()
        assert case.link.publish("reply/a", b"x") == "queued"
        cable.cut()
        cable.resume()
        case.lost()
        case.online()
    assert case.link.flush(Deadline(10))
    assert case.link.info().poisoned == 0


def test_a_byte_order_mark_in_a_property_does_not_silence_the_worker(mosquitto: Mosquitto, new_case: NewCase) -> None:
    case = subscribed(new_case(port=mosquitto.port, client_id="bom", protocol="5"), "bom/#")
    with BusClient(mosquitto.port) as client:
        client.publish("bom/a", b"1", UserProperty=("a", "\ufeff"), ResponseTopic="\ufeffr")
        client.publish("bom/a", b"2")
    first = case.receive()
    assert (first.payload, first.response_topic) == (b"1", "\ufeffr")
    assert case.receive().payload == b"2"
    assert case.link.info().reconnects == 0


# --- windows and takeovers ---


def test_a_small_window_of_the_broker_is_respected(start_mosquitto: StartMosquitto, new_case: NewCase) -> None:
    broker = start_mosquitto(settings=["max_inflight_messages 3"])
    case = new_case(port=broker.port)
    assert case.link._connection._outgoing.window == 3  # type: ignore[attr-defined]
    broker.freeze()
    for number in range(20):
        assert case.link.publish("reply/a", str(number).encode()) == "queued"
    eventually(lambda: len(case.link._connection._outgoing.flying) == 3)  # type: ignore[attr-defined]
    broker.thaw()
    assert case.link.flush(Deadline(10))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_being_pushed_off_again_and_again_is_said_and_leaves_the_broker_in_peace(
    mosquitto: Mosquitto, new_case: NewCase, protocol: str
) -> None:
    """Mosquitto 2.0.11 gives the one that is pushed off no reason."""
    client_id = f"wanted-{protocol}"
    case = new_case(port=mosquitto.port, protocol=protocol, client_id=client_id, reconnect_max_s=10.0)
    began_at = time.monotonic()
    with capture_logs() as lines:
        for _ in range(5):
            with BusClient(mosquitto.port, client_id=client_id):
                case.lost()
            case.online()
    assert time.monotonic() - began_at > (0.1 + 0.2 + 0.4 + 0.8 + 1.6) / 2, "the pauses grow"
    told = [line["why"] for line in lines if line["event"] == "link.lost" and client_id in line["why"]]
    assert told, lines
    assert "another client" in told[0]


def test_being_taken_over_is_final_on_a_broker_that_says_so(new_case: NewCase) -> None:
    connections = 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1.0)

        def answer() -> None:
            nonlocal connections
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                connections += 1
                peer.sendall(b"\x20\x03\x00\x00\x00" + b"\xe0\x02\x8e\x00")
                peer.recv(1000)
            try:
                server.accept()
                connections += 1
            except TimeoutError:
                pass

        thread = threading.Thread(target=answer, name="strict-broker")
        thread.start()
        case = new_case(port=server.getsockname()[1], wait=False)
        lost = case.lost()
        assert lost.state == "taken_over"
        assert "mqtt.worker_id" in lost.detail
        thread.join(5)
        assert connections == 1
        assert case.link.publish("x", b"1") == "full"
        case.close()
        assert case.link.info().state == "closed"


def test_a_connection_lost_while_subscribing_is_an_error(new_case: NewCase) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"\x20\x03\x00\x00\x00")
                peer.recv(1000)

        thread = threading.Thread(target=answer, name="rude-broker")
        thread.start()
        case = new_case(port=server.getsockname()[1])
        with pytest.raises(ConnectionError):
            case.link.subscribe([("a", 1)], timeout_s=10)
        thread.join(5)
        case.close(last_message=False, seconds=0.1)


def test_a_filter_that_the_broker_refuses_comes_with_its_reason(new_case: NewCase) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"\x20\x03\x00\x00\x00")
                packet = peer.recv(1000)
                peer.sendall(b"\x90\x06" + packet[2:4] + b"\x00\x01\x87\x00")
                peer.recv(1000)

        thread = threading.Thread(target=answer, name="choosy-broker")
        thread.start()
        case = new_case(port=server.getsockname()[1])
        refused = case.link.subscribe([("a", 1), ("b", 1), ("c", 1)], timeout_s=10)
        assert set(refused) == {"b", "c"}
        assert "ACL" in refused["b"]
        assert "QoS 0" in refused["c"]
        case.close(last_message=False, seconds=0.5)
        thread.join(5)
