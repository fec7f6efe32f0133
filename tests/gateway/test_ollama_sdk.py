"""The official ollama package, unmodified, through gateway, broker and worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import Busy, EngineLost
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine, Silence
from tests.gateway.world import World
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

HELLO: Any = [{"role": "user", "content": "hello there you"}]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(slots=2)


@pytest.fixture
def client(world: World, engine: ScriptedEngine) -> Iterator[ollama.Client]:
    world.worker(engine)
    with ollama.Client(host=world.gateway().url, timeout=20) as client:
        yield client


def test_a_chat_and_a_completion_come_whole_and_as_streams(client: ollama.Client) -> None:
    whole = client.chat(model="default", messages=HELLO)
    assert whole.message.content == "hello there you"
    assert whole.done
    assert whole.eval_count == 3
    parts = list(client.chat(model="scripted", messages=HELLO, stream=True))
    assert "".join(part.message.content or "" for part in parts) == "hello there you"
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert client.generate(model="default", prompt="one two").response == "one two"
    assert "".join(part.response for part in client.generate(model="default", prompt="a b", stream=True)) == "a b"


def test_models_are_listed_shown_and_running(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == ["scripted"]
    assert "completion" in (client.show("scripted").capabilities or [])
    assert [model.model for model in client.ps().models] == ["scripted"]


def test_loading_a_model_asks_nothing_of_the_worker(client: ollama.Client, engine: ScriptedEngine) -> None:
    assert client.generate(model="scripted").done_reason == "load"
    assert not engine.calls


def test_thinking_tools_and_formats(client: ollama.Client, engine: ScriptedEngine) -> None:
    def get_weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: Where.
        """
        return f"sunny in {city}"

    engine.play(
        Reasoning("The weather is asked for."),
        ToolCall(0, "call-1", "get_weather", '{"city":"Rome"}'),
        Finished("tool_calls", TokenUsage(prompt_tokens=5, completion_tokens=3)),
    )
    answer = client.chat(model="default", messages=HELLO, tools=[get_weather], think=True)
    assert answer.message.thinking == "The weather is asked for."
    assert answer.message.tool_calls
    assert answer.message.tool_calls[0].function.arguments == {"city": "Rome"}
    engine.play('{"city": "Rome"}')
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    assert client.chat(model="default", messages=HELLO, format=schema).message.content == '{"city": "Rome"}'
    assert engine.calls[-1].response_format is not None


def test_errors_have_their_status(client: ollama.Client, engine: ScriptedEngine) -> None:
    with pytest.raises(ollama.ResponseError) as unknown:
        client.chat(model="llama9", messages=HELLO)
    assert unknown.value.status_code == 404
    engine.play(Busy("Full.", retry_after_s=2))
    with pytest.raises(ollama.ResponseError) as busy:
        client.chat(model="default", messages=HELLO, stream=False)
    assert busy.value.status_code == 429


def test_an_error_in_the_middle_of_a_stream_is_raised(client: ollama.Client, engine: ScriptedEngine) -> None:
    engine.play("half", EngineLost("The engine went away."))
    with pytest.raises(ollama.ResponseError):
        list(client.chat(model="default", messages=HELLO, stream=True))


def test_leaving_the_stream_cancels_on_the_worker(client: ollama.Client, engine: ScriptedEngine) -> None:
    engine.play("begun", Silence())
    stream = client.chat(model="default", messages=HELLO, stream=True)
    next(iter(stream))
    assert engine.busy == 1
    stream.close()
    eventually(lambda: engine.busy == 0, 2)
