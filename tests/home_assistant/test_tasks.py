"""The AI task in a real Home Assistant: data in a structure, images, and sentences where that cannot be."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from homeassistant.components import ai_task, conversation
from homeassistant.components.ai_task.const import DATA_COMPONENT
from homeassistant.core import HomeAssistant
from homeassistant.exceptions import HomeAssistantError

from tests.home_assistant.fixtures import TASK, Home, ScriptedWorker, StartWorker, add_entry, until

STRUCTURE = {
    "colour": {"selector": {"text": None}, "required": True},
    "count": {"selector": {"number": {"min": 0, "max": 9}}},
}
IMAGE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


async def generate(home: Home, instructions: str, **more: Any) -> Any:
    """As an automation does it, by the action `ai_task.generate_data`."""
    answer = await home.hass.services.async_call(
        "ai_task",
        "generate_data",
        {"task_name": "Berries of today", "entity_id": TASK, "instructions": instructions, **more},
        blocking=True,
        return_response=True,
    )
    assert answer is not None
    return answer["data"]


async def test_text_is_generated(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("A short ", "poem.")
    assert await generate(home, "Write a poem") == "A short poem."
    assert scripted.calls[0]["response_format"] is None
    assert scripted.calls[0]["messages"][-1] == {"role": "user", "content": "Write a poem"}


async def test_data_keeps_to_its_structure(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play('{"colour": "red",', ' "count": 3}')
    assert await generate(home, "Which berries?", structure=STRUCTURE) == {"colour": "red", "count": 3}
    asked = scripted.calls[0]["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["name"] == "berries_of_today"
    schema = asked["json_schema"]["schema"]
    assert schema["required"] == ["colour"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["colour"] == {"type": "string"}
    assert set(schema["properties"]) == {"colour", "count"}


async def test_an_answer_outside_of_the_structure_is_told(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("Red ones.")
    with pytest.raises(HomeAssistantError, match="did not answer in the structure that was asked for: Red ones"):
        await generate(home, "Which berries?", structure=STRUCTURE)


async def test_an_image_goes_along_as_a_data_url(
    connected: HomeAssistant, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = await start_worker(sees=True)
    entry = await add_entry(connected)
    await until(lambda: entry.runtime_data.available)
    features = connected.states.get(TASK).attributes["supported_features"]  # type: ignore[union-attr]
    assert features & ai_task.AITaskEntityFeature.SUPPORT_ATTACHMENTS
    picture = tmp_path / "berries.png"
    picture.write_bytes(IMAGE)
    worker.play("Red.")
    assert await generate_with(connected, entry, picture, "image/png") == "Red."
    text, image = worker.calls[0]["messages"][-1]["content"]
    assert text == {"type": "text", "text": "Which colour?"}
    assert image["image_url"]["url"] == "data:image/png;base64," + base64.b64encode(IMAGE).decode()


async def test_what_is_no_image_or_too_large_or_gone_is_told(
    connected: HomeAssistant, start_worker: StartWorker, tmp_path: Path
) -> None:
    await start_worker(sees=True, limits__max_request_bytes="65536")
    entry = await add_entry(connected)
    await until(lambda: entry.runtime_data.available)
    note, large = tmp_path / "note.pdf", tmp_path / "large.png"
    note.write_bytes(b"%PDF")
    large.write_bytes(IMAGE + bytes(65536))
    with pytest.raises(HomeAssistantError, match=r"note\.pdf is of the type application/pdf; only images"):
        await generate_with(connected, entry, note, "application/pdf")
    with pytest.raises(HomeAssistantError, match="too large"):
        await generate_with(connected, entry, large, "image/png")
    with pytest.raises(HomeAssistantError, match=r"gone\.png cannot be read: No such file"):
        await generate_with(connected, entry, tmp_path / "gone.png", "image/png")


async def test_a_model_that_sees_nothing_takes_no_images(home: Home, tmp_path: Path) -> None:
    features = home.hass.states.get(TASK).attributes["supported_features"]  # type: ignore[union-attr]
    assert not features & ai_task.AITaskEntityFeature.SUPPORT_ATTACHMENTS
    with pytest.raises(HomeAssistantError, match="does not support attachments"):
        await generate(
            home,
            "Which colour?",
            attachments=[{"media_content_id": "media-source://x/y", "media_content_type": "image/png"}],
        )


async def generate_with(hass: HomeAssistant, entry: Any, file: Path, mime_type: str) -> Any:
    """With a file as Home Assistant hands it to the entity once it has resolved the media source."""
    from homeassistant.helpers.chat_session import async_get_chat_session

    entity = hass.data[DATA_COMPONENT].get_entity(TASK)
    assert entity is not None
    attachment = conversation.Attachment(media_content_id="media-source://x/y", mime_type=mime_type, path=file)
    with async_get_chat_session(hass) as session:
        result = await entity.internal_async_generate_data(
            session, ai_task.GenDataTask(name="Colour", instructions="Which colour?", attachments=[attachment])
        )
    return result.data
