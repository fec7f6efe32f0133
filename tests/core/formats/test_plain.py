"""Text alone, the events as they are, the formats of MQTT routes, and which path speaks which dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from llamacpp_mqtt_deploy.core.errors import RequestError
from llamacpp_mqtt_deploy.core.events import EventReader
from llamacpp_mqtt_deploy.core.formats.http_routes import HTTP_ROUTES
from llamacpp_mqtt_deploy.core.formats.plain import ASK_EVENTS, ASK_TEXT, parse_ask
from llamacpp_mqtt_deploy.core.formats.rendering import Dialect
from llamacpp_mqtt_deploy.core.formats.route_formats import ROUTE_FORMATS
from llamacpp_mqtt_deploy.core.requests import RequestPolicy, check_request, read_request
from tests.support.answer_events import Answered, answered, answers, asked, occasion
from tests.support.http_streams import rendered, sse_objects

CHAT = [{"role": "user", "content": "Hello"}]
SENSIBLE: dict[str, dict[str, Any]] = {
    "openai_responses": {"input": "Hello"},
    "ollama_generate": {"prompt": "Hello"},
    "llm_session": {"session_id": 7, "message": "Hello"},
    "chatbot": {"session_id": 7, "content": "Hello"},
    "prompt_chat": {"prompt": "Hello"},
    "message_stream": {"message": "Hello"},
    "token_stream": {"message": "Hello"},
    "ask_text": {"prompt": "Hello"},
    "ask_events": {"prompt": "Hello"},
}

DIALECTS = {route.dialect.name: route.dialect for route in HTTP_ROUTES}


@given(answers())
def test_text_that_streams_is_the_answer_and_nothing_else(answer: Answered) -> None:
    renderer = ASK_TEXT.stream(asked(), occasion())
    body = rendered(renderer, answer.events).decode()
    assert renderer.failed == (answer.error is not None)
    if answer.error is None:
        assert body == answer.content
    else:
        assert body.rstrip().endswith("]")


@given(answers())
def test_events_are_told_as_they_are(answer: Answered) -> None:
    assert sse_objects(rendered(ASK_EVENTS.stream(asked(), occasion()), answer.events)) == answer.events


def test_chunks_that_were_merged_for_a_slow_reader_leave_no_hole_in_the_events() -> None:
    """What waits for a slow reader is merged into one chunk, under the number of the last."""
    answer = answered(("content", "a"), ("content", "b"), ("reasoning", "hm"), ("content", "c"), ("content", "d"))
    start, a, b, thought, c, d, done = answer.events
    merged = [start, {**b, "content": "ab"}, thought, {**d, "content": "cd"}, {**done, "full_content": None}]
    reader = EventReader("r1")
    for event in sse_objects(rendered(ASK_EVENTS.stream(asked(), occasion()), merged)):
        reader.feed(event)
        assert not reader.hole
    assert (reader.content, reader.reasoning, reader.ended) == ("abcd", "hm", True)
    assert (a["seq"], c["seq"]) == (0, 3)


@given(answers())
def test_each_format_of_a_route_publishes_the_answer_in_messages_that_stand_alone(answer: Answered) -> None:
    for name, format_of in ROUTE_FORMATS.items():
        stream = format_of(asked(session_id="s1"), occasion())
        parts = [part for event in answer.events for part in stream.parts(event)]
        if name == "text" and answer.error is None:
            assert parts == [answer.content.encode()]
        elif name == "text-chunks":
            assert answer.error is not None or b"".join(parts) == answer.content.encode()
        elif not name.startswith("text"):
            assert all(isinstance(json.loads(part), dict) for part in parts)
            assert not any(b"\n" in part for part in parts)
        assert parts or answer.content == ""


def test_an_error_is_one_line_for_a_person_at_a_shell() -> None:
    reply = ASK_TEXT.failure({"code": "no_worker", "message": "Nobody is there."})
    assert (reply.status, reply.body) == (503, b"no_worker: Nobody is there.\n")
    reply = ASK_TEXT.whole(asked(), occasion()).answer(answered(("content", "Hi")).done)
    assert (reply.status, reply.body, reply.content_type) == (200, b"Hi", "text/plain; charset=utf-8")


def test_the_terminal_event_is_the_whole_answer_of_the_events() -> None:
    done = answered(("content", "Hi"), finish="cancelled").done
    reply = ASK_EVENTS.whole(asked(), occasion()).answer(done)
    assert (reply.status, json.loads(reply.body)) == (200, done)


def test_a_question_may_be_a_request_as_the_protocol_has_it() -> None:
    found = parse_ask({"prompt": "Hi", "session_id": 5, "model": "tiny", "stream": "sentence", "top_k": 4, "colour": 1})
    assert (found.session, found.model, found.streams) == ("5", "tiny", True)
    assert found.request == {"prompt": "Hi", "stream": "sentence", "top_k": 4}
    assert not parse_ask({"prompt": "Hi", "stream": False}).streams


def test_a_question_with_a_wrong_field_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="top_k"):
        parse_ask({"prompt": "Hi", "top_k": -4})


@pytest.mark.parametrize("route", HTTP_ROUTES, ids=lambda route: route.path)
def test_what_each_path_asks_for_is_what_a_worker_takes(route: Any) -> None:
    found = route.dialect.parse(SENSIBLE.get(route.dialect.name, {"messages": CHAT}))
    raw = read_request(json.dumps(dict(found.request)).encode(), policy=RequestPolicy())
    assert raw is not None
    assert check_request(raw, policy=RequestPolicy()).warnings == ()


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
@settings(max_examples=40)
@given(answer=answers())
def test_hostile_names_break_no_stream(dialect: Dialect, answer: Answered) -> None:
    nasty = "a\n\ndata: [DONE]\r\n\r\nevent: message_stop\u2028\x85"
    found = dialect.parse(SENSIBLE.get(dialect.name, {"messages": CHAT}))
    plain = rendered(dialect.stream(found, occasion()), answer.events)
    hostile = rendered(dialect.stream(found, occasion(request_id=nasty, session=nasty, model=nasty)), answer.events)
    assert len(hostile.splitlines()) == len(plain.splitlines())
    if dialect.name != "ask_text":
        assert len(hostile.decode().splitlines()) == len(plain.decode().splitlines())


@pytest.mark.parametrize("fields", [{}, {"temperature": 1}, {"prompt": "Hi", "messages": CHAT}])
def test_a_question_is_one_of_prompt_messages_and_tool_results(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="exactly one of prompt, messages, tool_results"):
        parse_ask(fields)
