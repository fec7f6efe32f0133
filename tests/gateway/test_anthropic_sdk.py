"""The official anthropic package, unmodified, through gateway, broker and worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import Busy, ContextOverflow, EngineLost
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine, Silence
from tests.gateway.world import World
from tests.support.waiting import eventually

pytestmark = pytest.mark.broker

HELLO: Any = [{"role": "user", "content": "hello there you"}]
TOOLS: Any = [
    {
        "name": "get_weather",
        "description": "Tell the weather.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(slots=2)


@pytest.fixture
def client(world: World, engine: ScriptedEngine) -> Iterator[anthropic.Anthropic]:
    world.worker(engine)
    gateway = world.gateway(keys={"alice": {}})
    with anthropic.Anthropic(base_url=gateway.url, api_key=gateway.keys["alice"], max_retries=0, timeout=20) as client:
        yield client


def test_a_message_comes_whole_and_as_a_stream(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="default", max_tokens=50, messages=HELLO)
    assert [block.text for block in whole.content if block.type == "text"] == ["hello there you"]
    assert whole.stop_reason == "end_turn"
    assert whole.usage.output_tokens == 3
    with client.messages.stream(model="default", max_tokens=50, system="Be brief.", messages=HELLO) as stream:
        assert "".join(stream.text_stream) == "hello there you"
        assert stream.get_final_message().stop_reason == "end_turn"


def test_the_models_are_listed(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["scripted"]


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    counted = client.messages.count_tokens(model="default", messages=HELLO)
    whole = client.messages.create(model="default", max_tokens=50, messages=HELLO)
    assert counted.input_tokens == whole.usage.input_tokens
    assert len(engine.calls) == 1
    longer = client.messages.count_tokens(
        model="default", messages=HELLO, system="Be brief.", tools=TOOLS, thinking={"type": "disabled"}
    )
    assert longer.input_tokens > counted.input_tokens


def test_a_count_that_cannot_be_had_is_an_error_of_the_api(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.count_tokens(model="default", messages=[])
    with pytest.raises(anthropic.NotFoundError, match="no-such"):
        client.messages.count_tokens(model="no-such", messages=HELLO)
    engine.become("asleep")
    with pytest.raises(anthropic.InternalServerError, match="asleep") as caught:
        client.messages.count_tokens(model="default", messages=HELLO)
    assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "5")
    assert engine.wakes == 0


def test_an_engine_that_cannot_count_is_told_as_a_request_that_is_not_served(world: World) -> None:
    world.worker(ScriptedEngine(count=lambda _call: None))
    gateway = world.gateway()
    with (
        anthropic.Anthropic(base_url=gateway.url, api_key="any", max_retries=0, timeout=20) as client,
        pytest.raises(anthropic.BadRequestError, match="cannot count"),
    ):
        client.messages.count_tokens(model="default", messages=HELLO)


def test_thinking_and_tools_come_as_blocks(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.play(
        Reasoning("The weather is asked for."),
        "I look.",
        ToolCall(0, "call-1", "get_weather", '{"city":'),
        ToolCall(0, None, None, '"Rome"}'),
        Finished("tool_calls", TokenUsage(prompt_tokens=5, completion_tokens=3)),
    )
    with client.messages.stream(
        model="default",
        max_tokens=2000,
        messages=HELLO,
        tools=TOOLS,
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.stop_reason == "tool_use"
    call = message.content[-1]
    assert call.type == "tool_use"
    assert (call.id, call.name, call.input) == ("call-1", "get_weather", {"city": "Rome"})
    told: Any = [
        *HELLO,
        {"role": "assistant", "content": [call.model_dump(include={"type", "id", "name", "input"})]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call-1", "content": "sunny"}]},
    ]
    assert client.messages.create(model="default", max_tokens=50, messages=told, tools=TOOLS).content
    assert engine.calls[-1].messages[-1]["role"] == "tool"


def test_errors_are_the_ones_that_programs_catch(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    def ask(**fields: Any) -> anthropic.types.Message:
        return client.messages.create(**{"model": "default", "max_tokens": 50, "messages": HELLO, **fields})

    with pytest.raises(anthropic.NotFoundError):
        ask(model="claude-9")
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="lmd-wrong").models.list()
    with pytest.raises(anthropic.BadRequestError):
        ask(max_tokens=-1)
    engine.play(ContextOverflow("Too long.", n_prompt_tokens=9000, n_ctx=4096))
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 9000 tokens > 4096 maximum"):
        ask()
    engine.play(Busy("Full.", retry_after_s=2))
    with pytest.raises(anthropic.RateLimitError) as busy:
        ask()
    assert busy.value.response.headers["retry-after"] == "2"


def test_an_error_in_the_middle_of_a_stream_is_raised(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.play("half", EngineLost("The engine went away."))
    received: list[str] = []
    asked: Any = {"model": "default", "max_tokens": 50, "messages": HELLO}
    with client.messages.stream(**asked) as stream, pytest.raises(anthropic.APIStatusError):
        received.extend(stream.text_stream)
    assert "".join(received) == "half"


def test_closing_the_stream_cancels_on_the_worker(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    engine.play("begun", Silence())
    with client.messages.stream(model="default", max_tokens=50, messages=HELLO) as stream:
        assert next(iter(stream.text_stream)) == "begun"
        assert engine.busy == 1
    eventually(lambda: engine.busy == 0, 2)
