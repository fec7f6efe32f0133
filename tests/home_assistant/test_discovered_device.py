"""The worker as a device, by its discovery message alone: every entity with a state, and buttons and switches that act."""

from __future__ import annotations

import json
from typing import Any

import pytest
from homeassistant.components import mqtt
from homeassistant.const import STATE_UNAVAILABLE, STATE_UNKNOWN
from homeassistant.core import HomeAssistant
from homeassistant.helpers import device_registry, entity_registry

from tests.home_assistant.fixtures import ScriptedWorker, StartWorker, until
from tests.support.mosquitto import Mosquitto

ENTITIES = {
    "sensor.llm_live_state": "online",
    "sensor.llm_live_model": "scripted",
    "sensor.llm_live_queue": "0",
    "sensor.llm_live_slots_busy": "0",
    "sensor.llm_live_speed": None,
    "sensor.llm_live_requests": "0",
    "sensor.llm_live_tokens": "0",
    "sensor.llm_live_errors": "0",
    "sensor.llm_live_uptime": None,
    "binary_sensor.llm_live_connection": "on",
    "binary_sensor.llm_live_problem": "off",
    "binary_sensor.llm_live_running": "off",
    "switch.llm_live_accept_requests": "on",
    "switch.llm_live_keep_awake": "off",
    "select.llm_live_model_of_requests": "scripted",
}
"""What has a state as soon as the worker is there; None is any."""
BEFORE_THE_FIRST_ANSWER = {"sensor.llm_live_first_token", "sensor.llm_live_last_answer"}
TO_PRESS = {
    "button.llm_live_cancel_all",
    "button.llm_live_unload",
    "button.llm_live_restart_engine",
    "notify.llm_live_ask",
}


@pytest.fixture
async def device(connected: HomeAssistant, start_worker: StartWorker) -> ScriptedWorker:
    settings = {"home_assistant__discovery": "true", "status__health_every_s": "1", "engine__models": '["other"]'}
    return await start_worker(**settings)


def state_of(hass: HomeAssistant, entity_id: str) -> str | None:
    state = hass.states.get(entity_id)
    return None if state is None else state.state


async def act(hass: HomeAssistant, domain: str, service: str, entity_id: str, **data: Any) -> None:
    await hass.services.async_call(domain, service, {"entity_id": entity_id, **data}, blocking=True)


async def becomes(hass: HomeAssistant, entity_id: str, state: str) -> None:
    try:
        await until(lambda: state_of(hass, entity_id) == state)
    except AssertionError:
        raise AssertionError(f"{entity_id} is {hass.states.get(entity_id)}, not {state}") from None


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What Home Assistant says in its log about keys, units, states and templates that are not right."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname in ("WARNING", "ERROR") and ".mqtt" in record.name
    ]


@pytest.mark.usefixtures("device")
async def test_every_entity_is_there_with_a_state(connected: HomeAssistant, caplog: pytest.LogCaptureFixture) -> None:
    for entity_id, expected in ENTITIES.items():
        await until(lambda: state_of(connected, entity_id) not in (None, "unknown", "unavailable"))  # noqa: B023 - asked at once
        assert expected in (None, state_of(connected, entity_id)), (entity_id, state_of(connected, entity_id))
    for entity_id in BEFORE_THE_FIRST_ANSWER | TO_PRESS:
        assert state_of(connected, entity_id) == STATE_UNKNOWN, entity_id
    (found,) = [each for each in device_registry.async_get(connected).devices.values() if each.name == "LLM live"]
    assert found.model == "llamacpp-mqtt-deploy"
    of_device = entity_registry.async_entries_for_device(entity_registry.async_get(connected), found.id)
    assert {each.entity_id for each in of_device} == {*ENTITIES, *BEFORE_THE_FIRST_ANSWER, *TO_PRESS}
    categories = {each.entity_id: each.entity_category for each in of_device}
    assert categories["button.llm_live_unload"] == "config"
    assert categories["sensor.llm_live_uptime"] == "diagnostic"
    assert complaints(caplog) == []


async def test_pressed_buttons_and_switches_act(connected: HomeAssistant, device: ScriptedWorker) -> None:
    await becomes(connected, "sensor.llm_live_state", "online")
    await act(connected, "button", "press", "button.llm_live_unload")
    await becomes(connected, "sensor.llm_live_state", "asleep")
    await act(connected, "switch", "turn_on", "switch.llm_live_keep_awake")
    await becomes(connected, "switch.llm_live_keep_awake", "on")
    await becomes(connected, "sensor.llm_live_state", "online")
    await act(connected, "switch", "turn_off", "switch.llm_live_keep_awake")
    await becomes(connected, "switch.llm_live_keep_awake", "off")
    await act(connected, "switch", "turn_off", "switch.llm_live_accept_requests")
    await becomes(connected, "sensor.llm_live_state", "draining")
    await becomes(connected, "switch.llm_live_accept_requests", "off")
    await act(connected, "switch", "turn_on", "switch.llm_live_accept_requests")
    await becomes(connected, "sensor.llm_live_state", "online")
    await becomes(connected, "select.llm_live_model_of_requests", "scripted")
    await act(connected, "select", "select_option", "select.llm_live_model_of_requests", option="other")
    await becomes(connected, "select.llm_live_model_of_requests", "other")
    await becomes(connected, "sensor.llm_live_model", "other")


async def test_a_notification_asks_and_the_answer_is_a_sensor(
    connected: HomeAssistant, device: ScriptedWorker, broker: Mosquitto
) -> None:
    await becomes(connected, "notify.llm_live_ask", STATE_UNKNOWN)  # no longer unavailable
    await until(lambda: "\tllm/reply/" in broker.log())  # Home Assistant has subscribed to it; answers are not kept
    long = "It is warm. " + "And so on, and so on. " * 40
    device.play(long)
    await act(connected, "notify", "send_message", "notify.llm_live_ask", message='How "warm" is it?')
    await becomes(connected, "sensor.llm_live_last_answer", "It is warm.")
    state = connected.states.get("sensor.llm_live_last_answer")
    assert state is not None
    assert state.attributes["answer"] == long
    assert state.attributes["finish_reason"] == "stop"
    await until(lambda: state_of(connected, "sensor.llm_live_first_token") not in (STATE_UNKNOWN, None))
    await becomes(connected, "sensor.llm_live_requests", "1")


async def test_a_worker_that_dies_is_offline_and_the_rest_of_it_unavailable(
    connected: HomeAssistant, device: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    await becomes(connected, "sensor.llm_live_state", "online")
    await becomes(connected, "select.llm_live_model_of_requests", "scripted")
    await device.kill()
    await becomes(connected, "sensor.llm_live_state", "offline")
    await becomes(connected, "binary_sensor.llm_live_connection", "off")
    for entity_id in ("switch.llm_live_accept_requests", "sensor.llm_live_queue", "button.llm_live_cancel_all"):
        await becomes(connected, entity_id, STATE_UNAVAILABLE)
    assert complaints(caplog) == []


async def test_what_the_worker_can_no_longer_do_goes(
    connected: HomeAssistant, device: ScriptedWorker, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    await becomes(connected, "select.llm_live_model_of_requests", "scripted")
    await device.stop()
    await start_worker(home_assistant__discovery="true", status__health_every_s="1")
    await becomes(connected, "sensor.llm_live_state", "online")
    await until(lambda: state_of(connected, "select.llm_live_model_of_requests") is None)
    assert "select.llm_live_model_of_requests" not in entity_registry.async_get(connected).entities
    assert complaints(caplog) == []


async def test_switched_off_again_the_device_goes(
    connected: HomeAssistant, device: ScriptedWorker, start_worker: StartWorker
) -> None:
    await becomes(connected, "sensor.llm_live_state", "online")
    await device.stop()
    await start_worker()
    await until(lambda: state_of(connected, "sensor.llm_live_state") is None)
    assert not [each for each in device_registry.async_get(connected).devices.values() if each.name == "LLM live"]


async def test_what_home_assistant_says_at_its_birth_brings_the_message_again(
    connected: HomeAssistant, device: ScriptedWorker
) -> None:
    told: list[str] = []
    await becomes(connected, "sensor.llm_live_state", "online")
    unsubscribe = await mqtt.async_subscribe(
        connected, "homeassistant/device/+/config", lambda message: told.append(str(message.payload)), qos=1
    )
    await until(lambda: len(told) == 1)  # the retained one
    await mqtt.async_publish(connected, "homeassistant/status", "online", qos=1)
    await until(lambda: len(told) == 2)
    assert json.loads(told[0]) == json.loads(told[1])
    unsubscribe()
