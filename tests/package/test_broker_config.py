"""The mosquitto configuration that we ship, in a real mosquitto: who may do what, and what the worker is told."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.config.settings import LimitsSettings
from tests.support.shipped_broker import REFUSED, Person, ShippedBroker

pytestmark = pytest.mark.broker

CONFIG = Path(__file__).parents[2] / "config"
USERS = ("llm-worker", "llm-operator", "llm-gateway", "homeassistant", "alice", "bob")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The shipped files with only paths and port replaced."""
    with ShippedBroker(tmp_path_factory.mktemp("broker"), USERS) as running:
        yield running.port


@pytest.fixture
def people(broker: int) -> Iterator[dict[str, Person]]:
    connected = {name: Person(name, broker) for name in USERS}
    yield connected
    for person in connected.values():
        person.close()


@pytest.mark.parametrize(
    "name,topic,allowed",
    [
        ("alice", "llm/request/alice/kitchen", True),
        ("alice", "llm/control/alice/kitchen", True),
        ("alice", "llm/request/bob/kitchen", False),
        ("alice", "llm/control/bob/kitchen", False),
        ("alice", "llm/reply/alice/kitchen", False),
        ("alice", "llm/admin/worker", False),
        ("alice", "llm/status/worker", False),
        ("alice", "home/door/set", False),
        ("llm-worker", "llm/reply/alice/kitchen", True),
        ("llm-worker", "llm/status/worker", True),
        ("llm-worker", "llm/health/worker", True),
        ("llm-worker", "llm/admin-reply/worker", True),
        ("llm-worker", "home/door/set", False),
        ("llm-worker", "$CONTROL/dynamic-security/v1", False),
        ("llm-gateway", "llm/request/alice/kitchen", True),
        ("llm-gateway", "llm/control/alice/kitchen", True),
        ("llm-gateway", "llm/reply/alice/kitchen", False),
        ("llm-gateway", "llm/admin/worker", False),
        ("llm-gateway", "llm/status/worker", False),
        ("llm-gateway", "home/door/set", False),
        ("llm-worker", "homeassistant/device/lmd_kitchen_12345678/config", True),
        ("llm-worker", "homeassistant/status", False),
        ("llm-worker", "homeassistant/light/lamp/config", False),
        ("alice", "homeassistant/device/lmd_kitchen_12345678/config", False),
        ("alice", "homeassistant/status", False),
        ("homeassistant", "homeassistant/status", True),
        ("homeassistant", "llm/admin/worker", True),
        ("homeassistant", "llm/request/homeassistant", True),
        ("homeassistant", "llm/request/alice/kitchen", False),
        ("homeassistant", "llm/reply/homeassistant", False),
        ("homeassistant", "llm/status/worker", False),
        ("llm-operator", "llm/admin/worker", True),
        ("llm-operator", "llm/reply/alice/kitchen", False),
    ],
)
def test_a_user_may_publish_only_where_the_contract_says(
    people: dict[str, Person], name: str, topic: str, allowed: bool
) -> None:
    assert (people[name].publish(topic) != REFUSED) is allowed


def test_everybody_reads_only_what_is_theirs(people: dict[str, Person]) -> None:
    # The broker grants the subscription and then delivers only what may be read.
    for name in ("alice", "bob", "llm-worker", "llm-operator", "llm-gateway"):
        people[name].subscribe("llm/#")
    people["alice"].publish("llm/request/alice/s", b"question")
    people["llm-worker"].publish("llm/reply/alice/s", b"answer")
    people["llm-operator"].publish("llm/admin/w", b"drain")
    people["llm-worker"].publish("llm/admin-reply/w", b"ok")
    people["llm-worker"].publish("llm/status/w", b"status")
    expected = {
        "alice": {b"answer", b"status"},
        "bob": {b"status"},
        "llm-worker": {b"question", b"drain", b"status"},
        "llm-operator": {b"ok", b"status"},
        "llm-gateway": {b"answer", b"status"},
    }
    for name, payloads in expected.items():
        got: set[bytes] = set()
        # The status was published last, so what comes before it is all that comes.
        while b"status" not in got:
            got.add(people[name].inbox.get(timeout=10)[1])
        assert got == payloads, name


def test_nobody_comes_in_without_a_password(broker: int) -> None:
    refused: queue.Queue[str] = queue.Queue()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_connect = lambda _c, _u, _f, code, _p: refused.put(str(code))
    client.connect("127.0.0.1", broker)
    client.loop_start()
    try:
        assert refused.get(timeout=10) == REFUSED
    finally:
        client.disconnect()
        client.loop_stop()


def test_the_broker_tells_its_largest_packet_and_it_is_above_our_limits(people: dict[str, Person]) -> None:
    code, properties = people["llm-worker"].connack
    assert code == "Success"
    largest = properties.MaximumPacketSize
    limits = LimitsSettings()
    assert largest > max(limits.max_request_bytes, limits.max_event_bytes) + 1024
    # A payload over message_size_limit alone, which is not told, would be sent again after each reconnect.
    stated = dict(
        re.findall(r"(?m)^(max_packet_size|message_size_limit) (\d+)$", (CONFIG / "mosquitto.conf").read_text())
    )
    assert int(stated["message_size_limit"]) >= int(stated["max_packet_size"]) == largest


def test_the_largest_request_gets_through(people: dict[str, Person]) -> None:
    people["llm-worker"].subscribe("llm/request/#")
    payload = b"x" * LimitsSettings().max_request_bytes
    people["alice"].publish("llm/request/alice/big", payload)
    assert people["llm-worker"].inbox.get(timeout=10)[1] == payload
