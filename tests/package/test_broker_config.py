"""The mosquitto configuration that we ship, in a real mosquitto: who may do what, and what the worker is told."""

from __future__ import annotations

import queue
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy.config.settings import LimitsSettings
from tests.support.services import require_program
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

CONFIG = Path(__file__).parents[2] / "config"
USERS = ("llm-worker", "llm-operator", "alice", "bob")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The shipped files with only paths and port replaced."""
    mosquitto, mosquitto_passwd = require_program("mosquitto"), require_program("mosquitto_passwd")
    folder = tmp_path_factory.mktemp("broker")
    passwords = folder / "passwd"
    passwords.write_text("".join(f"{user}:{user}-password\n" for user in USERS))
    passwords.chmod(0o600)
    subprocess.run([mosquitto_passwd, "-U", str(passwords)], check=True, capture_output=True, timeout=60)
    acl = folder / "acl"
    acl.write_text((CONFIG / "mosquitto.acl").read_text())
    acl.chmod(0o600)
    port = free_port()
    text = (CONFIG / "mosquitto.conf").read_text()
    for old, new in (
        ("/etc/mosquitto/passwd", str(passwords)),
        ("/etc/mosquitto/mosquitto.acl", str(acl)),
        ("listener 1883 ", f"listener {port} "),
        ("/var/lib/mosquitto/", f"{folder}/"),
    ):
        text = re.sub(rf"(?m)^(?!#)(.*){re.escape(old)}", rf"\g<1>{new}", text)
    # Started by root it would become the user mosquitto, who may not read the test's folder.
    (folder / "mosquitto.conf").write_text(f"{text}\nuser root\n")
    process = subprocess.Popen([mosquitto, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: process.poll() is not None or answers(port), 10)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=10)


@dataclass
class Person:
    """A connected MQTT 5 client that knows the broker's verdict on each publish."""

    name: str
    port: int
    inbox: queue.Queue[tuple[str, bytes]] = field(default_factory=queue.Queue)
    verdicts: dict[int, str] = field(default_factory=dict)
    connack: Any = None
    online: threading.Event = field(default_factory=threading.Event)
    subscribed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.username_pw_set(self.name, f"{self.name}-password")
        self.client.on_connect = self._on_connect
        self.client.on_message = lambda _c, _u, message: self.inbox.put((message.topic, bytes(message.payload)))
        self.client.on_publish = lambda _c, _u, mid, code, _p: self.verdicts.__setitem__(mid, str(code))
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.connect("127.0.0.1", self.port, clean_start=True)
        self.client.loop_start()
        assert self.online.wait(10)

    def _on_connect(self, _c: Any, _u: Any, _f: Any, code: Any, properties: Any) -> None:
        self.connack = (str(code), properties)
        self.online.set()

    def publish(self, topic: str, payload: bytes = b"x") -> str:
        mid = self.client.publish(topic, payload, qos=1).mid
        eventually(lambda: mid in self.verdicts, 10)
        return self.verdicts[mid]

    def subscribe(self, topic: str) -> None:
        self.subscribed.clear()
        self.client.subscribe(topic, qos=1)
        assert self.subscribed.wait(10)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def people(broker: int) -> Iterator[dict[str, Person]]:
    connected = {name: Person(name, broker) for name in USERS}
    yield connected
    for person in connected.values():
        person.close()


REFUSED = "Not authorized"


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
    for name in ("alice", "bob", "llm-worker", "llm-operator"):
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
