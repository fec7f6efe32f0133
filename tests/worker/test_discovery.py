"""When the worker tells Home Assistant of itself, when again, and when it takes that back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.ports import Delivery
from llamacpp_mqtt_deploy.service import daemon, discovery
from llamacpp_mqtt_deploy.testing.loopback import LoopbackLink
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.support.waiting import eventually
from tests.support.whole_worker import Bus, WholeWorker

ON: Mapping[str, Any] = {"home_assistant__discovery": True}


def topic_of(worker: WholeWorker, prefix: str = "homeassistant") -> str:
    parts = worker.daemon.parts
    return discovery.described(parts.in_force.policies(), parts.topics, parts.engine.info()).topic(prefix)


def message(bus: Bus, topic: str) -> Mapping[str, Any] | None:
    payload = bus.broker.retained(topic)
    return json.loads(payload) if payload else None


def told(bus: Bus, topic: str) -> list[bytes]:
    """All that was published there so far."""
    while bus.listener.pull(0.0) is not None:
        pass
    return [each.payload for each in bus.listener.deliveries if each.topic == topic]


def whole(bus: Bus, topic: str) -> bool:
    """The message of an engine that has said what it can."""
    return "unload" in ((message(bus, topic) or {}).get("components") or {})


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Births are answered soon, and as often as a test can wait for."""
    monkeypatch.setattr(discovery, "BIRTH_PAUSE_S", 0.05)
    monkeypatch.setattr(discovery, "MOST_OFTEN_S", 0.3)


def test_nothing_is_told_unless_it_is_asked_for(bus: Bus) -> None:
    worker = bus.worker()
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert told(bus, topic_of(worker)) == []
    assert not (bus.state / "state.db.discovery").exists()


def test_the_message_is_retained_and_comes_again_when_the_engine_has_other_models(bus: Bus) -> None:
    engine = ScriptedEngine(model="m1")
    worker = bus.worker(engine, **ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    found = message(bus, topic)
    assert found is not None
    assert found["components"]["choose_model"] == {"platform": "select"}
    engine.serve("m1", "m2")
    eventually(lambda: "options" in (message(bus, topic) or {})["components"]["choose_model"])
    found = message(bus, topic)
    assert found is not None
    assert found["components"]["choose_model"]["options"] == ["m1", "m2"]


def test_a_default_route_of_other_clients_cannot_be_asked_from_there(bus: Bus) -> None:
    worker = bus.worker(routes__default__fields={"prompt": "message"}, **ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    found = message(bus, topic)
    assert found is not None
    assert found["components"]["ask"] == {"platform": "notify"}
    assert found["components"]["answer"] == {"platform": "sensor"}


def test_a_topic_that_stays_refused_does_not_bring_the_message_again_and_again(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_START_UP_AGAIN_S", 0.05)
    bus.broker.refuse("llm/control/+")
    worker = bus.worker(**ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    before, attempts = len(told(bus, topic)), _statuses(bus)
    eventually(lambda: _statuses(bus) > attempts + 5)  # it is tried again, each time with a new status
    assert len(told(bus, topic)) == before


def _statuses(bus: Bus) -> int:
    return len(told(bus, "llm/status/w1"))


def test_a_broker_that_does_not_answer_the_subscription_gets_the_message_all_the_same(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe = LoopbackLink.subscribe

    def slow(self: LoopbackLink, filters: Any, **how: Any) -> Any:
        if ("homeassistant/status", 0) in filters:
            raise TimeoutError("no SUBACK")
        return subscribe(self, filters, **how)

    monkeypatch.setattr(LoopbackLink, "subscribe", slow)
    worker = bus.worker(**ON)
    eventually(lambda: whole(bus, topic_of(worker)))


def test_a_message_that_says_nothing_new_is_not_sent_again(bus: Bus) -> None:
    engine = ScriptedEngine()
    worker = bus.worker(engine, **ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    before = len(told(bus, topic))
    for state in ("asleep", "ready", "restarting", "ready"):
        engine.become(state)
        eventually(lambda: _engine_told(bus) == state)  # noqa: B023 - asked at once
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert len(told(bus, topic)) == before


def _engine_told(bus: Bus) -> object:
    found = json.loads(bus.broker.retained("llm/status/w1") or b"{}")
    return (found.get("engine") or {}).get("state")


def test_it_is_sent_again_when_home_assistant_has_started_and_when_the_connection_was_lost(bus: Bus) -> None:
    worker = bus.worker(**ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    first = len(told(bus, topic))
    bus.sender.publish("homeassistant/status", b"online")
    eventually(lambda: len(told(bus, topic)) == first + 1)
    bus.broker.stop(forget=True)
    bus.broker.start()
    eventually(lambda: whole(bus, topic), 20)


def test_a_flood_of_births_costs_two_messages_and_other_payloads_nothing(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "MOST_OFTEN_S", 60.0)
    worker = bus.worker(**ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    first = len(told(bus, topic))
    for payload in (b"offline", b"", b"\xff\xfe", b"online ", b'{"a":1}', b"x" * 100_000):
        bus.sender.publish("homeassistant/status", payload, retain=True)
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert len(told(bus, topic)) == first
    for _ in range(500):
        bus.sender.publish("homeassistant/status", b"online")
    eventually(lambda: len(told(bus, topic)) > first)
    bus.ask("two", request_id="r2")
    bus.listener.terminal("r2")
    assert len(told(bus, topic)) == first + 1


def test_a_birth_says_nothing_to_a_worker_without_discovery(bus: Bus) -> None:
    worker = bus.worker()
    bus.sender.publish("homeassistant/status", b"online")
    worker.daemon._on_delivery(_birth())  # a subscription of an earlier life that the broker has kept
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert told(bus, topic_of(worker)) == []


def _birth() -> Delivery:
    return Delivery(topic="homeassistant/status", payload=b"online", qos=0)


def test_switched_off_in_the_next_life_it_is_taken_back(bus: Bus) -> None:
    worker = bus.worker(**ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    memory = Path(bus.state / "state.db.discovery")
    assert memory.read_text() == f"{topic}\n"
    assert memory.stat().st_mode & 0o077 == 0
    assert worker.stop() == 0
    assert whole(bus, topic)  # a worker that is away stays known
    off = bus.worker()
    eventually(lambda: not bus.broker.retained(topic))
    assert told(bus, topic)[-1] == b""
    eventually(lambda: not memory.exists())
    assert off.stop() == 0
    before = len(told(bus, topic))
    bus.worker()
    bus.ask("one", request_id="r1")
    bus.listener.terminal("r1")
    assert len(told(bus, topic)) == before  # once


def test_a_crash_between_telling_and_remembering_leaves_nothing_behind(bus: Bus) -> None:
    """What may be retained is remembered before it is told."""
    worker = bus.worker(wait=False, **ON)
    topic = topic_of(worker)
    memory = bus.state / "state.db.discovery"
    bus.listener.until(state="online")
    eventually(lambda: told(bus, topic))
    assert memory.read_text() == f"{topic}\n"


def test_a_reload_switches_it_on_and_off_and_moves_it(bus: Bus) -> None:
    worker = bus.worker()
    topic, moved = topic_of(worker), topic_of(worker, "ha/discovery")
    overrides = worker.daemon._loaded.overrides
    overrides.update({"home_assistant.discovery": "true"})  # type: ignore[attr-defined]
    bus.admin("reload")
    assert bus.listener.until(action="reload")["changed"] == ["home_assistant.discovery"]
    eventually(lambda: whole(bus, topic))
    overrides.update({"home_assistant.prefix": "ha/discovery"})  # type: ignore[attr-defined]
    bus.admin("reload")
    eventually(lambda: whole(bus, moved))
    eventually(lambda: not bus.broker.retained(topic))
    first = len(told(bus, moved))
    bus.sender.publish("ha/discovery/status", b"online")
    eventually(lambda: len(told(bus, moved)) > first)
    overrides.update({"home_assistant.discovery": "false"})  # type: ignore[attr-defined]
    bus.admin("reload")
    eventually(lambda: not bus.broker.retained(moved))
    eventually(lambda: not (bus.state / "state.db.discovery").exists())


def test_another_worker_id_takes_the_old_device_back(bus: Bus) -> None:
    worker = bus.worker(**ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    assert worker.stop() == 0
    other = bus.worker(mqtt__worker_id="w2", **ON)
    assert topic_of(other) != topic
    eventually(lambda: whole(bus, topic_of(other)))
    eventually(lambda: not bus.broker.retained(topic))


def test_a_broker_that_takes_only_small_messages_gets_one_without_the_list_of_models_or_none(bus: Bus) -> None:
    many = tuple(f"a-model-with-a-long-name-{n:04}" for n in range(100))
    bus.broker.max_payload_bytes = 9500
    worker = bus.worker(ScriptedEngine(further_models=many), **ON)
    topic = topic_of(worker)
    eventually(lambda: whole(bus, topic))
    found = message(bus, topic)
    assert found is not None
    assert found["components"]["choose_model"] == {"platform": "select"}
    assert worker.stop() == 0
    bus.broker.max_payload_bytes = 2048
    bus.worker(ScriptedEngine(), **ON)
    eventually(lambda: not bus.broker.retained(topic))  # the old one would say what is no longer so
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"


def test_a_worker_that_may_not_write_there_serves_all_the_same(bus: Bus) -> None:
    bus.broker.refuse_publish("homeassistant/#")
    bus.broker.refuse("homeassistant/status")
    worker = bus.worker(**ON)
    bus.ask("one", request_id="r1")
    assert bus.listener.terminal("r1")["type"] == "done"
    assert bus.broker.retained(topic_of(worker)) is None


def test_a_memory_that_cannot_be_read_or_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    broken = tmp_path / "x"
    broken.write_bytes(b"\xff\xfe")
    assert discovery.Remembered(broken).all() == []
    nowhere = discovery.Remembered(broken / "below" / "a" / "file")
    nowhere.add("homeassistant/device/a/config")
    assert nowhere.all() == ["homeassistant/device/a/config"]
    without = discovery.Remembered(None)
    for number in range(40):
        without.add(f"homeassistant/device/{number}/config")
    assert len(without.all()) == discovery.MOST_REMEMBERED
