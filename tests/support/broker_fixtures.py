"""Fixtures that bring real brokers, certificates and a cable into tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.amqtt_broker import AmqttBroker
from tests.support.cable import Cable
from tests.support.certificates import Authority
from tests.support.mosquitto import Mosquitto
from tests.support.other_brokers import OtherBroker


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A running mosquitto for everybody, shared by the tests of one process: leave it running, use topics of your own."""
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto")).start()
    yield broker
    broker.close()


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Start a mosquitto of one's own: `start_mosquitto(users={"u": "p"}, acl="...", settings=["message_size_limit 1000"])`."""
    brokers: list[Mosquitto] = []

    def start(**wishes: Any) -> Mosquitto:
        broker = Mosquitto(tmp_path / f"mosquitto-{len(brokers)}", **wishes)
        brokers.append(broker)
        return broker.start()

    yield start
    for broker in brokers:
        broker.close()


@pytest.fixture(scope="session")
def amqtt_broker() -> Iterator[AmqttBroker]:
    """A running amqtt, which speaks MQTT 3.1.1 only; shared."""
    broker = AmqttBroker().start()
    yield broker
    broker.close()


@pytest.fixture(scope="session")
def broker_named(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """The running broker of this name, shared: `broker_named("nats")`. mosquitto, amqtt, and those of `OtherBroker`."""
    others: dict[str, OtherBroker] = {}

    def find(name: str) -> Any:
        if name in ("mosquitto", "amqtt"):
            return request.getfixturevalue("mosquitto" if name == "mosquitto" else "amqtt_broker")
        if name not in others:
            others[name] = OtherBroker(name).start()
        return others[name]

    yield find
    for broker in others.values():
        broker.close()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def cable_to() -> Iterator[Callable[[int], Cable]]:
    """Lay a cable to a port: `cable_to(mosquitto.port)`."""
    cables: list[Cable] = []

    def lay(port: int) -> Cable:
        cables.append(Cable(port))
        return cables[-1]

    yield lay
    for cable in cables:
        cable.close()
