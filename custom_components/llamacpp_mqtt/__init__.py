"""A language model on the MQTT bus as a conversation agent and AI task of Home Assistant."""

from __future__ import annotations

from typing import Any

from homeassistant.components import mqtt
from homeassistant.const import Platform
from homeassistant.core import HomeAssistant
from homeassistant.exceptions import ConfigEntryNotReady

from .bus_worker import BusWorker, BusWorkerEntry
from .const import DOMAIN

PLATFORMS = (Platform.AI_TASK, Platform.CONVERSATION)


async def async_setup_entry(hass: HomeAssistant, entry: BusWorkerEntry) -> bool:
    if not await mqtt.async_wait_for_mqtt_client(hass):
        raise ConfigEntryNotReady(translation_domain=DOMAIN, translation_key="mqtt_not_available")
    entry.runtime_data = BusWorker(hass, entry)
    await entry.runtime_data.start()
    await hass.config_entries.async_forward_entry_setups(entry, PLATFORMS)
    options = _options(entry)

    async def changed(hass: HomeAssistant, entry: BusWorkerEntry) -> None:
        # A new title, or a note that the worker was discovered again, interrupts no answer.
        if _options(entry) != options:
            await hass.config_entries.async_reload(entry.entry_id)

    entry.async_on_unload(entry.add_update_listener(changed))
    return True


async def async_unload_entry(hass: HomeAssistant, entry: BusWorkerEntry) -> bool:
    return await hass.config_entries.async_unload_platforms(entry, PLATFORMS)


def _options(entry: BusWorkerEntry) -> tuple[Any, ...]:
    """All that the entities were made of."""
    agents = {name: (subentry.title, dict(subentry.data)) for name, subentry in entry.subentries.items()}
    return dict(entry.data), agents
