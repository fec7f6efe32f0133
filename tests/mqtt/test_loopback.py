"""The loopback broker's controls, on which other tests stand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamacpp_mqtt_deploy.stopping import Deadline
from llamacpp_mqtt_deploy.testing.loopback import LoopbackBroker, LoopbackLink
from tests.support.link_case import LinkCase
from tests.support.waiting import eventually


@pytest.fixture
def broker() -> LoopbackBroker:
    return LoopbackBroker(max_payload_bytes=1000)


@pytest.fixture
def case(broker: LoopbackBroker) -> Iterator[LinkCase]:
    case = LinkCase(LoopbackLink(broker, client_id="link"), acknowledges=False).open()
    yield case
    case.close(last_message=False)


def test_held_pubacks_come_when_they_are_released(broker: LoopbackBroker, case: LinkCase) -> None:
    done: list[bool] = []
    broker.hold_pubacks()
    client = broker.client()
    client.subscribe("r")
    assert case.link.publish("r", b"1", on_done=done.append) == "queued"
    assert client.receive().payload == b"1"
    assert not case.link.flush(Deadline(0.02))
    assert case.link.info().unacknowledged == 1
    broker.release_pubacks()
    assert case.link.flush(Deadline(5))
    eventually(lambda: done == [True])


def test_a_dropped_connection_publishes_again_what_had_no_puback(broker: LoopbackBroker, case: LinkCase) -> None:
    broker.hold_pubacks()
    client = broker.client()
    client.subscribe("r")
    assert case.link.publish("r", b"1") == "queued"
    client.receive()
    broker.drop_connection("link")
    case.online()
    assert client.receive().payload == b"1"
    broker.release_pubacks()
    assert case.link.flush(Deadline(5))


def test_refused_filters_and_topics_are_refused(broker: LoopbackBroker, case: LinkCase) -> None:
    broker.refuse("secret/#")
    broker.refuse_publish("home/#")
    assert case.link.subscribe([("secret/#", 1), ("fine", 1)], timeout_s=5) == {"secret/#": "Not authorized"}
    assert case.publish("home/door", b"open") is False
    assert case.publish("elsewhere", b"x") is True
    with pytest.raises(PermissionError):
        broker.client().subscribe("secret/#")


def test_a_stopped_broker_takes_nobody_and_a_started_one_everybody(broker: LoopbackBroker, case: LinkCase) -> None:
    broker.stop()
    assert case.lost().state == "lost"
    with pytest.raises(ConnectionError):
        broker.client()
    assert case.link.publish("r", b"1") == "queued"
    broker.start()
    case.online()
    assert case.link.flush(Deadline(5))


def test_a_broker_that_forgot_has_no_session(broker: LoopbackBroker, case: LinkCase) -> None:
    case.link.subscribe([("q/#", 1)], timeout_s=5)
    broker.client().publish("kept", b"1", retain=True)
    broker.stop(forget=True)
    case.lost()
    broker.start()
    case.online()
    broker.client().publish("q/a", b"nobody has subscribed any more")
    case.link.subscribe([("q/#", 1)], timeout_s=5)
    broker.client().publish("q/a", b"2")
    assert case.receive().payload == b"2"
    assert broker.retained("kept") is None


def test_expired_messages_are_not_delivered() -> None:
    now = [0.0]
    broker = LoopbackBroker(clock=lambda: now[0])
    client = broker.client()
    client.publish("status", b"online", retain=True, expiry_s=30)
    now[0] = 29.0
    assert broker.retained("status") == b"online"
    now[0] = 31.0
    assert broker.retained("status") is None


def test_a_payload_over_the_limit_is_refused(case: LinkCase) -> None:
    assert case.link.info().max_payload_bytes == case.link.max_payload_bytes() == 1000
    assert case.link.publish("r", b"x" * 1001) == "unfit"


def test_unacknowledged_deliveries_are_counted(broker: LoopbackBroker, case: LinkCase) -> None:
    case.link.subscribe([("q/#", 1)], timeout_s=5)
    broker.client().publish("q/1", b"x")
    delivery = case.receive()
    assert broker.unacknowledged("link") == 1
    case.link.acknowledge(delivery)
    eventually(lambda: broker.unacknowledged("link") == 0)
