"""The worker as a device: what its own discovery message makes of it in a real Home Assistant."""

from __future__ import annotations

from homeassistant.core import HomeAssistant
from homeassistant.helpers import device_registry as dr
from homeassistant.helpers import entity_registry as er

from tests.home_assistant.fixtures import StartWorker, until


async def test_the_worker_shows_itself_as_a_device_that_acts(
    connected: HomeAssistant, start_worker: StartWorker
) -> None:
    worker = await start_worker(home_assistant__discovery="true", status__health_every_s="1")
    devices = dr.async_get(connected)

    def device() -> dr.DeviceEntry | None:
        return next((each for each in devices.devices.values() if each.name == "LLM live"), None)

    await until(lambda: device() is not None)
    found = device()
    assert found is not None
    wanted = {"sensor.llm_live_state", "sensor.llm_live_queue", "button.llm_live_cancel_all", "notify.llm_live_ask"}
    wanted |= {"switch.llm_live_accept_requests", "sensor.llm_live_last_answer"}

    def entities() -> set[str]:
        entries = er.async_entries_for_device(er.async_get(connected), found.id)
        return {entry.entity_id for entry in entries}

    await until(lambda: wanted <= entities())

    def state(entity_id: str) -> str:
        held = connected.states.get(entity_id)
        return held.state if held is not None else "missing"

    await until(lambda: state("sensor.llm_live_state") == "online")
    await until(lambda: state("sensor.llm_live_queue") == "0")
    worker.play("It is ", "noon.")
    ask = {"entity_id": "notify.llm_live_ask", "message": "What time is it?"}
    await connected.services.async_call("notify", "send_message", ask, blocking=True)
    await until(lambda: state("sensor.llm_live_last_answer") == "It is noon.")
    switch = "switch.llm_live_accept_requests"
    await connected.services.async_call("switch", "turn_off", {"entity_id": switch}, blocking=True)
    await until(lambda: state("sensor.llm_live_state") == "draining")
    await connected.services.async_call("switch", "turn_on", {"entity_id": switch}, blocking=True)
    await until(lambda: state("sensor.llm_live_state") == "online")
    await worker.stop()
    await until(lambda: state("sensor.llm_live_state") in ("offline", "unavailable"))
