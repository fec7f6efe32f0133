"""Adding workers in a real Home Assistant: found by their retained status, or by hand; their options; diagnostics."""

from __future__ import annotations

import json
from typing import Any

import paho.mqtt.publish
import pytest
from homeassistant.config_entries import SOURCE_USER, ConfigEntryState
from homeassistant.core import HomeAssistant
from homeassistant.data_entry_flow import FlowResultType
from homeassistant.helpers import device_registry, entity_registry
from homeassistant.setup import async_setup_component
from pytest_homeassistant_custom_component.common import MockConfigEntry
from pytest_homeassistant_custom_component.components.diagnostics import get_diagnostics_for_config_entry
from pytest_homeassistant_custom_component.typing import ClientSessionGenerator

from custom_components.llamacpp_mqtt import config_flow
from custom_components.llamacpp_mqtt.const import DOMAIN
from tests.home_assistant.fixtures import AGENT, Home, ScriptedWorker, StartWorker, speech, until
from tests.support.mosquitto import Mosquitto


def found(hass: HomeAssistant) -> list[Any]:
    return [flow for flow in hass.config_entries.flow.async_progress() if flow["handler"] == DOMAIN]


async def test_a_worker_is_found_by_its_retained_status_and_answers_with_one_click(
    start_worker: StartWorker, connected: HomeAssistant
) -> None:
    worker = await start_worker()
    await until(lambda: found(connected))
    (flow,) = found(connected)
    assert flow["context"]["title_placeholders"] == {"name": "live"}
    assert flow["step_id"] == "confirm"
    created = await connected.config_entries.flow.async_configure(flow["flow_id"], {"first_level": "homeassistant"})
    assert created["type"] is FlowResultType.CREATE_ENTRY
    entry = created["result"]
    assert entry.data == {"root": "llm", "worker": "live", "first_level": "homeassistant"}
    assert sorted(each.subentry_type for each in entry.subentries.values()) == ["ai_task_data", "conversation"]
    await connected.async_block_till_done()
    await until(lambda: entry.runtime_data.available)
    agents = [
        name for name in connected.states.async_entity_ids("conversation") if name != "conversation.home_assistant"
    ]
    assert agents == ["conversation.llm_live"]
    from homeassistant.components import conversation
    from homeassistant.core import Context

    result = await conversation.async_converse(connected, "Hello there", None, Context(), agent_id=agents[0])
    assert speech(result) == "Hello there"
    assert {tool["function"]["name"] for tool in worker.calls[0]["tools"]} >= {"HassTurnOn", "GetLiveContext"}


async def test_a_worker_that_is_set_up_is_not_found_again_by_its_renewals(home: Home) -> None:
    for flow in found(home.hass):  # offered before the fixture set it up
        home.hass.config_entries.flow.async_abort(flow["flow_id"])
    seen = home.entry.runtime_data.status.told["ts"]
    await until(lambda: home.entry.runtime_data.status.told["ts"] > seen)
    await home.hass.async_block_till_done()
    assert found(home.hass) == []


async def test_the_device_shows_the_worker_that_came_back(
    home: Home, scripted: ScriptedWorker, broker: Mosquitto
) -> None:
    def device() -> device_registry.DeviceEntry:
        entity = entity_registry.async_get(home.hass).async_get(AGENT)
        assert entity is not None
        assert entity.device_id is not None
        device = device_registry.async_get(home.hass).async_get(entity.device_id)
        assert device is not None
        return device

    status = home.entry.runtime_data.status.told
    assert (device().sw_version, device().model) == (status["version"], "scripted")
    await scripted.stop()
    await until(lambda: not home.entry.runtime_data.available)
    assert device().sw_version == status["version"]
    updated = json.dumps(status | {"version": "99.0.0", "models": ["newer", "scripted"]})
    paho.mqtt.publish.single("llm/status/live", updated, qos=1, retain=True, hostname="127.0.0.1", port=broker.port)
    await until(lambda: home.entry.runtime_data.available)
    assert (device().sw_version, device().model) == ("99.0.0", "newer")


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "x",
        "[]",
        '{"state": "online"}',
        '{"state": "offline", "protocol": 1, "instance": "i", "ts": 1, "every_s": 10}',
    ],
)
async def test_what_is_no_live_worker_is_not_offered(connected: HomeAssistant, broker: Mosquitto, payload: str) -> None:
    paho.mqtt.publish.single("llm/status/other", payload, qos=1, retain=True, hostname="127.0.0.1", port=broker.port)
    online = json.dumps({"state": "online", "protocol": 1, "instance": "i", "ts": 1, "every_s": 10})
    paho.mqtt.publish.single("llm/status/last", online, qos=1, retain=True, hostname="127.0.0.1", port=broker.port)
    await until(lambda: found(connected))
    await connected.async_block_till_done()
    assert [flow["context"]["unique_id"] for flow in found(connected)] == ["llm/last"]


async def test_a_worker_under_another_root_is_added_by_hand(
    start_worker: StartWorker, connected: HomeAssistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_flow, "STATUS_WITHIN_S", 1.0)
    await start_worker(worker_id="attic", mqtt__root="upstairs")
    form = await connected.config_entries.flow.async_init(DOMAIN, context={"source": SOURCE_USER})
    assert form["step_id"] == "user"

    async def fill(**given: str) -> Any:
        return await connected.config_entries.flow.async_configure(
            form["flow_id"], {"root": "upstairs", "worker": "attic", "first_level": "ha"} | given
        )

    assert (await fill(root="a/b", worker="x#", first_level=""))["errors"] == dict.fromkeys(
        ("root", "worker", "first_level"), "not_a_level"
    )
    assert (await fill(worker="cellar"))["errors"] == {"base": "no_status"}
    created = await fill()
    assert created["type"] is FlowResultType.CREATE_ENTRY
    assert created["title"] == "upstairs/attic"
    await connected.async_block_till_done()
    await until(lambda: created["result"].runtime_data.available)
    again = await connected.config_entries.flow.async_init(DOMAIN, context={"source": SOURCE_USER})
    form = again
    assert (await fill())["reason"] == "already_configured"


async def test_the_mqtt_user_is_offered_as_the_first_level(connected: HomeAssistant) -> None:
    """Access lists bind a client to `request/%u/...`."""

    def offered(form: Any) -> str:
        return next(str(key.default()) for key in form["data_schema"].schema if key == "first_level")

    form = await connected.config_entries.flow.async_init(DOMAIN, context={"source": SOURCE_USER})
    assert offered(form) == "homeassistant"
    (entry,) = connected.config_entries.async_entries("mqtt")
    connected.config_entries.async_update_entry(entry, data=dict(entry.data) | {"username": "ha-user"})
    await connected.async_block_till_done()
    form = await connected.config_entries.flow.async_init(DOMAIN, context={"source": SOURCE_USER})
    assert offered(form) == "ha-user"


async def test_another_first_level_can_be_chosen_later(home: Home, scripted: ScriptedWorker) -> None:
    form = await home.entry.start_reconfigure_flow(home.hass)
    wrong = await home.hass.config_entries.flow.async_configure(form["flow_id"], {"first_level": "a/b"})
    assert wrong["errors"] == {"first_level": "not_a_level"}
    done = await home.hass.config_entries.flow.async_configure(form["flow_id"], {"first_level": "ha2"})
    assert done["reason"] == "reconfigure_successful"
    await until(lambda: home.entry.runtime_data.available)
    assert home.entry.runtime_data.topic("request") == f"llm/request/ha2/{home.entry.entry_id}"
    assert await home.answer("Hello") == "Hello"


async def test_what_changes_no_option_interrupts_no_answer(home: Home) -> None:
    """A new title, or Home Assistant's note that it has discovered the worker again, is no reason to start anew."""
    before = home.entry.runtime_data
    home.hass.config_entries.async_update_entry(home.entry, title="Kitchen")
    await home.hass.async_block_till_done()
    assert home.entry.runtime_data is before


async def test_agents_and_tasks_are_added_and_changed(home: Home) -> None:
    flows = home.hass.config_entries.subentries
    form = await flows.async_init((home.entry.entry_id, "conversation"), context={"source": SOURCE_USER})
    created = await flows.async_configure(
        form["flow_id"],
        {"name": "Butler", "prompt": "Be brief.", "llm_hass_api": [], "thinking": "off", "max_tokens": 50},
    )
    assert created["type"] is FlowResultType.CREATE_ENTRY
    await home.hass.async_block_till_done()
    await until(lambda: home.hass.states.get("conversation.butler") is not None)
    butler = next(each for each in home.entry.subentries.values() if each.title == "Butler")
    assert dict(butler.data) == {"prompt": "Be brief.", "thinking": "off", "max_tokens": 50}
    again = await home.entry.start_subentry_reconfigure_flow(home.hass, butler.subentry_id)
    await flows.async_configure(again["flow_id"], {"prompt": "Be long.", "thinking": "worker", "model": "scripted"})
    assert dict(home.entry.subentries[butler.subentry_id].data) == {
        "prompt": "Be long.",
        "thinking": "worker",
        "model": "scripted",
    }
    await until(lambda: home.entry.state is ConfigEntryState.LOADED)
    form = await flows.async_init((home.entry.entry_id, "ai_task_data"), context={"source": SOURCE_USER})
    assert form["data_schema"] is not None
    models = next(field for key, field in form["data_schema"].schema.items() if key == "model").config["options"]
    assert models == ["scripted"]


async def test_diagnostics_tell_the_condition_and_no_word_of_the_prompts(
    home: Home, hass_client: ClientSessionGenerator
) -> None:
    await home.answer("The secret is 4711")
    told: Any = await get_diagnostics_for_config_entry(home.hass, hass_client, home.entry)
    text = json.dumps(told)
    assert "4711" not in text
    assert "You are kind." not in text
    assert home.entry.runtime_data.status.told["host"] not in text
    assert told["available"] is True
    assert told["requests"] == {"asked": 1, "ended": 1, "errors": 0, "cancelled": 0}
    assert told["status"]["engine"]["state"] == "ready"


async def test_without_mqtt_it_says_what_is_missing(hass: HomeAssistant) -> None:
    assert await async_setup_component(hass, "homeassistant", {})
    form = await hass.config_entries.flow.async_init(DOMAIN, context={"source": SOURCE_USER})
    assert form["reason"] == "mqtt_not_available"
    entry = MockConfigEntry(domain=DOMAIN, data={"root": "llm", "worker": "live", "first_level": "ha"})
    entry.add_to_hass(hass)
    assert not await hass.config_entries.async_setup(entry.entry_id)
