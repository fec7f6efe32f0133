"""From a bare Home Assistant to a streamed answer: `lmd run` as it is shipped, llama.cpp, and the demo model."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from homeassistant.core import HomeAssistant

from tests.home_assistant.fixtures import REPOSITORY, WORKER_PYTHON, Home, add_entry, environment, until
from tests.support.mosquitto import Mosquitto


@pytest.fixture
def demo_worker(broker: Mosquitto, tmp_path: Path) -> Iterator[None]:
    settings = {
        "MQTT__HOST": "127.0.0.1",
        "MQTT__PORT": str(broker.port),
        "MQTT__WORKER_ID": "demo",
        "ENGINE__KIND": "managed",
        "ENGINE__MODEL_PATH": str(REPOSITORY / "llamacpp_mqtt_deploy" / "demo_model" / "demo.gguf"),
        "ENGINE__CONTEXT_TOKENS": "1024",
        "ENGINE__THREADS": "1",
        "GENERATION__TEMPERATURE": "0",
        "SESSIONS__PATH": str(tmp_path / "state.db"),
    }
    with (tmp_path / "demo.log").open("wb") as log:
        process = subprocess.Popen(
            [WORKER_PYTHON, "-m", "llamacpp_mqtt_deploy", "run"],
            cwd=tmp_path,
            env=environment() | {f"LMD_{name}": value for name, value in settings.items()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    yield
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()


@pytest.mark.usefixtures("demo_worker")
async def test_a_real_model_answers_assist(connected: HomeAssistant) -> None:
    entry = await add_entry(connected, worker="demo", llm_hass_api=[], prompt="", max_tokens=40)
    await until(lambda: entry.runtime_data.available, 60)
    answer = await Home(connected, entry).answer("What is MQTT?")
    assert "MQTT" in answer
    assert entry.runtime_data.counts["ended"] == 1
