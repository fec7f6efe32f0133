"""The dialect of servers that speak OpenAI's API and are not llama.cpp: against one of another make, and against oddities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.errors import ContextOverflow, EngineFailed, EngineLost, IdleTimeout, RequestError
from llamacpp_mqtt_deploy.core.thinking import THINKING_TAGS
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.stopping import StopSignal
from tests.support.openai_server import MODEL, OpenAiServer
from tests.support.sham_server import DONE, PROPS, ShamServer, delta, event, reply, stream

CHAT = "/v1/chat/completions"
CALL = EngineCall(messages=[{"role": "user", "content": "one two three four"}], chunk_timeout_s=5)


def engine_at(url: str, **settings: Any) -> ServerEngine:
    engine = ServerEngine(EngineSettings(**{"url": url, "unavailable_after_s": 10, **settings}))
    engine.open()
    return engine


def play(engine: ServerEngine, call: EngineCall = CALL, waits: list[str] | None = None) -> list[Delta]:
    return list(engine.stream(call, stop=StopSignal(), on_wait=([] if waits is None else waits).append))


def said(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


# --- another make ----------------------------------------------------------------------------------------------------


def test_the_dialect_is_found_out_and_the_first_model_taken(openai_server: OpenAiServer) -> None:
    engine = engine_at(openai_server.url + "/v1/")
    info = engine.probe()
    assert info.state == "ready"
    assert info.slots == 1
    assert MODEL in info.models
    deltas = play(engine)
    assert "one two three four" in said(deltas)
    assert isinstance(deltas[-1], Finished)
    assert deltas[-1].usage.completion_tokens > 0


@pytest.mark.parametrize(
    "given, asked",
    [
        ("/my models/модель", "/my%20models/%D0%BC%D0%BE%D0%B4%D0%B5%D0%BB%D1%8C"),
        ("/my%20models/модель/v1/", "/my%20models/%D0%BC%D0%BE%D0%B4%D0%B5%D0%BB%D1%8C"),
        ("/100%/v1", "/100%25"),
        ("/my%20models/%zz", "/my%20models/%25zz"),
    ],
)
def test_an_address_with_blanks_percent_signs_and_letters_of_any_language_is_asked_as_one(
    given: str, asked: str
) -> None:
    with ShamServer() as server:
        server.on(asked + "/props", reply(200, PROPS))
        server.on(asked + CHAT, stream(delta(content="hi"), delta("stop"), DONE))
        engine = engine_at(server.url + given)
        assert engine.probe().state == "ready"
        assert said(play(engine)) == "hi"


def test_fields_that_only_llamacpp_knows_are_named(openai_server: OpenAiServer) -> None:
    engine = engine_at(openai_server.url)
    engine.probe()
    call = replace(CALL, sampling={"top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1}, thinking=True)
    assert engine.unsupported_fields(call) == ("top_k", "min_p", "repeat_penalty", "thinking")
    assert said(play(engine, call))


@pytest.mark.parametrize(
    "behavior, leaf",
    [
        ({"type": "stream_fault", "kind": "disconnect", "after_chunks": 2}, EngineLost),
        ({"type": "stream_fault", "kind": "truncate", "after_chunks": 2}, EngineLost),
        ({"type": "stream_fault", "kind": "malformed", "after_chunks": 2}, EngineFailed),
        ({"type": "stream_fault", "kind": "stall", "after_chunks": 2, "stall_seconds": 20}, IdleTimeout),
        ({"type": "fail", "status": 500}, EngineFailed),
        ({"type": "fail", "status": 400, "code": "context_length_exceeded", "message": "too long"}, ContextOverflow),
    ],
)
def test_a_server_that_breaks_is_reported_as_what_it_is(
    openai_server: OpenAiServer, behavior: dict[str, Any], leaf: type[RequestError]
) -> None:
    engine = engine_at(openai_server.url, model=MODEL)
    engine.probe()
    openai_server.script(**behavior)
    with pytest.raises(leaf):
        play(engine, replace(CALL, chunk_timeout_s=0.5))
    assert "one two three four" in said(play(engine))


def test_a_rate_limit_is_waited_for(openai_server: OpenAiServer) -> None:
    engine = engine_at(openai_server.url, model=MODEL)
    engine.probe()
    openai_server.script(type="fail", status=429, times=2)
    waits: list[str] = []
    assert said(play(engine, waits=waits))
    assert waits == ["waiting"]


# --- oddities --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sham() -> Iterator[ShamServer]:
    with ShamServer() as server:
        del server.answers["/props"]
        server.on("/v1/models", reply(200, {"data": [{"id": "first"}, {"id": "second"}]}))
        yield server


def test_the_body_holds_only_what_openai_knows(sham: ShamServer) -> None:
    sham.on(CHAT, stream(delta("stop", content="a"), DONE))
    sampling = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "seed": -1, "temperature": 1}
    play(engine_at(sham.url), replace(CALL, sampling=sampling, thinking=True, thinking_budget=5))
    assert sham.bodies() == [
        {
            "messages": list(CALL.messages),
            "model": "first",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 1,
        }
    ]


def test_an_answer_that_finished_counts_without_done(sham: ShamServer) -> None:
    sham.on(CHAT, stream(delta(content="whole"), delta("length")))
    deltas = play(engine_at(sham.url))
    assert said(deltas) == "whole"
    assert isinstance(deltas[-1], Finished)
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("end", [(delta("length"), DONE), (delta("length"),), ()], ids=["done", "closed", "document"])
def test_half_a_surrogate_pair_at_the_end_of_an_answer_becomes_a_replacement_character(
    sham: ShamServer, end: tuple[bytes, ...]
) -> None:
    half = delta(content="HALF").replace(b"HALF", rb"a\ud83d")
    document = {"choices": [{"finish_reason": "length", "message": {"content": "a\ud83d"}}]}
    sham.on(CHAT, stream(half, *end) if end else reply(200, document))
    deltas = play(engine_at(sham.url))
    assert said(deltas) == "a\ufffd"
    assert isinstance(deltas[-1], Finished)


def test_an_answer_that_did_not_finish_is_lost(sham: ShamServer) -> None:
    sham.on(CHAT, stream(delta(content="half")))
    with pytest.raises(EngineLost):
        play(engine_at(sham.url))


def test_roles_again_and_empty_choices_do_no_harm(sham: ShamServer) -> None:
    events = [delta(role="assistant", content=""), delta(role="assistant", content="a"), event({"choices": []})]
    crlf = [each.replace(b"\n", b"\r\n") for each in (*events, delta("stop", content="b"), DONE)]
    sham.on(CHAT, stream(*crlf))
    assert said(play(engine_at(sham.url))) == "ab"


def test_tokens_are_counted_by_pieces_where_the_server_does_not_count(sham: ShamServer) -> None:
    sham.on(CHAT, stream(delta(reasoning="thinks"), delta(content="a"), delta(content="b"), delta("stop"), DONE))
    deltas = play(engine_at(sham.url))
    assert [each.text for each in deltas if isinstance(each, Reasoning)] == ["thinks"]
    assert isinstance(deltas[-1], Finished)
    assert deltas[-1].usage.completion_tokens == 3


def test_tool_calls_without_an_index_or_with_the_same_one_stay_apart(sham: ShamServer) -> None:
    calls = [{"id": f"c{n}", "index": 0, "function": {"name": f"f{n}", "arguments": {"n": n}}} for n in range(2)]
    bare = {"id": "c2", "function": {"name": "f2", "arguments": "{}"}}
    sham.on(CHAT, stream(delta(tool_calls=calls), delta(tool_calls=[bare]), delta("stop"), DONE))
    deltas = play(engine_at(sham.url))
    pieces = [each for each in deltas if isinstance(each, ToolCall)]
    assert pieces == [
        ToolCall(0, "c0", "f0", '{"n":0}'),
        ToolCall(1, "c1", "f1", '{"n":1}'),
        ToolCall(2, "c2", "f2", "{}"),
    ]
    assert isinstance(deltas[-1], Finished)
    assert deltas[-1].finish_reason == "tool_calls"


def test_a_server_without_a_model_list_still_serves(sham: ShamServer) -> None:
    del sham.answers["/v1/models"]
    sham.on(CHAT, stream(delta("stop", content="a"), DONE))
    assert said(play(engine_at(sham.url, model="mine"))) == "a"
    assert sham.bodies()[0]["model"] == "mine"


def test_the_llamacpp_dialect_refuses_another_server(sham: ShamServer) -> None:
    info = engine_at(sham.url, dialect="llamacpp").probe()
    assert info.state == "failed"
    assert "openai" in info.detail


# --- thinking in the content -----------------------------------------------------------------------------------------


def thought(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Reasoning))


@pytest.mark.parametrize("opening, closing", THINKING_TAGS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thinking_in_the_content_is_told_as_reasoning(sham: ShamServer, opening: str, closing: str, size: int) -> None:
    whole = f"{opening}\nhm < 3\n{closing}\n\nyes <b>"
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    sham.on(CHAT, stream(*(delta(content=piece) for piece in pieces), delta("stop"), DONE))
    deltas = play(engine_at(sham.url))
    assert thought(deltas) == "hm < 3"
    assert said(deltas) == "yes <b>"
    assert isinstance(deltas[-1], Finished)


def test_thinking_in_an_answer_of_one_piece_is_told_as_reasoning(sham: ShamServer) -> None:
    message = {"role": "assistant", "content": "<think>hm</think>yes"}
    sham.on(CHAT, reply(200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}))
    deltas = play(engine_at(sham.url))
    assert (thought(deltas), said(deltas)) == ("hm", "yes")


def test_what_could_have_been_a_tag_is_told_at_the_end(sham: ShamServer) -> None:
    sham.on(CHAT, stream(delta(content="<th"), delta("stop"), DONE))
    assert said(play(engine_at(sham.url))) == "<th"


def test_a_server_that_sends_reasoning_apart_may_write_tags_in_its_answer(sham: ShamServer) -> None:
    events = [delta(reasoning="hm"), delta(content="<think> is"), delta("stop", content=" a tag</think>"), DONE]
    sham.on(CHAT, stream(*events))
    deltas = play(engine_at(sham.url))
    assert (thought(deltas), said(deltas)) == ("hm", "<think> is a tag</think>")


def test_thinking_before_a_tool_call_is_told_before_it(sham: ShamServer) -> None:
    call = {"index": 0, "id": "1", "function": {"name": "f", "arguments": "{}"}}
    sham.on(CHAT, stream(delta(content="<think>hm </thi"), delta("tool_calls", tool_calls=[call]), DONE))
    kinds = [type(each) for each in play(engine_at(sham.url))[1:-1]]
    assert kinds == [Reasoning, Reasoning, ToolCall]


def test_llamacpp_splits_by_itself(sham: ShamServer) -> None:
    sham.on("/props", reply(200, PROPS))
    sham.on(CHAT, stream(delta("stop", content="<think>a</think>b"), DONE))
    assert said(play(engine_at(sham.url))) == "<think>a</think>b"
