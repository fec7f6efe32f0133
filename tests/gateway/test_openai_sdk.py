"""The official openai package, unmodified, through gateway, broker and worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import Busy, ContextOverflow
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine, Silence
from tests.gateway.world import World
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

HELLO: Any = [{"role": "user", "content": "hello there you"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tell the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(slots=2)


@pytest.fixture
def client(world: World, engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {}})
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=gateway.keys["alice"], max_retries=0, timeout=20
    ) as client:
        yield client


def test_a_completion_comes_whole_and_as_a_stream_with_its_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=HELLO)
    assert whole.choices[0].message.content == "hello there you"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3
    chunks = list(
        client.chat.completions.create(
            model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello there you"
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_the_models_are_listed_and_shown(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").id == "scripted"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_tools_are_called_in_a_stream_and_their_results_are_taken(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.play(
        Reasoning("The weather is asked for."),
        ToolCall(0, "call-1", "get_weather", ""),
        ToolCall(0, None, None, '{"city":'),
        ToolCall(0, None, None, '"Rome"}'),
        Finished("tool_calls", TokenUsage(prompt_tokens=5, completion_tokens=3)),
    )
    with client.chat.completions.stream(model="default", messages=HELLO, tools=TOOLS) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    call = message.tool_calls[0]
    assert (call.id, call.function.name, call.function.arguments) == ("call-1", "get_weather", '{"city":"Rome"}')
    told: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
    ]
    told[1]["tool_calls"][0]["function"].pop("parsed_arguments", None)
    answer = client.chat.completions.create(model="default", messages=told, tools=TOOLS)
    assert answer.choices[0].message.content == "hello there you"
    assert engine.calls[-1].messages[-1]["role"] == "tool"


class Place(BaseModel):
    city: str


def test_structured_output_is_parsed(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play('{"city"', ': "Rome"}')
    parsed = client.chat.completions.parse(model="default", messages=HELLO, response_format=Place)
    assert parsed.choices[0].message.parsed == Place(city="Rome")
    assert engine.calls[-1].response_format is not None


def test_responses_stream_and_go_on_by_the_previous_id(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    first = client.responses.create(model="default", input="my name is Ada")
    assert first.output_text == "my name is Ada"
    with client.responses.stream(model="default", input="and now", previous_response_id=first.id) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == "and now"
    assert [message["content"] for message in engine.calls[-1].messages] == [
        "my name is Ada",
        "my name is Ada",
        "and now",
    ]


def test_errors_are_the_ones_that_programs_catch(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="lmd-wrong").models.list()
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="default", messages=HELLO, temperature=99)
    assert wrong.value.param == "temperature"
    engine.play(ContextOverflow("Too long.", n_prompt_tokens=9000, n_ctx=4096))
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="default", messages=HELLO, stream=True)
    assert long.value.code == "context_length_exceeded"
    engine.play(Busy("Full.", retry_after_s=2))
    with pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model="default", messages=HELLO)
    assert busy.value.response.headers["retry-after"] == "2"


def test_the_package_waits_and_tries_again_by_itself(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play(Busy("Full.", retry_after_s=0.1))
    patient = client.with_options(max_retries=2)
    assert patient.chat.completions.create(model="default", messages=HELLO).choices


def test_an_error_in_the_middle_of_a_stream_is_raised(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play("half", Silence())
    stream = client.chat.completions.create(model="default", messages=HELLO, stream=True, extra_body={"timeout_s": 0.5})
    received: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        received.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(received) == "half"
    assert caught.value.code == "timeout"


def test_closing_the_stream_cancels_on_the_worker(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play("begun", Silence())
    stream = client.chat.completions.create(model="default", messages=HELLO, stream=True)
    next(iter(stream))
    assert engine.busy == 1
    stream.close()
    eventually(lambda: engine.busy == 0, 2)
