"""Adding a worker (found by its retained status, or by hand), and its agents and AI tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import voluptuous as vol
from homeassistant.components import mqtt
from homeassistant.config_entries import (
    ConfigEntry,
    ConfigEntryState,
    ConfigFlow,
    ConfigFlowResult,
    ConfigSubentryData,
    ConfigSubentryFlow,
    SubentryFlowResult,
)
from homeassistant.const import CONF_LLM_HASS_API, CONF_MODEL, CONF_NAME, CONF_PROMPT, CONF_USERNAME
from homeassistant.core import HomeAssistant, callback
from homeassistant.helpers import llm
from homeassistant.helpers.selector import (
    NumberSelector,
    NumberSelectorConfig,
    NumberSelectorMode,
    SelectOptionDict,
    SelectSelector,
    SelectSelectorConfig,
    SelectSelectorMode,
    TemplateSelector,
    TextSelector,
)
from homeassistant.helpers.service_info.mqtt import MqttServiceInfo

from .const import (
    CONF_FIRST_LEVEL,
    CONF_MAX_TOKENS,
    CONF_ROOT,
    CONF_THINKING,
    CONF_WORKER,
    DEFAULT_FIRST_LEVEL,
    DEFAULT_ROOT,
    DOMAIN,
    STATUS_WITHIN_S,
    SUBENTRY_AI_TASK,
    SUBENTRY_CONVERSATION,
    THINKING_BY_WORKER,
    THINKING_OFF,
    THINKING_ON,
)
from .worker_status import LEVEL, WorkerStatus, parse_status


class BusWorkerFlow(ConfigFlow, domain=DOMAIN):
    """One config entry for each worker."""

    VERSION = 1

    def __init__(self) -> None:
        self._root = DEFAULT_ROOT
        self._worker = ""

    @classmethod
    @callback
    def async_get_supported_subentry_types(cls, config_entry: ConfigEntry) -> dict[str, type[ConfigSubentryFlow]]:
        return {SUBENTRY_CONVERSATION: AgentOptionsFlow, SUBENTRY_AI_TASK: TaskOptionsFlow}

    async def async_step_mqtt(self, discovery_info: MqttServiceInfo) -> ConfigFlowResult:
        """A retained status under the topics that the manifest names. Workers renew it every few seconds."""
        root, _, worker = discovery_info.topic.rpartition("/status/")
        status = parse_status(discovery_info.payload)
        if status is None or not root or not LEVEL.fullmatch(worker):
            return self.async_abort(reason="not_a_worker")
        if status.state != "online":
            return self.async_abort(reason="not_online")
        await self._identify(root, worker)
        self.context["title_placeholders"] = {"name": worker}
        return await self.async_step_confirm()

    async def async_step_confirm(self, user_input: dict[str, Any] | None = None) -> ConfigFlowResult:
        errors: dict[str, str] = {}
        if user_input is not None:
            first_level = user_input[CONF_FIRST_LEVEL].strip()
            if _is_level(first_level):
                return self._created(first_level)
            errors[CONF_FIRST_LEVEL] = "not_a_level"
        schema = vol.Schema({vol.Required(CONF_FIRST_LEVEL, default=_first_level(self.hass)): TextSelector()})
        return self.async_show_form(
            step_id="confirm",
            data_schema=self.add_suggested_values_to_schema(schema, user_input),
            description_placeholders={"worker": self._worker, "topic": f"{self._root}/status/{self._worker}"},
            errors=errors,
        )

    async def async_step_user(self, user_input: dict[str, Any] | None = None) -> ConfigFlowResult:
        """By hand: for a root that no manifest can know."""
        if not await mqtt.async_wait_for_mqtt_client(self.hass):
            return self.async_abort(reason="mqtt_not_available")
        errors: dict[str, str] = {}
        if user_input is not None:
            root, worker = user_input[CONF_ROOT].strip(), user_input[CONF_WORKER].strip()
            first_level = user_input[CONF_FIRST_LEVEL].strip()
            given = {CONF_ROOT: root, CONF_WORKER: worker, CONF_FIRST_LEVEL: first_level}
            errors = {name: "not_a_level" for name, text in given.items() if not _is_level(text)}
            if not errors:
                await self._identify(root, worker)
                if await async_status(self.hass, f"{root}/status/{worker}") is not None:
                    return self._created(first_level)
                errors["base"] = "no_status"
        schema = vol.Schema(
            {
                vol.Required(CONF_ROOT, default=DEFAULT_ROOT): TextSelector(),
                vol.Required(CONF_WORKER): TextSelector(),
                vol.Required(CONF_FIRST_LEVEL, default=_first_level(self.hass)): TextSelector(),
            }
        )
        return self.async_show_form(
            step_id="user", data_schema=self.add_suggested_values_to_schema(schema, user_input), errors=errors
        )

    async def async_step_reconfigure(self, user_input: dict[str, Any] | None = None) -> ConfigFlowResult:
        """Another first level, when the MQTT user or the broker's access list has changed."""
        entry = self._get_reconfigure_entry()
        errors: dict[str, str] = {}
        if user_input is not None:
            first_level = user_input[CONF_FIRST_LEVEL].strip()
            if _is_level(first_level):
                return self.async_update_reload_and_abort(entry, data_updates={CONF_FIRST_LEVEL: first_level})
            errors[CONF_FIRST_LEVEL] = "not_a_level"
        schema = vol.Schema({vol.Required(CONF_FIRST_LEVEL): TextSelector()})
        return self.async_show_form(
            step_id="reconfigure",
            data_schema=self.add_suggested_values_to_schema(schema, user_input or entry.data),
            errors=errors,
        )

    async def _identify(self, root: str, worker: str) -> None:
        self._root, self._worker = root, worker
        await self.async_set_unique_id(f"{root}/{worker}", raise_on_progress=self.source != "user")
        self._abort_if_unique_id_configured()

    def _created(self, first_level: str) -> ConfigFlowResult:
        """With one agent and one AI task, so that it can be talked to at once."""
        agent = {CONF_PROMPT: llm.DEFAULT_INSTRUCTIONS_PROMPT, CONF_LLM_HASS_API: [llm.LLM_API_ASSIST]}
        return self.async_create_entry(
            title=self._worker if self._root == DEFAULT_ROOT else f"{self._root}/{self._worker}",
            data={CONF_ROOT: self._root, CONF_WORKER: self._worker, CONF_FIRST_LEVEL: first_level},
            subentries=[
                _subentry(SUBENTRY_CONVERSATION, f"LLM {self._worker}", agent),
                _subentry(SUBENTRY_AI_TASK, f"LLM {self._worker} AI task", {}),
            ],
        )


class _OptionsFlow(ConfigSubentryFlow):
    """New options, or other ones, for one way to ask the worker."""

    async def async_step_set_options(self, user_input: dict[str, Any] | None = None) -> SubentryFlowResult:
        if self._get_entry().state is not ConfigEntryState.LOADED:
            return self.async_abort(reason="entry_not_loaded")
        if user_input is not None:
            name = user_input.pop(CONF_NAME, None)
            options = {name: value for name, value in user_input.items() if value not in (None, "", [])}
            if self.source == "user":
                return self.async_create_entry(title=name, data=options)
            return self.async_update_and_abort(self._get_entry(), self._get_reconfigure_subentry(), data=options)
        known = {} if self.source == "user" else self._get_reconfigure_subentry().data
        schema: dict[vol.Marker, Any] = {}
        if self.source == "user":
            schema[vol.Required(CONF_NAME, default=f"LLM {self._get_entry().data[CONF_WORKER]}")] = TextSelector()
        schema |= self._own_fields(known) | self._common_fields()
        return self.async_show_form(
            step_id="set_options", data_schema=self.add_suggested_values_to_schema(vol.Schema(schema), known)
        )

    async_step_user = async_step_set_options
    async_step_reconfigure = async_step_set_options

    def _own_fields(self, known: Mapping[str, Any]) -> dict[vol.Marker, Any]:
        return {}

    def _common_fields(self) -> dict[vol.Marker, Any]:
        status: WorkerStatus | None = self._get_entry().runtime_data.status
        models = list(status.models) if status is not None else []
        thinking = SelectSelectorConfig(
            options=[THINKING_BY_WORKER, THINKING_OFF, THINKING_ON],
            translation_key=CONF_THINKING,
            mode=SelectSelectorMode.DROPDOWN,
        )
        return {
            vol.Optional(CONF_MODEL): SelectSelector(
                SelectSelectorConfig(options=models, custom_value=True, mode=SelectSelectorMode.DROPDOWN)
            ),
            vol.Optional(CONF_THINKING, default=THINKING_BY_WORKER): SelectSelector(thinking),
            vol.Optional(CONF_MAX_TOKENS): NumberSelector(
                NumberSelectorConfig(min=1, max=1_000_000, step=1, mode=NumberSelectorMode.BOX)
            ),
        }


class AgentOptionsFlow(_OptionsFlow):
    """Of a conversation agent."""

    def _own_fields(self, known: Mapping[str, Any]) -> dict[vol.Marker, Any]:
        apis = [SelectOptionDict(label=api.name, value=api.id) for api in llm.async_get_apis(self.hass)]
        new = self.source == "user"
        prompt = vol.Optional(
            CONF_PROMPT, description={"suggested_value": known.get(CONF_PROMPT, llm.DEFAULT_INSTRUCTIONS_PROMPT)}
        )
        chosen = vol.Optional(CONF_LLM_HASS_API, default=[llm.LLM_API_ASSIST] if new else vol.UNDEFINED)
        return {
            prompt: TemplateSelector(),
            chosen: SelectSelector(SelectSelectorConfig(options=apis, multiple=True)),
        }


class TaskOptionsFlow(_OptionsFlow):
    """Of an AI task."""


async def async_status(hass: HomeAssistant, topic: str) -> WorkerStatus | None:
    """The status that the broker keeps, or None when none comes in time."""
    told: asyncio.Future[WorkerStatus] = hass.loop.create_future()

    @callback
    def received(message: mqtt.ReceiveMessage) -> None:
        status = parse_status(message.payload)
        if status is not None and not told.done():
            told.set_result(status)

    unsubscribe = await mqtt.async_subscribe(hass, topic, received, qos=1)
    try:
        async with asyncio.timeout(STATUS_WITHIN_S):
            return await told
    except TimeoutError:
        return None
    finally:
        unsubscribe()


def _subentry(kind: str, title: str, options: Mapping[str, Any]) -> ConfigSubentryData:
    return ConfigSubentryData(subentry_type=kind, title=title, data=options, unique_id=None)


def _is_level(text: str) -> bool:
    return LEVEL.fullmatch(text) is not None


def _first_level(hass: HomeAssistant) -> str:
    """Home Assistant's user at the broker where it has one: access lists bind clients to topics by it."""
    user = next((entry.data.get(CONF_USERNAME) for entry in hass.config_entries.async_entries(mqtt.DOMAIN)), None)
    return user if isinstance(user, str) and _is_level(user) else DEFAULT_FIRST_LEVEL
