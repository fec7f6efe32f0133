"""The conversation agent in a real Home Assistant: it answers, acts, streams, is cancelled and survives what breaks."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from homeassistant.components import mqtt
from homeassistant.const import STATE_UNAVAILABLE
from homeassistant.core import HomeAssistant
from homeassistant.helpers import issue_registry as ir
from homeassistant.util import dt as dt_util
from pytest_homeassistant_custom_component.common import async_fire_time_changed
from pytest_homeassistant_custom_component.typing import WebSocketGenerator

from custom_components.llamacpp_mqtt import resend_rules
from custom_components.llamacpp_mqtt.const import DOMAIN, GONE_AFTER_S
from tests.home_assistant.fixtures import (
    AGENT,
    LIGHT,
    TASK,
    Home,
    ScriptedWorker,
    StartWorker,
    add_entry,
    speech,
    until,
)
from tests.support.mosquitto import Mosquitto


async def test_what_is_said_is_answered(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("The sea ", "is ", "blue.")
    assert await home.answer("What colour is the sea?") == "The sea is blue."
    (call,) = scripted.calls
    assert [message["role"] for message in call["messages"]] == ["system", "user"]
    assert "You are kind." in call["messages"][0]["content"]
    assert call["messages"][1]["content"] == "What colour is the sea?"
    assert "HassTurnOn" in {tool["function"]["name"] for tool in call["tools"]}


async def test_turn_on_the_kitchen_light_turns_it_on(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play(
        {"thinks": "The light."},
        {"calls": [0, "HassTurnOn", '{"name": "Kit']},
        {"more": [0, 'chen Light"}']},
        {"finish": "tool_calls"},
    )
    scripted.play("The kitchen ", "light is on.")
    assert home.state(LIGHT) == "off"
    assert await home.answer("Turn on the kitchen light") == "The kitchen light is on."
    assert home.state(LIGHT) == "on"
    first, second = scripted.calls
    assert first["messages"] == second["messages"][: len(first["messages"])]
    called, result = second["messages"][len(first["messages"]) :]
    assert called["tool_calls"][0]["function"]["name"] == "HassTurnOn"
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"name": "Kitchen Light"}
    assert result["role"] == "tool"
    assert result["tool_call_id"] == called["tool_calls"][0]["id"]
    assert json.loads(result["content"])["response_type"] == "action_done"


async def test_a_dialogue_is_remembered(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("Hello Ada.")
    first = await home.say("I am Ada")
    scripted.play("Ada.")
    assert speech(await home.say("Who am I?", conversation_id=first.conversation_id)) == "Ada."
    told = [message["content"] for message in scripted.calls[1]["messages"][1:]]
    assert told == ["I am Ada", "Hello Ada.", "Who am I?"]


async def test_thinking_is_not_said(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play({"thinks": "Hm, "}, {"thinks": "four."}, "Four.")
    assert await home.answer("Two and two?") == "Four."


async def test_an_answer_streams_into_the_pipeline(
    home: Home, scripted: ScriptedWorker, hass_ws_client: WebSocketGenerator
) -> None:
    scripted.play({"thinks": "Hm."}, "One ", "two ", {"gate": "middle"}, "three.")
    client = await hass_ws_client(home.hass)
    pipeline = await create_pipeline(client)
    said: list[str] = []
    held = True
    await client.send_json_auto_id(run_request(pipeline, "Count"))
    while True:
        event = (await client.receive_json()).get("event")
        if event is None:
            continue
        if event["type"] == "intent-progress":
            said.append(event["data"]["chat_log_delta"].get("content") or "")
        if held and "".join(said) == "One two ":
            # The model stands in mid-answer, and the first words are on the screen.
            await scripted.until("reached", "middle")
            scripted.open("middle")
            held = False
        if event["type"] == "intent-end":
            break
    assert "".join(said) == "One two three."
    assert event["data"]["intent_output"]["response"]["speech"]["plain"]["speech"] == "One two three."


async def test_a_dialog_that_is_closed_cancels_the_answer(
    home: Home, scripted: ScriptedWorker, hass_ws_client: WebSocketGenerator
) -> None:
    scripted.play("One ", {"gate": "never"}, "two.")
    client = await hass_ws_client(home.hass)
    await client.send_json_auto_id(run_request(await create_pipeline(client), "Count"))
    await scripted.until("reached", "never")
    await client.close()
    await scripted.until("ended", "cancelled")
    worker = home.entry.runtime_data
    await until(lambda: worker.counts["cancelled"] == 1)
    assert await home.answer("Still there?") == "Still there?"


async def test_a_task_that_is_cancelled_cancels_the_answer(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("One ", {"gate": "never"}, "two.")
    saying = asyncio.create_task(home.say("Count"))
    await scripted.until("reached", "never")
    saying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saying
    await scripted.until("ended", "cancelled")


async def test_an_answer_under_way_ends_where_its_options_are_changed(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("One ", {"gate": "never"}, "two.")
    saying = asyncio.create_task(home.refusal("Count"))
    await scripted.until("reached", "never")
    await home.hass.config_entries.async_reload(home.entry.entry_id)
    async with asyncio.timeout(30):  # else it is given up after minutes of silence
        assert await saying == "The answer of live broke off. Please ask again."
    await scripted.until("ended", "cancelled")
    await until(lambda: home.entry.runtime_data.available)
    assert await home.answer("Still there?") == "Still there?"


@pytest.mark.parametrize("how", ["restarted", "killed"])
async def test_a_broker_that_restarts_in_mid_answer_costs_no_word_and_doubles_none(
    home: Home, scripted: ScriptedWorker, broker: Mosquitto, how: str
) -> None:
    scripted.play("one ", "two ", {"gate": "middle"}, "three ", "four")
    saying = asyncio.create_task(home.answer("Count"))
    await scripted.until("reached", "middle")
    broker.stop() if how == "restarted" else broker.kill()
    await until(lambda: not home.entry.runtime_data.available)
    assert home.state(AGENT) == STATE_UNAVAILABLE
    scripted.open("middle")
    broker.start()
    async with asyncio.timeout(30):  # three heartbeats of silence, 45 s, would bring it too
        assert await saying == "one two three four"
    assert len(scripted.calls) == 1
    await until(lambda: home.state(AGENT) != STATE_UNAVAILABLE)


async def test_a_worker_that_dies_in_mid_answer_is_told_in_a_sentence(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play("one ", {"gate": "middle"}, "two")
    told: list[Any] = []
    unsubscribe = await mqtt.async_subscribe(home.hass, "llm/reply/#", told.append)
    saying = asyncio.create_task(home.refusal("Zähle", language="de"))
    await scripted.until("reached", "middle")
    # Until the journal knows that the stream has begun a worker that dies runs the request again, and nobody notices.
    await until(lambda: any(json.loads(message.payload)["type"] == "chunk" for message in told))
    unsubscribe()
    await scripted.kill()
    await scripted.start()
    async with asyncio.timeout(60):
        assert await saying == "Die Antwort von live brach ab. Bitte noch einmal fragen."


async def test_a_worker_that_is_away_is_told_at_once(home: Home, scripted: ScriptedWorker) -> None:
    await scripted.stop()
    await until(lambda: home.state(AGENT) == STATE_UNAVAILABLE)
    assert home.state(TASK) == STATE_UNAVAILABLE
    assert await home.refusal("Hello") == "The language model's worker live is not online."
    await scripted.start()
    await until(lambda: home.state(AGENT) != STATE_UNAVAILABLE)
    assert await home.answer("Hello") == "Hello"


async def test_a_worker_that_stays_away_is_an_issue_until_it_is_back(home: Home, scripted: ScriptedWorker) -> None:
    issues = ir.async_get(home.hass)
    name = f"worker_gone_{home.entry.entry_id}"
    await scripted.stop()
    await until(lambda: home.state(AGENT) == STATE_UNAVAILABLE)
    assert issues.async_get_issue(DOMAIN, name) is None, "a restart is no issue"
    async_fire_time_changed(home.hass, dt_util.utcnow() + timedelta(seconds=GONE_AFTER_S + 1))
    await until(lambda: issues.async_get_issue(DOMAIN, name) is not None)
    issue = issues.async_get_issue(DOMAIN, name)
    assert issue is not None
    assert issue.translation_placeholders == {"worker": "live", "topic": "llm/status/live", "reason": "stopped"}
    await scripted.start()
    await until(lambda: issues.async_get_issue(DOMAIN, name) is None)


async def test_a_status_that_nobody_renews_is_not_believed(home: Home, scripted: ScriptedWorker) -> None:
    """As after a power cut of broker and worker, where the broker comes back with an old `online`."""
    assert home.state(AGENT) != STATE_UNAVAILABLE
    async_fire_time_changed(
        home.hass, dt_util.utcnow() + timedelta(seconds=4)
    )  # three times `status.every_s` of this worker
    assert not home.entry.runtime_data.available
    await until(lambda: home.entry.runtime_data.available)  # it does renew it


async def test_an_error_of_the_engine_is_told_and_leaves_nothing_in_the_dialogue(
    home: Home, scripted: ScriptedWorker
) -> None:
    first = await home.say("Hello")
    scripted.play("Half an ans", {"error": "The model has no memory left."})
    said = await home.refusal("And now?", conversation_id=first.conversation_id)
    assert said == "The worker live could not answer (engine_error): The model has no memory left."
    await home.answer("Again", conversation_id=first.conversation_id)
    told = [message["content"] for message in scripted.calls[-1]["messages"][1:]]
    assert told == ["Hello", "Hello", "Again"]


async def test_a_model_that_never_stops_calling_tools_is_stopped(home: Home, scripted: ScriptedWorker) -> None:
    for _ in range(10):
        scripted.play({"calls": [0, "GetLiveContext", "{}"]}, {"finish": "tool_calls"})
    said = await home.refusal("What is on?")
    assert said == "The model called tools 10 times in a row without an answer, and was stopped."
    assert len(scripted.calls) == 10


async def test_arguments_that_are_no_json_are_told(home: Home, scripted: ScriptedWorker) -> None:
    scripted.play({"calls": [0, "HassTurnOn", '{"name": ']}, {"finish": "tool_calls"})
    assert "HassTurnOn" in await home.refusal("Turn it on")
    assert home.state(LIGHT) == "off"


async def test_options_reach_the_worker(connected: HomeAssistant, scripted: ScriptedWorker) -> None:
    entry = await add_entry(connected, model="scripted", thinking="off", max_tokens=7.0, llm_hass_api=[])
    await until(lambda: entry.runtime_data.available)
    await Home(connected, entry).answer("Hello")
    (call,) = scripted.calls
    assert call["model"] == "scripted"
    assert call["thinking"] is False
    assert call["sampling"]["max_tokens"] == 7
    assert call["tools"] == []


async def test_two_workers_answer_each_for_itself(
    home: Home, scripted: ScriptedWorker, start_worker: StartWorker
) -> None:
    other = await start_worker(worker_id="attic", mqtt__root="upstairs")
    entry = await add_entry(home.hass, worker="attic", root="upstairs", suffix=" attic")
    await until(lambda: entry.runtime_data.available)
    from homeassistant.components import conversation
    from homeassistant.core import Context

    scripted.play("The kitchen.")
    other.play("The attic.")
    results = await asyncio.gather(
        home.say("Where are you?"),
        conversation.async_converse(home.hass, "Where are you?", None, Context(), agent_id="conversation.agent_attic"),
    )
    assert [speech(result) for result in results] == ["The kitchen.", "The attic."]


@pytest.mark.parametrize("access_list", [True])
async def test_the_shipped_access_list_lets_it_ask_under_its_own_name_and_no_other(
    connected: HomeAssistant, start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = tmp_path / "password"
    password.write_text("w")
    password.chmod(0o600)
    await start_worker(mqtt__username="llm-worker", mqtt__password_file=str(password))
    entry = await add_entry(connected)
    await until(lambda: entry.runtime_data.available)
    assert await Home(connected, entry).answer("Hello") == "Hello"
    monkeypatch.setattr(resend_rules, "ANSWER_WITHIN_S", 0.2)
    connected.config_entries.async_update_entry(entry, data={**entry.data, "first_level": "alice"})
    await connected.config_entries.async_reload(entry.entry_id)
    await until(lambda: entry.runtime_data.available)
    said = await Home(connected, entry).refusal("Hello")
    assert said.startswith("The worker live is online but did not answer. Does the broker's access list let")
    assert f"llm/request/alice/{entry.entry_id}" in said


async def create_pipeline(client: Any) -> str:
    """One that asks our agent, with text in and text out."""
    await client.send_json_auto_id(
        {
            "type": "assist_pipeline/pipeline/create",
            "name": "Ours",
            "language": "en",
            "conversation_engine": AGENT,
            "conversation_language": "en",
            "stt_engine": None,
            "stt_language": None,
            "tts_engine": None,
            "tts_language": None,
            "tts_voice": None,
            "wake_word_entity": None,
            "wake_word_id": None,
        }
    )
    answer = await client.receive_json()
    assert answer["success"], answer
    pipeline: str = answer["result"]["id"]
    return pipeline


def run_request(pipeline: str, text: str) -> dict[str, Any]:
    stages = {"start_stage": "intent", "end_stage": "intent"}
    return {"type": "assist_pipeline/run", **stages, "input": {"text": text}, "pipeline": pipeline}
