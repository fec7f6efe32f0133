"""The AI task: data by instructions, kept to a structure, with images."""

from __future__ import annotations

import json

from homeassistant.components import ai_task, conversation
from homeassistant.core import HomeAssistant
from homeassistant.helpers.entity_platform import AddConfigEntryEntitiesCallback

from .bus_worker import BusWorkerEntry
from .const import SUBENTRY_AI_TASK
from .entity import BusEntity
from .errors import sentence_error


async def async_setup_entry(
    hass: HomeAssistant, entry: BusWorkerEntry, async_add_entities: AddConfigEntryEntitiesCallback
) -> None:
    for subentry in entry.subentries.values():
        if subentry.subentry_type == SUBENTRY_AI_TASK:
            async_add_entities([BusTask(entry, subentry)], config_subentry_id=subentry.subentry_id)


class BusTask(BusEntity, ai_task.AITaskEntity):
    """Generates data."""

    @property
    def supported_features(self) -> ai_task.AITaskEntityFeature:
        """Attachments only where the model sees: an automation is told so before it asks."""
        features = ai_task.AITaskEntityFeature.GENERATE_DATA
        if self.worker.status is not None and self.worker.status.vision:
            features |= ai_task.AITaskEntityFeature.SUPPORT_ATTACHMENTS
        return features

    async def _async_generate_data(
        self, task: ai_task.GenDataTask, chat_log: conversation.ChatLog
    ) -> ai_task.GenDataTaskResult:
        await self.answer(chat_log, name=task.name, structure=task.structure)
        last = chat_log.content[-1]
        text = last.content or "" if isinstance(last, conversation.AssistantContent) else ""
        if task.structure is None:
            return ai_task.GenDataTaskResult(conversation_id=chat_log.conversation_id, data=text)
        try:
            data = json.loads(text)
        except ValueError as error:
            raise sentence_error("no_json", worker=self.worker.name, text=text[:100]) from error
        return ai_task.GenDataTaskResult(conversation_id=chat_log.conversation_id, data=data)
