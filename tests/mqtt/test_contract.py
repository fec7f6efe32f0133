"""What every link does, over all of them: loopback, mosquitto on both versions and through a websocket, and amqtt."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import MqttSettings
from llamacpp_mqtt_deploy.mqtt.link import MqttLink
from llamacpp_mqtt_deploy.ports import Delivery, LinkInfo
from llamacpp_mqtt_deploy.stopping import Deadline
from llamacpp_mqtt_deploy.testing.loopback import LoopbackBroker, LoopbackLink
from tests.support.bus_client import BusClient
from tests.support.cable import Cable
from tests.support.link_case import LinkCase
from tests.support.other_brokers import CHOSEN, CHOSEN_MEMBERS
from tests.support.waiting import eventually
from tests.support.websocket_proxy import WebsocketProxy

MEMBERS = (
    *("loopback", "mosquitto-5", "mosquitto-3.1.1", "mosquitto-auto", "websocket-5", "amqtt-3.1.1"),
    *CHOSEN_MEMBERS,
)
# A broker that is put to the test is not let off what it is known to lack; only what MQTT 3.1.1 itself has not is left out.
MEASURED = bool(CHOSEN)

GAPS = {
    ("amqtt-3.1.1", "offline-queue"): "amqtt 0.12 loses QoS 1 messages for a client that is away",
    ("amqtt-3.1.1", "redelivery"): "amqtt 0.12 does not deliver unacknowledged messages again",
    ("amqtt-3.1.1", "qos-0"): "amqtt 0.12 delivers QoS 0 messages at QoS 1",
}


class Bus:
    """One member: makes links and plain clients, and cuts the link's connection."""

    def __init__(self, member: str, request: pytest.FixtureRequest) -> None:
        self.member = member
        self.root = f"t{uuid.uuid4().hex[:10]}"
        self.client_id = f"link-{self.root}"
        self._open: list[Any] = []
        if member == "loopback":
            self._loopback = LoopbackBroker()
            return
        name = member.partition("-")[0]
        self._transport = "websockets" if name == "websocket" else "tcp"
        broker = request.getfixturevalue("broker_named")("mosquitto" if name == "websocket" else name)
        self._port: int = broker.port
        reached_at = self._port
        self._proxy: WebsocketProxy | None = None
        if name == "websocket":
            self._proxy = WebsocketProxy(self._port)
            self._open.append(self._proxy.close)
            reached_at = self._proxy.port
        self._cable: Cable = request.getfixturevalue("cable_to")(reached_at)

    def topic(self, rest: str) -> str:
        return f"{self.root}/{rest}"

    def needs(self, *abilities: str) -> None:
        for ability in abilities:
            if ability == "properties" and "3.1.1" in self.member:
                pytest.skip("MQTT 3.1.1 has no properties")
            if (self.member, ability) in GAPS and not MEASURED:
                pytest.skip(GAPS[self.member, ability])

    def case(
        self,
        *,
        wait: bool = True,
        acknowledges: bool = True,
        outbox_messages: int = 5000,
        outbox_mib: int = 64,
        max_incoming_bytes: Callable[[], int] | None = None,
    ) -> LinkCase:
        link: Any
        if self.member == "loopback":
            link = LoopbackLink(
                self._loopback,
                client_id=self.client_id,
                outbox_messages=outbox_messages,
                outbox_mib=outbox_mib,
                max_incoming_bytes=max_incoming_bytes,
            )
        else:
            settings = MqttSettings(
                host="127.0.0.1",
                port=self._cable.port,
                transport=self._transport,
                protocol=self.member.partition("-")[2],
                outbox_messages=outbox_messages,
                outbox_mib=outbox_mib,
                reconnect_max_s=0.3,
            )
            link = MqttLink(settings, client_id=self.client_id, max_incoming_bytes=max_incoming_bytes)
        case = LinkCase(link, will_topic=self.topic("status"), acknowledges=acknowledges, only_below=self.root)
        self._open.append(lambda: case.close(last_message=False, seconds=1.0))
        return case.open(wait=wait)

    def client(self) -> Any:
        if self.member == "loopback":
            return self._loopback.client()
        client = BusClient(self._port, version="3.1.1" if "3.1.1" in self.member else "5", only_below=self.root)
        self._open.append(client.close)
        return client

    def cut(self) -> None:
        if self.member == "loopback":
            self._loopback.drop_connection(self.client_id)
        else:
            self._cable.cut()

    def wait_until_left(self) -> None:
        """Until the broker has read all that the links, which are closed, have sent: it may serve a new connection under the same
        id before that."""
        if self.member != "loopback":
            eventually(lambda: self._cable.is_idle() and (self._proxy is None or not self._proxy.serving), 10.0)

    def hold(self) -> None:
        """Let no PUBACK reach the link."""
        if self.member == "loopback":
            self._loopback.hold_pubacks()
        else:
            self._cable.stall()

    def release(self) -> None:
        if self.member == "loopback":
            self._loopback.release_pubacks()
        else:
            self._cable.resume()

    def close(self) -> None:
        for close in reversed(self._open):
            close()


@pytest.fixture(params=MEMBERS)
def bus(request: pytest.FixtureRequest) -> Iterator[Bus]:
    bus = Bus(request.param, request)
    yield bus
    bus.close()


def subscribed(case: LinkCase, topic_filter: str) -> LinkCase:
    assert case.link.subscribe([(topic_filter, 1)], timeout_s=5) == {}
    return case


def test_a_message_arrives_with_its_payload_qos_and_receipt(bus: Bus) -> None:
    case = subscribed(bus.case(), bus.topic("request/#"))
    bus.client().publish(bus.topic("request/a"), b"hello")
    found = case.receive()
    assert (found.topic, found.payload, found.qos, found.retain) == (bus.topic("request/a"), b"hello", 1, False)
    assert found.receipt is not None


def test_nothing_more_comes_for_a_subscription_that_was_ended(bus: Bus) -> None:
    case = subscribed(subscribed(bus.case(), bus.topic("request/#")), bus.topic("control/#"))
    client = bus.client()
    client.publish(bus.topic("request/a"), b"one")
    assert case.receive().payload == b"one"
    case.link.unsubscribe([bus.topic("request/#")], timeout_s=5)
    client.publish(bus.topic("request/a"), b"two")
    client.publish(bus.topic("control/a"), b"three")
    assert case.receive().payload == b"three"


def test_the_order_of_requests_is_kept(bus: Bus) -> None:
    case = subscribed(bus.case(), bus.topic("request/#"))
    client = bus.client()
    for number in range(50):
        client.publish(bus.topic("request/a"), str(number).encode())
    assert [case.receive().payload for _ in range(50)] == [str(n).encode() for n in range(50)]


def test_events_reach_a_subscriber_in_order_and_are_reported_done(bus: Bus) -> None:
    case = bus.case()
    client = bus.client()
    client.subscribe(bus.topic("reply/#"))
    done: list[bool] = []
    for number in range(200):
        assert case.link.publish(bus.topic("reply/a"), str(number).encode(), on_done=done.append) == "queued"
    assert [client.receive().payload for _ in range(200)] == [str(n).encode() for n in range(200)]
    assert case.link.flush(Deadline(10))
    eventually(lambda: done == [True] * 200)
    assert case.link.info().unacknowledged == 0
    assert case.link.info().last_puback_at is not None


def test_properties_of_a_request_are_read(bus: Bus) -> None:
    bus.needs("properties")
    case = subscribed(bus.case(), bus.topic("request/#"))
    client = bus.client()
    if bus.member == "loopback":
        client.publish(bus.topic("request/a"), b"x", correlation=b"c\0", response_topic="r/1", expiry_s=60)
    else:
        client.publish(
            bus.topic("request/a"), b"x", CorrelationData=b"c\0", ResponseTopic="r/1", MessageExpiryInterval=60
        )
    found = case.receive()
    assert (found.correlation, found.response_topic) == (b"c\0", "r/1")
    assert found.expiry_s is not None
    assert 50 < found.expiry_s <= 60


def test_a_retained_message_is_delivered_on_request_and_flagged(bus: Bus) -> None:
    client = bus.client()
    client.publish(bus.topic("status/w"), b"online", retain=True)
    case = bus.case()
    assert case.link.subscribe([(bus.topic("status/#"), 1)], timeout_s=5, retained=True) == {}
    found = case.receive()
    assert (found.payload, found.retain) == (b"online", True)


def test_a_retained_request_is_not_delivered_on_mqtt_5_and_flagged_on_3_1_1(bus: Bus) -> None:
    client = bus.client()
    client.publish(bus.topic("request/a"), b"old", retain=True)
    case = subscribed(bus.case(), bus.topic("request/#"))
    client.publish(bus.topic("request/a"), b"new")
    found = [case.receive()]
    if found[0].payload == b"old":
        assert case.link.info().protocol == "3.1.1"
        assert found[0].retain
        found.append(case.receive())
    assert (found[-1].payload, found[-1].retain) == (b"new", False)


def test_a_broken_connection_is_reported_with_the_will_and_comes_back(bus: Bus) -> None:
    case = bus.case()
    client = bus.client()
    client.subscribe(bus.topic("status"))
    bus.cut()
    assert case.lost().state == "lost"
    assert client.receive().payload == b"offline"
    again = case.online()
    assert again.reconnects == 1
    assert case.publish(bus.topic("x"), b"1")


def test_nothing_that_was_published_is_lost_over_a_broken_connection(bus: Bus) -> None:
    case = bus.case()
    client = bus.client()
    client.subscribe(bus.topic("reply/#"))
    done: list[bool] = []
    for number in range(300):
        assert case.link.publish(bus.topic("reply/a"), str(number).encode(), on_done=done.append) == "queued"
        if number in (100, 200):
            bus.cut()
    assert case.link.flush(Deadline(20))
    found: list[int] = []
    while len(set(found)) < 300:
        found.append(int(client.receive().payload))
    # At least once and in order: a number may come again, none may be missing when a later one comes.
    first_seen = list(dict.fromkeys(found))
    assert first_seen == sorted(first_seen)
    eventually(lambda: done == [True] * 300)


def test_requests_sent_while_the_worker_is_away_are_kept_for_it(bus: Bus) -> None:
    bus.needs("offline-queue")
    case = subscribed(bus.case(), bus.topic("request/#"))
    case.close(last_message=False)
    client = bus.client()
    for number in range(60):
        client.publish(bus.topic("request/a"), str(number).encode())
    again = bus.case()
    assert [again.receive().payload for _ in range(60)] == [str(n).encode() for n in range(60)]


def test_what_was_not_acknowledged_is_delivered_again_after_a_reconnect(bus: Bus) -> None:
    bus.needs("redelivery")
    case = subscribed(bus.case(acknowledges=False), bus.topic("request/#"))
    client = bus.client()
    for number in range(5):
        client.publish(bus.topic("request/a"), str(number).encode())
    first = [case.receive() for _ in range(5)]
    for delivery in first[:2]:
        case.link.acknowledge(delivery)
    assert case.publish(bus.topic("x"), b"after the acknowledgements")
    bus.cut()
    case.online()
    again = [case.receive() for _ in range(3)]
    assert [d.payload for d in again] == [b"2", b"3", b"4"]
    # Receipts of the old connection mean nothing any more.
    for delivery in first[2:]:
        case.link.acknowledge(delivery)
    assert case.publish(bus.topic("x"), b"after the old receipts")
    bus.cut()
    case.online()
    assert [case.receive().payload for _ in range(3)] == [b"2", b"3", b"4"]


def test_a_full_inbox_makes_the_broker_deliver_again_in_order(bus: Bus) -> None:
    bus.needs("redelivery")
    case = bus.case()
    refused: list[bytes] = []

    def take(delivery: Delivery) -> bool:
        if delivery.payload == b"1" and len(refused) < 2:
            refused.append(delivery.payload)
            return False
        return case._take(delivery)

    case.take = take
    subscribed(case, bus.topic("request/#"))
    client = bus.client()
    for number in range(4):
        client.publish(bus.topic("request/a"), str(number).encode())
    assert [case.receive(15).payload for _ in range(4)] == [b"0", b"1", b"2", b"3"]
    assert refused == [b"1", b"1"]


def test_a_callback_that_raises_ends_nothing(bus: Bus) -> None:
    bus.needs("qos-0")
    case = bus.case()

    def explode(delivery: Delivery) -> bool:
        raise RuntimeError("a defect in the daemon")

    case.take = explode
    subscribed(case, bus.topic("request/#"))
    client = bus.client()
    client.publish(bus.topic("request/a"), b"bad", qos=0)
    client.publish(bus.topic("request/a"), b"bad too", qos=0)

    def also_explode(well: bool) -> None:
        raise RuntimeError("another defect")

    assert case.link.publish(bus.topic("x"), b"1", on_done=also_explode) == "queued"
    assert case.publish(bus.topic("x"), b"2")
    eventually(lambda: case.link.info().state == "online")
    case.take = case._take
    client.publish(bus.topic("request/a"), b"good", qos=0)
    found = case.receive()
    while found.payload != b"good":
        found = case.receive()


@pytest.mark.parametrize(
    "topic",
    ["", "a/+", "a/#", "a\0b", "a\nb", "a/\ud800", "$CONTROL/dynamic-security/v1", "$SYS/x", "/".join("x" * 201), "x" * 70000],
    ids=["empty", "plus", "hash", "nul", "newline", "surrogate", "control", "sys", "levels", "long"],
)  # fmt: skip
def test_a_topic_that_no_broker_takes_is_refused_before_it_is_sent(bus: Bus, topic: str) -> None:
    case = bus.case()
    assert case.link.publish(topic, b"x") == "unfit"
    assert case.publish(bus.topic("x"), b"still here")
    assert case.link.info().reconnects == 0


def test_a_full_outbox_refuses_and_takes_again_when_it_has_drained(bus: Bus) -> None:
    case = bus.case(outbox_messages=100)
    # Held back at the broker or by speed alone: whatever is taken is never more than the bound, and all of it is done.
    taken = 0
    done: list[bool] = []
    for _ in range(3000):
        published = case.link.publish(bus.topic("x"), b"1", on_done=done.append)
        assert published in ("queued", "full")
        taken += published == "queued"
        assert case.link.info().unacknowledged <= 100
    assert case.link.flush(Deadline(10))
    eventually(lambda: len(done) == taken)
    assert case.publish(bus.topic("x"), b"2")


def test_an_outbox_is_full_also_by_bytes_and_takes_again_when_it_has_drained(bus: Bus) -> None:
    case = bus.case(outbox_mib=1)
    bus.hold()
    done: list[bool] = []
    piece = b"x" * 50_000
    told = [case.link.publish(bus.topic("x"), piece, on_done=done.append) for _ in range(30)]
    taken = told.count("queued")
    assert taken == 1024 * 1024 // (len(piece) + len(bus.topic("x")))
    assert told == ["queued"] * taken + ["full"] * (30 - taken)
    assert case.link.info().unacknowledged == taken
    bus.release()
    assert case.link.flush(Deadline(10))
    eventually(lambda: done == [True] * taken)
    assert case.publish(bus.topic("x"), b"y" * 1_000_000)


@pytest.mark.parametrize("size", [1, 40_000], ids=["in-number", "in-bytes"])
def test_answers_get_a_third_of_the_outbox_and_leave_the_rest_to_events(bus: Bus, size: int) -> None:
    case = bus.case(outbox_messages=300, outbox_mib=1)
    assert case.link.room_for_answers(size) > 1
    bus.hold()
    told = [case.link.publish(bus.topic("x"), b"x" * size, share="answer") for _ in range(150)]
    taken = told.count("queued")
    third = min(100, 1024 * 1024 // 3 // size + 1)
    assert taken == third
    assert "queued" not in told[taken:]
    assert case.link.room_for_answers(size) == 0
    assert [case.link.publish(bus.topic("x"), b"x" * size) for _ in range(15)] == ["queued"] * 15
    bus.release()
    assert case.link.flush(Deadline(10))
    assert case.link.room_for_answers(size) > 1
    assert case.publish(bus.topic("x"), b"x" * size, share="answer")


def test_closing_says_the_last_message_and_not_the_will(bus: Bus) -> None:
    case = bus.case()
    client = bus.client()
    client.subscribe(bus.topic("status"))
    case.close()
    assert client.receive().payload == b"bye"
    assert case.link.info().state == "closed"
    case.close()
    assert case.link.publish(bus.topic("x"), b"1") == "full"
    client.publish(bus.topic("status"), b"last")
    assert client.receive().payload == b"last"


def test_closing_without_time_lets_the_will_speak(bus: Bus) -> None:
    case = bus.case()
    client = bus.client()
    client.subscribe(bus.topic("status"))
    case.close(seconds=0.0)
    assert client.receive().payload in (b"offline", b"bye")


def test_closing_without_a_last_message_says_nothing(bus: Bus) -> None:
    case = bus.case()
    client = bus.client()
    client.subscribe(bus.topic("status"))
    case.close(last_message=False)
    client.publish(bus.topic("status"), b"last")
    assert client.receive().payload == b"last"


def test_of_a_message_that_is_longer_than_anybody_takes_the_beginning_comes(bus: Bus) -> None:
    case = subscribed(bus.case(max_incoming_bytes=lambda: 100_000), bus.topic("request/#"))
    client = bus.client()
    payload = bytes(range(256)) * 20_000
    sent = [payload, b"short", payload[:-1], b"x" * 100_000, b"last"]
    for each in sent:
        client.publish(bus.topic("request/a"), each)
    for each in sent:
        found = case.receive()
        assert (found.topic, found.qos, found.payload_bytes) == (bus.topic("request/a"), 1, len(each))
        assert each.startswith(found.payload)
        assert (found.left_out > 0) == (len(each) > 1_000_000)
        assert len(found.payload) >= min(len(each), 65_536)


def test_what_was_cut_and_acknowledged_does_not_come_again(bus: Bus) -> None:
    bus.needs("offline-queue")
    case = subscribed(bus.case(max_incoming_bytes=lambda: 100_000), bus.topic("request/#"))
    client = bus.client()
    client.publish(bus.topic("request/a"), bytes(2_000_000))
    assert case.receive().left_out > 0
    case.close()
    bus.wait_until_left()
    client.publish(bus.topic("request/a"), b"new")
    assert bus.case().receive().payload == b"new"


def test_acknowledgements_are_sent_before_the_link_closes(bus: Bus) -> None:
    bus.needs("redelivery")
    case = subscribed(bus.case(acknowledges=False), bus.topic("request/#"))
    client = bus.client()
    for number in range(3):
        client.publish(bus.topic("request/a"), str(number).encode())
    for delivery in [case.receive() for _ in range(3)]:
        case.link.acknowledge(delivery)
    case.close(last_message=False)
    bus.wait_until_left()
    client.publish(bus.topic("request/a"), b"new")
    assert bus.case().receive().payload == b"new"


def test_a_second_connection_under_the_same_id_ends_the_first_one(bus: Bus) -> None:
    first = bus.case()
    bus.case()
    assert first.lost().state in ("taken_over", "lost")


def test_subscribing_while_closed_is_a_connection_error(bus: Bus) -> None:
    case = bus.case()
    case.close()
    with pytest.raises(ConnectionError):
        case.link.subscribe([("a", 1)], timeout_s=1)


def test_subscribing_from_a_callback_is_refused(bus: Bus) -> None:
    case = bus.case(wait=False)
    errors: list[Exception] = []

    def take(delivery: Delivery) -> bool:
        try:
            case.link.subscribe([("a", 1)], timeout_s=1)
        except RuntimeError as error:
            errors.append(error)
        return case._take(delivery)

    case.take = take
    case.online()
    subscribed(case, bus.topic("request/#"))
    bus.client().publish(bus.topic("request/a"), b"x")
    case.receive()
    assert errors


def test_an_illegal_filter_is_refused_with_a_reason(bus: Bus) -> None:
    case = bus.case()
    refused = case.link.subscribe([("a/#/b", 1), (bus.topic("request/#"), 1)], timeout_s=5)
    assert list(refused) == ["a/#/b"]
    assert case.stays_online()


def test_closing_before_opening_does_nothing(bus: Bus) -> None:
    make: Callable[[], Any] = (
        (lambda: LoopbackLink(LoopbackBroker()))
        if bus.member == "loopback"
        else (lambda: MqttLink(MqttSettings(), client_id="x"))
    )
    link = make()
    link.close(Deadline(1))
    info: LinkInfo = link.info()
    assert info.state == "closed"
