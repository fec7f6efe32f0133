"""What the conversation agent and the AI task have in common: asking in rounds until the model calls no more tools."""

from __future__ import annotations

from typing import Any

import voluptuous as vol
from homeassistant.components import conversation
from homeassistant.config_entries import ConfigSubentry
from homeassistant.const import CONF_MODEL
from homeassistant.core import callback
from homeassistant.helpers import device_registry as dr
from homeassistant.helpers.entity import Entity

from .bus_worker import BusWorker, BusWorkerEntry
from .const import CONF_MAX_TOKENS, CONF_THINKING, DOMAIN, MAX_ROUNDS, THINKING_OFF, THINKING_ON
from .errors import sentence_error
from .messages import deltas, message_for, response_format, tool_for


class BusEntity(Entity):
    """One subentry: a way to ask the worker, with options of its own."""

    _attr_has_entity_name = True
    _attr_name = None
    _attr_should_poll = False

    def __init__(self, entry: BusWorkerEntry, subentry: ConfigSubentry) -> None:
        self.entry = entry
        self.subentry = subentry
        self._attr_unique_id = subentry.subentry_id
        self._attr_device_info = dr.DeviceInfo(
            identifiers={(DOMAIN, subentry.subentry_id)},
            name=subentry.title,
            manufacturer="llamacpp-mqtt-deploy",
            model=self._model(),
            sw_version=self._version(),
            entry_type=dr.DeviceEntryType.SERVICE,
        )

    @property
    def worker(self) -> BusWorker:
        return self.entry.runtime_data

    @property
    def available(self) -> bool:
        return self.worker.available

    async def async_added_to_hass(self) -> None:
        await super().async_added_to_hass()
        self.async_on_remove(self.worker.listen(self._worker_changed))

    @callback
    def _worker_changed(self) -> None:
        # Home Assistant reads an entity's device_info once; the worker may come back as another version, with another model.
        if self.device_entry is not None and self.worker.available:
            dr.async_get(self.hass).async_update_device(
                self.device_entry.id, model=self._model(), sw_version=self._version()
            )
        self.async_write_ha_state()

    def _model(self) -> str | None:
        status = self.worker.status
        models = status.models if status is not None else ()
        return self.subentry.data.get(CONF_MODEL) or (models[0] if models else None)

    def _version(self) -> str | None:
        return self.worker.status.version if self.worker.status is not None else None

    async def answer(
        self, chat_log: conversation.ChatLog, *, name: str | None = None, structure: vol.Schema | None = None
    ) -> None:
        """Ask, call the tools that the model wants, and ask again, until it answers."""
        body = self._body(chat_log)
        if structure is not None:
            body["response_format"] = response_format(name or "data", structure, chat_log.llm_api)
        messages = [await message_for(self.hass, self.worker, content) for content in chat_log.content]
        for turn in range(MAX_ROUNDS):
            body["messages"] = [message for message in messages if message is not None]
            async with self.worker.asking(body, wait_for_worker=turn > 0) as asking:
                stream = chat_log.async_add_delta_content_stream(self.entity_id, deltas(self.worker, asking))
                messages += [await message_for(self.hass, self.worker, content) async for content in stream]
            if not chat_log.unresponded_tool_results:
                return
        raise sentence_error("too_many_rounds", rounds=str(MAX_ROUNDS))

    def _body(self, chat_log: conversation.ChatLog) -> dict[str, Any]:
        options = self.subentry.data
        body: dict[str, Any] = {}
        if model := options.get(CONF_MODEL):
            body["model"] = model
        if max_tokens := options.get(CONF_MAX_TOKENS):
            body["max_tokens"] = int(max_tokens)
        if options.get(CONF_THINKING) in (THINKING_ON, THINKING_OFF):
            body["thinking"] = options[CONF_THINKING] == THINKING_ON
        if chat_log.llm_api is not None and chat_log.llm_api.tools:
            serializer = chat_log.llm_api.custom_serializer
            body["tools"] = [tool_for(tool, serializer) for tool in chat_log.llm_api.tools]
        return body
