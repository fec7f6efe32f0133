"""The worker as a device of Home Assistant, at a real broker: every template over what is really published, every order obeyed.

`make test-homeassistant` shows the same to a real Home Assistant.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import paho.mqtt.client as paho
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from paho.mqtt.enums import CallbackAPIVersion

from llamacpp_mqtt_deploy import demo_model
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine
from tests.service.conftest import StartWorker
from tests.support.live_worker import LiveWorker
from tests.support.mosquitto import Mosquitto
from tests.support.processes import children_of
from tests.support.shipped_broker import REFUSED, Person, ShippedBroker
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

StartMosquitto = Callable[..., Mosquitto]
FILTERS = ("homeassistant/#", "llm/status/#", "llm/health/#", "llm/reply/#", "llm/admin-reply/#")


class House:
    """What of Home Assistant matters here: it reads discovery, renders templates, and publishes what the entities say."""

    def __init__(self, port: int, *, username: str | None = None, password: str | None = None) -> None:
        self.latest: dict[str, Any] = {}
        """By topic, the payload that came last; JSON where it is."""
        self.seen: queue.Queue[tuple[str, bytes, int, bool]] = queue.Queue()
        self._subscribed = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)  # as Home Assistant's default
        self.client.username_pw_set(username, password)
        self.client.on_message = self._received
        self.client.on_connect = lambda client, *_: client.subscribe([(each, 1) for each in FILTERS])
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self._subscribed.wait(10)

    def _received(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        self.seen.put((message.topic, payload, message.qos, message.retain))
        try:
            self.latest[message.topic] = json.loads(payload)
        except ValueError:
            self.latest.pop(message.topic, None)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    @property
    def device(self) -> Mapping[str, Any]:
        """The discovery message, without the entities that are taken away: those of a platform alone."""
        eventually(lambda: any(topic.endswith("/config") for topic in list(self.latest)), 20)
        (topic,) = [each for each in list(self.latest) if each.endswith("/config")]
        found: Mapping[str, Any] = self.latest[topic]
        there = {key: entity for key, entity in found["components"].items() if set(entity) != {"platform"}}
        return {**found, "components": there}

    def entity(self, key: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.device["components"][key]
        return found

    def state(self, key: str) -> str:
        """The state of an entity as the latest message on its topic gives it; `unknown` before there is one."""
        entity = self.entity(key)
        if entity["state_topic"] not in self.latest:
            return "unknown"
        return _render(entity["value_template"], value_json=self.latest[entity["state_topic"]])

    def press(self, key: str) -> None:
        self._publish(self.entity(key), self.entity(key)["payload_press"])

    def switch(self, key: str, way: str) -> None:
        self._publish(self.entity(key), self.entity(key)[f"payload_{way}"])

    def choose(self, key: str, value: str) -> None:
        self._publish(self.entity(key), _render(self.entity(key)["command_template"], value=value))

    def _publish(self, entity: Mapping[str, Any], payload: str) -> None:
        self.client.publish(entity["command_topic"], payload, qos=1).wait_for_publish(10)

    def ack(self, action: str) -> Mapping[str, Any]:
        """The latest answer on the admin reply topic, once it is of this action."""
        found: dict[str, Any] = {}

        def came() -> bool:
            for topic, payload in list(self.latest.items()):
                if topic.startswith("llm/admin-reply/") and payload.get("action") == action:
                    found.update(payload)
            return bool(found)

        eventually(came)
        return found


def _render(template: str, **names: Any) -> str:
    return ImmutableSandboxedEnvironment().from_string(template).render(**names).strip()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.fixture
def house(mosquitto_here: Mosquitto) -> Iterator[House]:
    house = House(mosquitto_here.port)
    yield house
    house.close()


@pytest.fixture
def mosquitto_here(start_mosquitto: StartMosquitto) -> Mosquitto:
    return start_mosquitto()


@pytest.fixture
def live(mosquitto_here: Mosquitto, tmp_path: Path) -> Iterator[LiveWorker]:
    engine = ScriptedEngine(model="m1", further_models=("m2",), slots=1)
    settings = {"home_assistant__discovery": "true", "status__health_every_s": "1"}
    with LiveWorker(mosquitto_here.port, tmp_path, engine, **settings) as worker:
        yield worker


def test_every_entity_has_a_legal_state_from_what_the_worker_really_publishes(live: LiveWorker, house: House) -> None:
    house.choose("ask", "Good evening, everybody. How are you?")
    eventually(lambda: house.state("answer") != "unknown")
    eventually(lambda: house.state("requests") == "1", 20)
    eventually(lambda: "choose_model" in house.device["components"])
    for key, entity in house.device["components"].items():
        if "state_topic" not in entity:
            continue
        state = house.state(key)
        assert 0 < len(state) <= 255, key
        match entity["platform"]:
            case "binary_sensor" | "switch":
                assert state in ("ON", "OFF"), (key, state)
            case "select":
                assert state in entity["options"], (key, state)
            case _ if entity.get("device_class") == "enum":
                assert state in entity["options"], (key, state)
            case _ if "unit_of_measurement" in entity:
                assert is_number(state), (key, state)
    assert (
        _render(house.device["availability"][0]["value_template"], value_json=house.latest["llm/status/live"])
        == "online"
    )
    assert (house.state("state"), house.state("model"), house.state("problem")) == ("online", "m1", "OFF")


def test_it_is_retained_and_comes_at_qos_1(live: LiveWorker, house: House) -> None:
    assert house.device["device"]["name"] == "LLM live"
    late = House(live.port)
    try:
        eventually(lambda: any(topic.endswith("/config") for topic in late.latest))
        found = [each for each in list(late.seen.queue) if each[0].endswith("/config")]
        assert [(qos, retain) for _, _, qos, retain in found] == [(1, True)]
    finally:
        late.close()


def test_an_ask_brings_the_whole_answer_as_an_attribute_and_its_first_sentence_as_the_state(
    live: LiveWorker, house: House
) -> None:
    live.engine.play("It is 21 degrees. ", "The window is open.")
    house.choose("ask", 'How "warm" is it?')
    eventually(lambda: house.state("answer") == "It is 21 degrees.")
    entity = house.entity("answer")
    event = house.latest[entity["json_attributes_topic"]]
    attributes = json.loads(_render(entity["json_attributes_template"], value_json=event, this=SimpleNamespace()))
    assert attributes["answer"] == "It is 21 degrees. The window is open."
    assert live.engine.calls[-1].messages[-1]["content"] == 'How "warm" is it?'


def test_buttons_and_switches_do_what_they_say(live: LiveWorker, house: House) -> None:
    engine = live.engine
    eventually(lambda: house.state("accept") == "ON")
    house.switch("accept", "off")
    eventually(lambda: (house.state("accept"), house.state("state")) == ("OFF", "draining"))
    house.switch("accept", "on")
    eventually(lambda: (house.state("accept"), house.state("state")) == ("ON", "online"))
    house.press("unload")
    eventually(lambda: house.state("state") == "asleep")
    house.switch("keep_awake", "on")
    eventually(lambda: (house.state("keep_awake"), house.state("state")) == ("ON", "online"))
    assert (engine.wakes, engine.kept_awake) == (1, None)
    house.switch("keep_awake", "off")
    eventually(lambda: house.state("keep_awake") == "OFF")
    house.press("restart_engine")
    eventually(lambda: engine.restarts == 1)
    eventually(lambda: "choose_model" in house.device["components"])
    house.choose("choose_model", "m2")
    eventually(lambda: house.state("choose_model") == house.state("model") == "m2")


def test_cancel_all_ends_what_runs(live: LiveWorker, house: House) -> None:
    gate = Gate()
    live.engine.play("so far", gate)
    house.choose("ask", "go on")
    eventually(gate.reached.is_set)
    eventually(lambda: house.state("running") == "ON", 20)
    house.press("cancel_all")
    assert house.ack("cancel_all")["cancelled"] == 1
    eventually(lambda: house.latest.get("llm/reply/homeassistant", {}).get("finish_reason") == "cancelled")


def test_a_worker_that_dies_is_unavailable_and_told_to_be_offline(
    start_worker: StartWorker, mosquitto_here: Mosquitto, house: House
) -> None:
    settings = {"home_assistant__discovery": True, "status__health_every_s": 1} | _own_engine()
    worker = start_worker(mosquitto_here.port, "", **settings)
    eventually(lambda: house.state("state") == "online", 20)
    worker.kill()
    eventually(lambda: house.state("state") == "offline", 20)
    assert house.state("connection") == "OFF"
    for key in ("problem", "accept", "keep_awake"):
        assert house.state(key) in ("ON", "OFF")


def _own_engine() -> dict[str, Any]:
    return {
        "engine__kind": "managed",
        "engine__model_path": str(demo_model.path()),
        "engine__slots": 1,
        "engine__context_tokens": 2048,
        "engine__threads": 1,
    }


@pytest.mark.engine
def test_the_engine_really_ends_and_starts_at_the_press_of_a_button(
    start_worker: StartWorker, mosquitto_here: Mosquitto, house: House
) -> None:
    settings = {"home_assistant__discovery": True, "status__health_every_s": 1, **_own_engine()}
    worker = start_worker(mosquitto_here.port, "", **settings)

    def servers() -> set[int]:
        return children_of(worker.process.pid)

    (first,) = servers()
    eventually(lambda: "unload" in house.device["components"], 20)
    house.press("unload")
    eventually(lambda: house.state("state") == "asleep" and not servers(), 20)
    house.switch("keep_awake", "on")
    eventually(lambda: house.state("state") == "online" and len(servers()) == 1, 20)
    (second,) = servers()
    eventually(lambda: house.latest["llm/status/w1"]["engine"]["state"] == "ready", 20)
    house.press("restart_engine")
    eventually(lambda: len(servers()) == 1 and servers() != {second}, 20)
    assert first != second
    eventually(lambda: house.latest["llm/status/w1"]["engine"]["state"] == "ready", 20)
    house.choose("ask", "Hello")
    eventually(lambda: house.latest.get("llm/reply/homeassistant", {}).get("type") == "done", 30)
    assert worker.stop() == 0


def test_after_a_broker_that_forgot_everything_it_is_there_again(
    live: LiveWorker, mosquitto_here: Mosquitto, house: House
) -> None:
    assert house.device
    house.latest.clear()
    mosquitto_here.kill()
    mosquitto_here.start()
    eventually(lambda: any(topic.endswith("/config") for topic in list(house.latest)), 30)


def test_a_birth_of_home_assistant_brings_it_again(live: LiveWorker, house: House) -> None:
    assert house.device
    house.latest.clear()
    house.client.publish("homeassistant/status", b"online", qos=1)
    assert house.device["device"]["name"] == "LLM live"


# --- the access list ---------------------------------------------------------------------------------------------------------


def test_the_access_list_that_we_ship_lets_it_work_and_nobody_else(tmp_path: Path) -> None:
    users = ("llm-worker", "homeassistant", "alice")
    (tmp_path / "broker").mkdir()
    password = tmp_path / "password"
    password.write_text("llm-worker-password\n")
    with ShippedBroker(tmp_path / "broker", users) as broker:
        settings = {
            "home_assistant__discovery": "true",
            "status__health_every_s": "1",
            "mqtt__username": "llm-worker",
            "mqtt__password_file": str(password),
        }
        house = House(broker.port, username="homeassistant", password="homeassistant-password")
        alice = Person("alice", broker.port)
        try:
            with _Quiet(broker.port, tmp_path, ScriptedEngine(), **settings) as worker:
                eventually(lambda: house.state("state") == "online", 20)
                house.press("unload")
                eventually(lambda: house.state("state") == "asleep", 20)
                house.choose("ask", "Hello")
                eventually(lambda: house.state("answer") == "Hello", 20)
                house.latest.clear()
                house.client.publish("homeassistant/status", b"online", qos=1)
                assert house.device
                topic = next(topic for topic in house.latest if topic.endswith("/config"))
                assert REFUSED in alice.publish(topic, b"")
                assert REFUSED in alice.publish("homeassistant/status", b"online")
                assert REFUSED in alice.publish("llm/admin/live", b"unload")
                assert worker.engine.wakes == 1
        finally:
            house.close()
            alice.close()


class _Quiet(LiveWorker):
    """Where only users are let in, nobody waits for it at the broker."""

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self.daemon.ready, 20)
        return self
