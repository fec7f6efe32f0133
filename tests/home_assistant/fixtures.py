"""A Home Assistant with a light, connected to a real broker, and workers that do what the test says."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
from homeassistant.components import mqtt
from homeassistant.components.homeassistant.exposed_entities import async_expose_entity
from homeassistant.components.light import LightEntity
from homeassistant.components.light.const import DATA_COMPONENT, ColorMode
from homeassistant.const import CONF_LLM_HASS_API, CONF_PROMPT
from homeassistant.core import Context, HomeAssistant
from homeassistant.helpers import intent
from homeassistant.setup import async_setup_component
from pytest_homeassistant_custom_component.common import MockConfigEntry, MockUser

from custom_components.llamacpp_mqtt.const import CONF_FIRST_LEVEL, CONF_ROOT, CONF_WORKER, DOMAIN
from tests.support.mosquitto import Mosquitto

WORKER_PYTHON = "/worker/bin/python"
REPOSITORY = Path(__file__).parents[2]
LIGHT = "light.kitchen_light"
AGENT = "conversation.agent"
TASK = "ai_task.task"


async def until(predicate: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Let the event loop run until this is so."""
    ends_at = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < ends_at, f"not so within {timeout_s:g} s"
        await asyncio.sleep(0.01)


def environment() -> dict[str, str]:
    """Of a worker: nothing that would configure it, and the product's source."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMD_", "PYTEST_"))}
    return kept | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}


class ScriptedWorker:
    """scripted_worker.py in the worker's own Python."""

    def __init__(self, port: int, folder: Path, *, sees: bool = False, **settings: str) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._arguments = [str(port), str(folder), "sees" if sees else "blind", json.dumps(settings)]
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.said: list[dict[str, Any]] = []

    async def start(self) -> Self:
        with (self._folder / "worker.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                WORKER_PYTHON,
                "-m",
                "tests.home_assistant.scripted_worker",
                *self._arguments,
                cwd=REPOSITORY,
                env=environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=16 * 1024 * 1024,
            )
        self.said.clear()
        self._reading = asyncio.create_task(self._read(self._process))
        await self.until("online")
        return self

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            self.said.append(json.loads(line))

    async def stop(self) -> None:
        """As `systemctl stop`: it says goodbye."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._ended()

    async def kill(self) -> None:
        """As a power cut."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._ended()

    async def _ended(self) -> None:
        assert self._process is not None
        assert self._reading is not None
        async with asyncio.timeout(30):
            await self._process.wait()
            await self._reading
        self._process = None

    async def close(self) -> None:
        if self._process is not None:
            await self.kill()

    def tell(self, **command: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    def play(self, *steps: Any) -> None:
        self.tell(play=steps)

    def open(self, gate: str) -> None:
        self.tell(open=gate)

    async def until(self, name: str, value: Any = None, timeout_s: float = 30.0) -> None:
        """Until it has said this."""

        def has_said() -> bool:
            return any(name in told and value in (None, told[name]) for told in self.said)

        try:
            await until(has_said, timeout_s)
        except AssertionError:
            log = (self._folder / "worker.log").read_text(errors="replace")[-2000:]
            raise AssertionError(f"the worker did not say {name}={value}; it said {self.said[-3:]}; {log}") from None

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What its engine was asked."""
        return [told["call"] for told in self.said if "call" in told]


StartWorker = Callable[..., Awaitable[ScriptedWorker]]


class Home:
    """What a test holds: Home Assistant, and its config entry for the worker."""

    def __init__(self, hass: HomeAssistant, entry: MockConfigEntry) -> None:
        self.hass = hass
        self.entry = entry

    async def say(self, text: str, *, conversation_id: str | None = None, language: str = "en") -> Any:
        """What Assist does with a sentence: the intent response and the conversation's id."""
        from homeassistant.components import conversation

        return await conversation.async_converse(
            self.hass, text, conversation_id, Context(), language=language, agent_id=AGENT
        )

    async def answer(self, text: str, **options: Any) -> str:
        result = await self.say(text, **options)
        assert result.response.response_type is not intent.IntentResponseType.ERROR, speech(result)
        return speech(result)

    async def refusal(self, text: str, **options: Any) -> str:
        result = await self.say(text, **options)
        assert result.response.response_type is intent.IntentResponseType.ERROR, speech(result)
        return speech(result)

    def state(self, entity_id: str) -> str:
        state = self.hass.states.get(entity_id)
        assert state is not None, self.hass.states.async_entity_ids()
        return state.state


def speech(result: Any) -> str:
    text: str = result.response.speech["plain"]["speech"]
    return text


class KitchenLight(LightEntity):
    """A light that does what it is told."""

    _attr_name = "Kitchen Light"
    _attr_unique_id = "kitchen"
    _attr_should_poll = False
    _attr_supported_color_modes = {ColorMode.ONOFF}  # noqa: RUF012 - as Home Assistant's entities say it
    _attr_color_mode = ColorMode.ONOFF
    _attr_is_on = False

    async def async_turn_on(self, **kwargs: Any) -> None:
        self._attr_is_on = True
        self.async_write_ha_state()

    async def async_turn_off(self, **kwargs: Any) -> None:
        self._attr_is_on = False
        self.async_write_ha_state()


@pytest.fixture(autouse=True)
def auto_enable_custom_integrations(enable_custom_integrations: None) -> None:
    """Ours is one."""


@pytest.fixture
def sockets(socket_enabled: None) -> None:
    """The broker is real."""


@pytest.fixture
def access_list() -> bool:
    """Whether the broker keeps to the shipped access list, with a user for the worker and one for Home Assistant."""
    return False


@pytest.fixture
def broker(sockets: None, access_list: bool, tmp_path: Path) -> Iterator[Mosquitto]:
    acl = (REPOSITORY / "config" / "mosquitto.acl").read_text("utf-8")
    bound = {"users": {"llm-worker": "w", "homeassistant": "h"}, "acl": acl} if access_list else {}
    broker = Mosquitto(tmp_path / "broker", persistence=True, **bound).start()  # type: ignore[arg-type]
    yield broker
    broker.close()


@pytest.fixture
async def start_worker(broker: Mosquitto, tmp_path: Path) -> AsyncIterator[StartWorker]:
    workers: list[ScriptedWorker] = []

    async def start(*, worker_id: str = "live", sees: bool = False, **settings: str) -> ScriptedWorker:
        folder = tmp_path / worker_id
        worker = ScriptedWorker(broker.port, folder, sees=sees, mqtt__worker_id=worker_id, **settings)
        workers.append(worker)
        return await worker.start()

    yield start
    for worker in workers:
        await worker.close()


@pytest.fixture
async def scripted(start_worker: StartWorker) -> ScriptedWorker:
    """A worker named `live` under the root `llm`."""
    return await start_worker()


@pytest.fixture
async def connected(
    hass: HomeAssistant, mock_hass_config: None, access_list: bool, broker: Mosquitto
) -> AsyncIterator[HomeAssistant]:
    """Home Assistant with its MQTT integration at the broker, Assist and an exposed light; nothing of ours yet."""
    for component in (
        "homeassistant",
        "conversation",
        "assist_pipeline",
        "intent",
        "repairs",
        "diagnostics",
        "ai_task",
    ):
        assert await async_setup_component(hass, component, {})
    await add_light(hass)
    entry = MockConfigEntry(
        domain=mqtt.DOMAIN,
        data={"broker": "127.0.0.1", "port": broker.port, "protocol": "3.1.1"}
        | ({"username": "homeassistant", "password": "h"} if access_list else {}),
        # Home Assistant's task that publishes its birth message fails when the broker goes away meanwhile.
        options={"birth_message": {}},
        version=mqtt.CONFIG_ENTRY_VERSION,
        minor_version=mqtt.CONFIG_ENTRY_MINOR_VERSION,
    )
    entry.add_to_hass(hass)
    assert await hass.config_entries.async_setup(entry.entry_id)
    await until(lambda: mqtt.is_connected(hass))
    yield hass
    for each in hass.config_entries.async_entries(DOMAIN):
        await hass.config_entries.async_unload(each.entry_id)
    await hass.config_entries.async_unload(entry.entry_id)
    await hass.async_block_till_done()


async def add_light(hass: HomeAssistant) -> None:
    assert await async_setup_component(hass, "light", {})
    await hass.data[DATA_COMPONENT].async_add_entities([KitchenLight()])
    async_expose_entity(hass, "conversation", LIGHT, True)
    assert hass.states.get(LIGHT) is not None


async def add_entry(
    hass: HomeAssistant,
    *,
    worker: str = "live",
    root: str = "llm",
    first_level: str = "homeassistant",
    suffix: str = "",
    **options: Any,
) -> MockConfigEntry:
    """A config entry as the flow makes it; `options` are those of both subentries."""
    from homeassistant.config_entries import ConfigSubentryData

    agent = {CONF_PROMPT: "You are kind.", CONF_LLM_HASS_API: ["assist"]}
    entry = MockConfigEntry(
        domain=DOMAIN,
        title=worker,
        unique_id=f"{root}/{worker}",
        data={CONF_ROOT: root, CONF_WORKER: worker, CONF_FIRST_LEVEL: first_level},
        subentries_data=[
            ConfigSubentryData(
                data=agent | options, subentry_type="conversation", title=f"Agent{suffix}", unique_id=None
            ),
            ConfigSubentryData(data=options, subentry_type="ai_task_data", title=f"Task{suffix}", unique_id=None),
        ],
    )
    entry.add_to_hass(hass)
    assert await hass.config_entries.async_setup(entry.entry_id)
    await hass.async_block_till_done()
    return entry


@pytest.fixture
async def home(connected: HomeAssistant, scripted: ScriptedWorker, hass_admin_user: MockUser) -> Home:
    """All of it, with the worker `live` set up and there."""
    entry = await add_entry(connected)
    await until(lambda: entry.runtime_data.available)
    return Home(connected, entry)
