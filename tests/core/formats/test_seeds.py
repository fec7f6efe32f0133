"""The web backends' own endpoints: bodies and answers as their clients have them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.formats import seeds
from llamacpp_mqtt_deploy.core.formats.asked import Asked
from llamacpp_mqtt_deploy.core.formats.rendering import Dialect
from tests.support.answer_events import Answered, answered, answers, occasion
from tests.support.http_streams import rendered, sse

HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "llm_chat": {"messages": HELLO},
    "llm_session": {"session_id": "my-session-123", "message": "Hello"},
    "chatbot": {"session_id": 1, "content": "Hello"},
    "prompt_chat": {"prompt": "Hello", "provider": "openai", "conversation_id": 123},
    "conversation": {"messages": HELLO, "conversation_id": 123},
    "message_stream": {"message": "Hello"},
    "token_stream": {"message": "Hello", "thread_id": "t1"},
}
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        seeds.LLM_CHAT, seeds.LLM_SESSION, seeds.CHATBOT, seeds.PROMPT_CHAT, seeds.CONVERSATION, seeds.MESSAGE_STREAM,
        seeds.TOKEN_STREAM,
    )
}  # fmt: skip
ENDS: dict[str, Any] = {
    "llm_chat": {"done": True},
    "llm_session": {"done": True, "session_id": "my-session-123"},
    "prompt_chat": {"type": "done"},
    "conversation": {"type": "done"},
    "message_stream": {"type": "message_stop"},
    "token_stream": {"token": "", "type": "complete"},
}


def asked_of(dialect: Dialect) -> Asked:
    return dialect.parse(BODIES[dialect.name])


def events(dialect: Dialect, answer: Answered) -> list[tuple[str, dict[str, Any]]]:
    body = rendered(dialect.stream(asked_of(dialect), occasion()), answer.events)
    return [(name, json.loads(data)) for name, data in sse(body)]


def text_in(event: dict[str, Any]) -> str:
    """The new text as each of the clients reads it."""
    if "delta" in event:
        return str(event["delta"]["text"])
    return str(event.get("token") or event.get("chunk") or event.get("content") or "")


@pytest.mark.parametrize("name", sorted(DIALECTS))
@given(answer=answers())
def test_every_order_of_events_adds_up_to_the_answer_in_the_own_words_of_each_endpoint(
    name: str, answer: Answered
) -> None:
    told = [event for _, event in events(DIALECTS[name], answer) if event.get("type") != "ping"]
    end = told[-1]
    complete = [
        event for event in told if event.get("done") or event.get("type") in ("done", "complete", "message_stop")
    ]
    if answer.error is not None:
        assert "error" in end or end.get("type") == "error"
        assert complete == []
        return
    assert complete == [end]
    assert "".join(text_in(event) for event in told) == answer.content
    assert ENDS.get(name, end) == end


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_whole_answer_holds_the_text(name: str) -> None:
    dialect = DIALECTS[name]
    reply = dialect.whole(asked_of(dialect), occasion()).answer(answered(("reasoning", "hm"), ("content", "Hi")).done)
    told = json.loads(reply.body)
    assert reply.status == 200
    assert "Hi" in (told.get("response"), told.get("token"), told.get("assistant_message", {}).get("content"))


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_failure_has_its_status_and_a_detail(name: str) -> None:
    reply = DIALECTS[name].failure({"code": "no_worker", "message": "Nobody is there."})
    assert reply.status == 503
    assert json.loads(reply.body)["detail"] == "Nobody is there."


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_cancelled_answer_is_no_whole_one(name: str) -> None:
    dialect = DIALECTS[name]
    reply = dialect.whole(asked_of(dialect), occasion()).answer(answered(("content", "Half"), finish="cancelled").done)
    assert reply.status == 503


def test_the_chatbot_stream_begins_with_its_metadata_before_any_text() -> None:
    renderer = seeds.CHATBOT.stream(asked_of(seeds.CHATBOT), occasion())
    [(_, data)] = sse(renderer.event({"type": "queued", "position": 1}))
    user, assistant = seeds.message_numbers("r1")
    assert json.loads(data) == {
        "type": "metadata",
        "session_id": 1,
        "user_message_id": user,
        "session_key": "web/s1",
    }
    end = events(seeds.CHATBOT, answered(("content", "Hi")))[-1][1]
    assert end == {"type": "done", "assistant_message_id": assistant, "full_content": "Hi"}
    assert assistant < 2**53


def test_typed_events_have_names_and_pings_with_a_time() -> None:
    told = events(seeds.MESSAGE_STREAM, answered(("content", "Hello ")))
    assert all(name == event["type"] for name, event in told)
    assert told[0] == ("ping", {"type": "ping", "timestamp": 1795282200.0})
    assert [event for name, event in told if name != "ping"] == [
        {"type": "message_start"},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello "}},
        {"type": "message_stop"},
    ]


def test_every_token_event_has_a_token_since_its_simplest_client_adds_up_that_field() -> None:
    error = {"code": "internal", "message": "No.", "retryable": False, "details": {}}
    for answer in (answered(("content", "Hi")), answered(("content", "Hi"), error=error)):
        assert all(isinstance(event["token"], str) for _, event in events(seeds.TOKEN_STREAM, answer))


def test_typed_chunks_call_themselves_plain_text() -> None:
    renderer = seeds.PROMPT_CHAT.stream(asked_of(seeds.PROMPT_CHAT), occasion())
    assert renderer.content_type == "text/plain; charset=utf-8"
    assert [event for _, event in events(seeds.PROMPT_CHAT, answered(("content", "Hi")))] == [
        {"chunk": "Hi", "type": "content"},
        {"type": "done"},
    ]


def test_a_whole_prompt_answer_repeats_model_provider_and_conversation() -> None:
    dialect = seeds.PROMPT_CHAT
    told = json.loads(dialect.whole(asked_of(dialect), occasion()).answer(answered(("content", "Hi")).done).body)
    assert {name: told[name] for name in ("response", "model", "provider", "conversation_id")} == {
        "response": "Hi", "model": "demo", "provider": "openai", "conversation_id": 123,
    }  # fmt: skip


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,session,request_fields",
    [
        ("llm_chat", None, {"messages": HELLO}),
        ("llm_session", "my-session-123", {"prompt": "Hello"}),
        ("chatbot", "1", {"prompt": "Hello"}),
        ("prompt_chat", "123", {"prompt": "Hello"}),
        ("conversation", "123", {"messages": HELLO}),
        ("message_stream", None, {"prompt": "Hello"}),
        ("token_stream", "t1", {"prompt": "Hello"}),
    ],
)
def test_a_body_becomes_a_request_of_its_session(
    name: str, session: str | None, request_fields: dict[str, Any]
) -> None:
    found = asked_of(DIALECTS[name])
    assert (found.session, found.request) == (session, request_fields)


def test_the_settings_of_a_chatbot_message_are_passed_on() -> None:
    body = BODIES["chatbot"] | {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 2048, "system_prompt": "Be kind.", "template_id": None,
    }  # fmt: skip
    assert seeds.CHATBOT.parse(body).request == {
        "prompt": "Hello", "system_prompt": "Be kind.", "temperature": 0.7, "top_p": 0.9, "max_tokens": 2048,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name,fields,path",
    [
        ("llm_chat", {}, "messages"),
        ("llm_session", {"message": "Hi"}, "session_id"),
        ("llm_session", {"message": "Hi", "session_id": "a/b"}, "session_id"),
        ("llm_session", {"message": "Hi", "session_id": "a\n"}, "session_id"),
        ("llm_session", {"message": "Hi", "session_id": True}, "session_id"),
        ("llm_session", {"session_id": "s"}, "message"),
        ("chatbot", {"session_id": 1, "content": ""}, "content"),
        ("prompt_chat", {"prompt": "Hi", "conversation_id": -1}, "conversation_id"),
        ("prompt_chat", {"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
        ("message_stream", {"message": 5}, "message"),
        ("token_stream", {"message": "Hi", "thread_id": "#"}, "thread_id"),
    ],
)
def test_a_wrong_field_is_named(name: str, fields: dict[str, Any], path: str) -> None:
    with pytest.raises(RequestError) as caught:
        DIALECTS[name].parse(fields)
    assert list(caught.value.details["fields"]) == [path]
