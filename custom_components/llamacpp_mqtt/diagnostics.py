"""What helps to find a fault: condition and counts. No word of prompts and answers, no address of a machine or a person."""

from __future__ import annotations

from typing import Any

from homeassistant.components.diagnostics import async_redact_data
from homeassistant.const import CONF_PROMPT
from homeassistant.core import HomeAssistant

from .bus_worker import BusWorkerEntry
from .const import CONF_FIRST_LEVEL

REDACTED = {CONF_PROMPT, CONF_FIRST_LEVEL, "host", "instance", "problem", "detail", "routes"}
"""`first_level` may be a user name; `problem` and `detail` are sentences that may name paths."""


async def async_get_config_entry_diagnostics(hass: HomeAssistant, entry: BusWorkerEntry) -> dict[str, Any]:
    worker = entry.runtime_data
    return {
        "entry": async_redact_data(dict(entry.data), REDACTED),
        "subentries": [
            {"type": subentry.subentry_type, "options": async_redact_data(dict(subentry.data), REDACTED)}
            for subentry in entry.subentries.values()
        ],
        "available": worker.available,
        "status": async_redact_data(dict(worker.status.told), REDACTED) if worker.status is not None else None,
        "requests": worker.counts,
        "last_error": worker.last_error,
    }
