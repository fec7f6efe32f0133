"""The conversation agent: Assist's words over the bus, answers as they come, tools of the house in between."""

from __future__ import annotations

from typing import Literal

from homeassistant.components import conversation
from homeassistant.components.conversation.models import AbstractConversationAgent
from homeassistant.config_entries import ConfigSubentry
from homeassistant.const import CONF_LLM_HASS_API, CONF_PROMPT, MATCH_ALL
from homeassistant.core import HomeAssistant
from homeassistant.exceptions import HomeAssistantError
from homeassistant.helpers import intent
from homeassistant.helpers.entity_platform import AddConfigEntryEntitiesCallback

from .bus_worker import BusWorkerEntry
from .const import DOMAIN, LOGGER, SUBENTRY_CONVERSATION
from .entity import BusEntity
from .errors import async_sentence


async def async_setup_entry(
    hass: HomeAssistant, entry: BusWorkerEntry, async_add_entities: AddConfigEntryEntitiesCallback
) -> None:
    for subentry in entry.subentries.values():
        if subentry.subentry_type == SUBENTRY_CONVERSATION:
            async_add_entities([BusAgent(entry, subentry)], config_subentry_id=subentry.subentry_id)


class BusAgent(BusEntity, conversation.ConversationEntity, AbstractConversationAgent):
    """Answers what is said to Assist."""

    _attr_supports_streaming = True

    def __init__(self, entry: BusWorkerEntry, subentry: ConfigSubentry) -> None:
        super().__init__(entry, subentry)
        if subentry.data.get(CONF_LLM_HASS_API):
            self._attr_supported_features = conversation.ConversationEntityFeature.CONTROL

    @property
    def supported_languages(self) -> list[str] | Literal["*"]:
        return MATCH_ALL

    async def async_added_to_hass(self) -> None:
        await super().async_added_to_hass()
        conversation.async_set_agent(self.hass, self.entry, self)

    async def async_will_remove_from_hass(self) -> None:
        conversation.async_unset_agent(self.hass, self.entry)
        await super().async_will_remove_from_hass()

    async def _async_handle_message(
        self, user_input: conversation.ConversationInput, chat_log: conversation.ChatLog
    ) -> conversation.ConversationResult:
        options = self.subentry.data
        try:
            await chat_log.async_provide_llm_data(
                user_input.as_llm_context(DOMAIN),
                options.get(CONF_LLM_HASS_API),
                options.get(CONF_PROMPT),
                user_input.extra_system_prompt,
            )
        except conversation.ConverseError as error:
            return error.as_conversation_result()
        before = len(chat_log.content)
        try:
            await self.answer(chat_log)
        except HomeAssistantError as error:
            # As on the worker, an error leaves nothing in the dialogue: half an answer breaks many chat templates.
            del chat_log.content[before:]
            said = await async_sentence(self.hass, user_input.language, error)
            LOGGER.warning("%s: %s", self.entity_id, error)
            response = intent.IntentResponse(language=user_input.language)
            response.async_set_error(intent.IntentResponseErrorCode.UNKNOWN, said)
            return conversation.ConversationResult(response=response, conversation_id=chat_log.conversation_id)
        return conversation.async_get_result_from_chat_log(user_input, chat_log)
