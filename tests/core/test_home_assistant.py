"""The discovery message: the keys that Home Assistant documents, ids that stay, and templates that give legal values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.core.home_assistant import DiscoveredWorker, discovery_message

KITCHEN = DiscoveredWorker(
    root="llm",
    worker_id="kitchen.lan",
    version="1.0",
    level="homeassistant",
    models=("m1", "m2"),
    can_restart=True,
    can_unload=True,
    health_every_s=30,
)

# What a whole status and health look like (docs/schema.json holds the worker to it).
STATUS: Mapping[str, Any] = {
    "state": "online",
    "model": "m1",
    "models": ["m1", "m2", "alias"],
    "engine": {"state": "ready", "kind": "managed", "backend": "cpu", "keep_awake": False},
}
WILL: Mapping[str, Any] = {
    "state": "offline",
    "protocol": 1,
    "instance": "i",
    "ts": 1.0,
    "every_s": 10.0,
    "reason": "lost",
}
HEALTH: Mapping[str, Any] = {
    "uptime_s": 12.3,
    "slots": {"busy": 1, "total": 2},
    "queue": 3,
    "tokens_per_second": 12.34,
    "first_token_ms": 210.5,
    "requests": {"accepted": 7, "done": 5, "cancelled": 1, "failed": 2},
    "errors": {"busy": 2, "timeout": 1},
    "tokens": {"prompt": 100, "cached": 40, "completion": 50},
}
DONE: Mapping[str, Any] = {
    "type": "done",
    "request_id": "r1",
    "full_content": "It is 21 degrees. The window\nis open.",
    "finish_reason": "stop",
    "message": {"role": "assistant"},
}

# https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload and the page of each platform.
SHARED = {"platform", "name", "unique_id", "availability", "entity_category", "expire_after"}
ATTRIBUTES = {"json_attributes_topic", "json_attributes_template"}
DOCUMENTED: Mapping[str, set[str]] = {
    "sensor": {"state_topic", "value_template", "device_class", "options", "state_class", "unit_of_measurement"},
    "binary_sensor": {"state_topic", "value_template", "device_class"},
    "button": {"command_topic", "payload_press"},
    "switch": {
        "state_topic", "value_template", "state_on", "state_off", "command_topic", "payload_on", "payload_off",
    },
    "select": {"options", "state_topic", "value_template", "command_topic", "command_template"},
    "notify": {"command_topic", "command_template"},
}  # fmt: skip
REQUIRED: Mapping[str, set[str]] = {
    "sensor": {"state_topic"},
    "binary_sensor": {"state_topic"},
    "button": {"command_topic"},
    "switch": {"command_topic"},
    "select": {"command_topic", "options"},
    "notify": {"command_topic"},
}
UNITS_OF_DURATION = {"d", "h", "min", "s", "ms"}


def render(template: str, payload: object = None, **names: Any) -> str:
    """As Home Assistant does: its environment is this one, with more filters; `value_json` is there where the payload is JSON."""
    if payload is not None:
        names["value_json"] = json.loads(encode(payload))  # type: ignore[arg-type]
    return ImmutableSandboxedEnvironment().from_string(template).render(**names).strip()


def state_of(key: str, payload: object, worker: DiscoveredWorker = KITCHEN, **names: Any) -> str:
    return render(discovery_message(worker)["components"][key]["value_template"], payload, **names)


def test_every_key_is_one_that_home_assistant_documents() -> None:
    message = discovery_message(KITCHEN)
    assert set(message) == {"device", "origin", "availability", "qos", "components"}
    assert set(message["device"]) <= {"identifiers", "name", "model", "sw_version", "manufacturer"}
    assert message["origin"]["name"]
    for key, component in message["components"].items():
        platform = component["platform"]
        assert set(component) <= SHARED | ATTRIBUTES | DOCUMENTED[platform], key
        assert set(component) >= {"name", "unique_id"} | REQUIRED[platform], key
        assert component.get("entity_category") in (None, "diagnostic", "config")
        # Home Assistant refuses a sensor of the category config.
        assert platform not in ("sensor", "binary_sensor") or component.get("entity_category") != "config"
        if component.get("device_class") == "enum":
            assert component["options"]
            assert "state_class" not in component
            assert "unit_of_measurement" not in component
        if component.get("device_class") == "duration":
            assert component["unit_of_measurement"] in UNITS_OF_DURATION


def test_all_that_home_assistant_reads_is_status_health_or_the_answer_to_ask() -> None:
    components = discovery_message(KITCHEN)["components"].values()
    read = {component[key] for component in components for key in component if key.endswith("state_topic")}
    assert read == {"llm/status/kitchen.lan", "llm/health/kitchen.lan", "llm/reply/homeassistant"}
    written = {component["command_topic"] for component in components if "command_topic" in component}
    assert written == {"llm/admin/kitchen.lan", "llm/request/homeassistant"}


def test_ids_are_of_worker_and_root_and_fit_into_a_discovery_topic() -> None:
    assert re.fullmatch(r"lmd_kitchen_lan_[0-9a-f]{8}", KITCHEN.object_id)
    assert KITCHEN.topic("homeassistant") == f"homeassistant/device/{KITCHEN.object_id}/config"
    others = [replace(KITCHEN, worker_id="kitchen_lan"), replace(KITCHEN, root="llm2")]
    assert len({each.object_id for each in (KITCHEN, *others)}) == 3
    assert replace(KITCHEN, version="2.0", models=()).object_id == KITCHEN.object_id
    ids = [component["unique_id"] for component in discovery_message(KITCHEN)["components"].values()]
    assert len(set(ids)) == len(ids)
    assert all(each.startswith(f"{KITCHEN.object_id}_") for each in ids)


def test_only_what_the_engine_can_do_is_offered() -> None:
    all_of_it = discovery_message(KITCHEN)["components"]
    plain = replace(KITCHEN, models=("m1",), can_restart=False, can_unload=False, can_ask=False)
    components = discovery_message(plain)["components"]
    assert set(components) == set(all_of_it)
    # Left out, they would stay where Home Assistant had them before.
    absent = {key: component for key, component in components.items() if set(component) == {"platform"}}
    assert set(absent) == {"choose_model", "restart_engine", "unload", "keep_awake", "ask", "answer"}
    assert all(component["platform"] == all_of_it[key]["platform"] for key, component in absent.items())
    many = replace(KITCHEN, models=tuple(f"m{n}" for n in range(5000)))
    assert len(encode(discovery_message(many))) < 16_384


@pytest.mark.parametrize(
    "status,state,available",
    [
        (STATUS, "online", "online"),
        ({**STATUS, "engine": {"state": "asleep"}}, "asleep", "online"),
        ({**STATUS, "state": "draining", "engine": {"state": "asleep"}}, "draining", "online"),
        ({**STATUS, "state": "offline", "reason": "not_subscribed"}, "offline", "offline"),
        (WILL, "offline", "offline"),
        (None, "offline", "offline"),
    ],
    ids=["online", "asleep", "draining", "deaf", "will", "removed"],
)
def test_each_status_gives_a_state_that_is_among_the_options(
    status: Mapping[str, Any] | None, state: str, available: str
) -> None:
    message = discovery_message(KITCHEN)
    assert state_of("state", status) == state
    assert state in message["components"]["state"]["options"]
    assert render(message["availability"][0]["value_template"], status) == available
    assert state_of("connection", status) == ("OFF" if available == "offline" else "ON")
    # Whether it is there can be read only if that itself is always there.
    assert message["components"]["state"]["availability"] == message["components"]["connection"]["availability"] == []
    for key in ("problem", "accept", "keep_awake"):
        assert state_of(key, status) in ("ON", "OFF"), key


@pytest.mark.parametrize(
    "changed,problem",
    [
        ({}, "OFF"),
        ({"engine": {"state": "loading", "detail": "The server loads."}}, "OFF"),
        ({"engine": {"state": "asleep"}}, "OFF"),
        ({"engine": {"state": "ready", "detail": "It computes on the CPU."}}, "ON"),
        ({"engine": {"state": "restarting", "detail": "It hung."}}, "ON"),
        ({"engine": {"state": "failed"}}, "ON"),
        ({"problem": "The disk is full."}, "ON"),
    ],
)
def test_a_problem_is_one_when_somebody_has_to_do_something(changed: Mapping[str, Any], problem: str) -> None:
    status = {**STATUS, **changed}
    assert state_of("problem", status) == problem
    component = discovery_message(KITCHEN)["components"]["problem"]
    told = json.loads(render(component["json_attributes_template"], status))
    assert told == {"problem": changed.get("problem"), "engine": status["engine"].get("detail")}


def test_switches_and_the_list_of_models_follow_the_status() -> None:
    assert (state_of("accept", STATUS), state_of("accept", {**STATUS, "state": "draining"})) == ("ON", "OFF")
    awake = {**STATUS, "engine": {**STATUS["engine"], "keep_awake": True}}
    assert (state_of("keep_awake", STATUS), state_of("keep_awake", awake)) == ("OFF", "ON")
    choose = discovery_message(KITCHEN)["components"]["choose_model"]
    assert state_of("choose_model", STATUS) in choose["options"]
    assert json.loads(render(choose["command_template"], value='m"2')) == {"action": "model", "model": 'm"2'}


@pytest.mark.parametrize("first_token_ms", [210.5, None])
def test_every_figure_of_the_health_is_a_number_or_unknown(first_token_ms: float | None) -> None:
    health = {**HEALTH, "first_token_ms": first_token_ms}
    told = {
        key: state_of(key, health)
        for key, component in discovery_message(KITCHEN)["components"].items()
        if component["platform"] == "sensor" and component["state_topic"] == "llm/health/kitchen.lan"
    }
    assert told == {
        "queue": "3", "slots_busy": "1", "speed": "12.34", "first_token": str(first_token_ms), "requests": "7",
        "tokens": "150", "errors": "3", "uptime": "12",
    }  # fmt: skip
    assert state_of("running", health) == "ON"
    assert state_of("running", {**health, "slots": {"busy": 0, "total": 2}}) == "OFF"
    assert state_of("errors", {**health, "errors": {}}) == "0"


def test_figures_expire_when_the_health_stays_away() -> None:
    components = discovery_message(replace(KITCHEN, health_every_s=10.0))["components"]
    of_health = [each for each in components.values() if each.get("state_topic") == "llm/health/kitchen.lan"]
    assert {each["expire_after"] for each in of_health} == {31}
    assert not [key for key, each in components.items() if "expire_after" in each and each not in of_health]


# --- ask -------------------------------------------------------------------------------------------------------------------


def test_a_message_becomes_a_request_whatever_is_in_it() -> None:
    template = discovery_message(KITCHEN)["components"]["ask"]["command_template"]
    for text in ("Is it warm?", 'say "hello"', "{{ 7 * 7 }}", "line\nline", "für 😀 <b>&'"):
        assert json.loads(render(template, value=text)) == {"prompt": text, "stream": False}


@pytest.mark.parametrize(
    "content,state",
    [
        ("It is 21 degrees. The window\nis open.", "It is 21 degrees."),
        ("Yes! Certainly.", "Yes!"),
        ("Version 1.5 is out", "Version 1.5 is out"),
        ("  no end", "no end"),
        ("word " * 100, ("word " * 100)[:255].strip()),
        ("", "None"),
    ],
)
def test_the_state_of_an_answer_is_its_first_sentence_and_never_too_long(content: str, state: str) -> None:
    found = state_of("answer", {**DONE, "full_content": content})
    assert found == state
    assert len(found) <= 255


def attributes(event: Mapping[str, Any], **names: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(
        render(discovery_message(KITCHEN)["components"]["answer"]["json_attributes_template"], event, **names)
    )
    return told


def test_the_whole_answer_is_an_attribute_and_other_events_leave_it_as_it_was() -> None:
    whole = attributes(DONE)
    assert whole == {"answer": DONE["full_content"], "error": None, "finish_reason": "stop", "request_id": "r1"}
    this = SimpleNamespace(state="It is 21 degrees.", attributes=whole)
    for event in ({"type": "queued", "reason": "loading"}, {"type": "ping"}, {"type": "chunk", "content": "x"}):
        assert state_of("answer", event, this=this) == "It is 21 degrees."
        assert attributes(event, this=this) == whole
    # Before the first answer: nothing is known, and Home Assistant may not know the entity yet.
    unknown: Mapping[str, Any] = {"this": SimpleNamespace(state="unknown", attributes={})}
    no_entity: Mapping[str, Any] = {}
    for none in (no_entity, unknown):
        assert state_of("answer", {"type": "queued"}, **none) == "None"
        assert set(attributes({"type": "queued"}, **none).values()) == {None}


def test_an_error_is_told_in_words_and_one_too_long_for_a_message_says_so() -> None:
    error = {"type": "error", "request_id": "r2", "code": "busy", "message": "The queue is full. Try later."}
    assert state_of("answer", error) == "The queue is full."
    assert attributes(error)["error"] == "busy"
    omitted = {"type": "done", "request_id": "r3", "finish_reason": "stop", "content_omitted": True}
    assert state_of("answer", omitted) == "The answer is too long for one message."
    assert attributes(omitted)["answer"] is None
