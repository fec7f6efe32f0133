"""The official SDKs as their users call them, over a transport that hands them what the formats write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.rendering import HttpReply, error_event
from tests.support.answer_events import Answered, answered, occasion
from tests.support.http_streams import rendered

DIALECTS = {route.path: route.dialect for route in HTTP_ROUTES}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER = {"type": "object", "properties": {"at": {"type": "string"}}}
CALL = [("tool_calls", [{"index": 0, "id": "c1", "name": "look", "arguments": '{"at":'}])]
CALL += [("tool_calls", [{"index": 0, "arguments": ' "sky"}'}])]
LOST = {"code": "engine_lost", "message": "The engine went away.", "retryable": True, "details": {}}


class Served:
    """A server in one function: the formats between the SDK's bytes and an answer that is known."""

    def __init__(self, answer: Answered) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        self.requests = 0

    def respond(self, path: str, body: bytes) -> HttpReply:
        self.requests += 1
        dialect = DIALECTS[path]
        try:
            found = dialect.parse(json.loads(body))
        except RequestError as error:
            return dialect.failure(error_event(error))
        self.asked.append(found)
        first = self.answer.events[0]
        if first["type"] == "error":
            return dialect.failure(first)
        if found.streams:
            stream = dialect.stream(found, occasion())
            return HttpReply(status=200, body=rendered(stream, self.answer.events), content_type=stream.content_type)
        whole = dialect.whole(found, occasion())
        end = self.answer.events[-1]
        return whole.failure(end) if end["type"] == "error" else whole.answer(end)

    def transport(self) -> Callable[[httpx2.Request], httpx2.Response]:
        def handle(request: httpx2.Request) -> httpx2.Response:
            reply = self.respond(request.url.path, request.read())
            headers = {"content-type": reply.content_type, **reply.headers}
            return httpx2.Response(reply.status, headers=headers, content=reply.body)

        return handle

    def openai(self) -> Any:
        http = httpx2.Client(transport=httpx2.MockTransport(self.transport()))
        return openai.OpenAI(base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=2)

    def anthropic(self) -> Any:
        http = httpx2.Client(transport=httpx2.MockTransport(self.transport()))
        return anthropic.Anthropic(base_url="http://gateway", api_key="k", http_client=http, max_retries=0)

    def ollama(self) -> Any:
        def handle(request: httpx.Request) -> httpx.Response:
            reply = self.respond(request.url.path, request.read())
            return httpx.Response(reply.status, headers={"content-type": reply.content_type}, content=reply.body)

        return ollama.Client(host="http://gateway", transport=httpx.MockTransport(handle))


def refused(**error: Any) -> Answered:
    told = {"type": "error", "request_id": "r1", "message": "No.", "retryable": False, **error}
    return Answered([told], error=told["code"])


# --- OpenAI ----------------------------------------------------------------------------------------------------------


def openai_text(client: Any) -> Iterator[str]:
    stream = client.chat.completions.create(model="default", messages=HELLO, stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            yield choice.delta.content or ""


def test_openais_client_streams_text() -> None:
    with closing(
        Served(answered(("reasoning", "hm"), ("content", "Hel"), ("content", "lo\u2028 \u85e5"))).openai()
    ) as client:
        assert "".join(openai_text(client)) == "Hello\u2028 \u85e5"


def test_openais_client_gets_tool_calls() -> None:
    served = Served(answered(*CALL, finish="tool_calls"))
    tool = {"type": "function", "function": {"name": "look", "parameters": WEATHER}}
    with closing(served.openai()) as client:
        done = client.chat.completions.create(model="tiny", messages=HELLO, tools=[tool], tool_choice="auto")
        assert done.choices[0].message.tool_calls[0].function.name == "look"
        with client.chat.completions.stream(model="tiny", messages=HELLO, tools=[tool]) as stream:
            whole = stream.get_final_completion()
        assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"at": "sky"}
    assert served.asked[0].request["tools"] == [tool]


def test_openais_client_raises_for_an_error_in_the_middle_of_a_stream() -> None:
    with closing(Served(answered(("content", "Hel"), error=LOST)).openai()) as client:
        heard: list[str] = []
        with pytest.raises(openai.APIError, match="The engine went away"):
            heard.extend(openai_text(client))


@pytest.mark.parametrize(
    "error,raised,requests",
    [
        ({"code": "rate_limited", "retry_after_s": 60, "retryable": False}, openai.RateLimitError, 1),
        ({"code": "context_overflow"}, openai.BadRequestError, 1),
        ({"code": "model_not_found"}, openai.NotFoundError, 1),
        ({"code": "unauthorized"}, openai.AuthenticationError, 1),
        ({"code": "timeout"}, openai.InternalServerError, 1),
    ],
)
def test_openais_client_raises_its_own_errors_and_does_not_repeat_what_will_not_help(
    error: dict[str, Any], raised: type[Exception], requests: int
) -> None:
    served = Served(refused(**error))
    with closing(served.openai()) as client, pytest.raises(raised):
        client.chat.completions.create(model="default", messages=HELLO)
    assert served.requests == requests


def test_openais_client_reads_the_code_and_the_field_of_an_error() -> None:
    with (
        closing(Served(answered(("content", "Hi"))).openai()) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.chat.completions.create(model="default", messages=HELLO, n=3)
    assert (caught.value.param, caught.value.code) == ("n", "unsupported_value")


def test_openais_client_reads_a_response_and_its_stream() -> None:
    served = Served(answered(("reasoning", "hm"), ("content", "Hel"), ("content", "lo")))
    with closing(served.openai()) as client:
        first = client.responses.create(model="default", input="Hi")
        assert (first.output_text, first.status) == ("Hello", "completed")
        again = client.responses.create(model="default", input="And?", previous_response_id=first.id, stream=True)
        assert "".join(event.delta for event in again if event.type == "response.output_text.delta") == "Hello"
        with client.responses.stream(model="default", input="Hi") as stream:
            assert stream.until_done().get_final_response().output_text == "Hello"
    assert served.asked[1].session == "s1"


def test_openais_client_gets_the_function_calls_of_a_response() -> None:
    with closing(Served(answered(*CALL, finish="tool_calls")).openai()) as client:
        tool = {"type": "function", "name": "look", "parameters": WEATHER, "strict": False}
        [call] = client.responses.create(model="default", input="Hi", tools=[tool]).output
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"at": "sky"})


# --- Anthropic -------------------------------------------------------------------------------------------------------


def anthropic_text(client: Any) -> str:
    with client.messages.stream(model="default", max_tokens=9, messages=HELLO) as stream:
        return "".join(stream.text_stream)


def test_anthropics_client_streams_text() -> None:
    with closing(
        Served(answered(("reasoning", "hm"), ("content", "Hel"), ("content", "lo\x85"))).anthropic()
    ) as client:
        assert anthropic_text(client) == "Hello\x85"
        message = client.messages.create(model="default", max_tokens=9, messages=HELLO)
        assert message.content[0].text == "Hello\x85"


def test_anthropics_client_gets_thinking_and_tool_use() -> None:
    with closing(Served(answered(("reasoning", "hm"), *CALL, finish="tool_calls")).anthropic()) as client:
        tool = {"name": "look", "input_schema": WEATHER}
        thinking = {"type": "enabled", "budget_tokens": 1024}
        with client.messages.stream(
            model="default", max_tokens=2048, messages=HELLO, tools=[tool], thinking=thinking
        ) as stream:
            message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "tool_use"]
    assert message.content[1].input == {"at": "sky"}
    assert message.stop_reason == "tool_use"


def test_anthropics_client_raises_for_an_error_in_the_middle_of_a_stream() -> None:
    client = Served(answered(("content", "Hel"), error=LOST)).anthropic()
    with closing(client), pytest.raises(anthropic.APIStatusError, match="The engine went away"):
        anthropic_text(client)


@pytest.mark.parametrize(
    "code,raised",
    [
        ("busy", anthropic.RateLimitError),
        ("context_overflow", anthropic.BadRequestError),
        ("model_not_found", anthropic.NotFoundError),
        ("no_worker", anthropic.InternalServerError),
    ],
)
def test_anthropics_client_raises_its_own_errors(code: str, raised: type[Exception]) -> None:
    with closing(Served(refused(code=code)).anthropic()) as client, pytest.raises(raised):
        client.messages.create(model="default", max_tokens=9, messages=HELLO)


# --- Ollama ----------------------------------------------------------------------------------------------------------


def test_ollamas_client_chats_and_generates() -> None:
    client = Served(answered(("reasoning", "hm"), ("content", "Hel"), ("content", "lo\u2028\x85"))).ollama()
    assert client.chat(model="tiny", messages=HELLO).message.content == "Hello\u2028\x85"
    streamed = list(client.chat(model="tiny", messages=HELLO, stream=True))
    assert "".join(part.message.content for part in streamed) == "Hello\u2028\x85"
    assert client.generate(model="tiny", prompt="Hi").response == "Hello\u2028\x85"
    assert (
        "".join(part.response for part in client.generate(model="tiny", prompt="Hi", stream=True)) == "Hello\u2028\x85"
    )


def test_ollamas_client_gets_tool_calls() -> None:
    client = Served(answered(*CALL, finish="tool_calls")).ollama()
    [call] = client.chat(model="tiny", messages=HELLO).message.tool_calls
    assert (call.function.name, call.function.arguments) == ("look", {"at": "sky"})


def test_ollamas_client_raises_for_errors_at_once_and_in_the_middle() -> None:
    with pytest.raises(ollama.ResponseError, match=r"No\.") as caught:
        Served(refused(code="model_not_found")).ollama().chat(model="tiny", messages=HELLO)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="The engine went away"):
        list(Served(answered(("content", "Hel"), error=LOST)).ollama().chat(model="tiny", messages=HELLO, stream=True))
