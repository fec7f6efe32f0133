"""The call that an engine gets: the request over its route's defaults, with as much of the history as leaves room to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from typing_extensions import override

from llamacpp_mqtt_deploy.config.settings import Settings
from llamacpp_mqtt_deploy.core.deltas import EngineCall, Message
from llamacpp_mqtt_deploy.core.errors import BadRequest, Unsupported
from llamacpp_mqtt_deploy.ports import EngineInfo, EntryKey, HistoryChange, StoreError
from llamacpp_mqtt_deploy.stores.sqlite import SqliteStore
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from llamacpp_mqtt_deploy.worker.policies import Policies
from llamacpp_mqtt_deploy.worker.prompting import PromptBuilder
from tests.support.lone_job import lone_job

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "listen", "parameters": {"type": "object"}}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SESSION = ("default", "demo")


class Engine(ScriptedEngine):
    vision = False
    unknown: tuple[str, ...] = ()

    @override
    def info(self) -> EngineInfo:
        return replace(super().info(), vision=self.vision)

    @override
    def unsupported_fields(self, call: EngineCall) -> tuple[str, ...]:
        return self.unknown


class Bench:
    """A session with a history, and the settings of its worker by section."""

    def __init__(self, *, n_ctx: int | None = 100_000, history: Sequence[Message] = (), **sections: Any) -> None:
        self.engine = Engine(n_ctx=n_ctx)
        self.engine.open()
        self.store = SqliteStore(None)
        self.store.open()
        if history:
            change = HistoryChange(session=SESSION, append=tuple(history))
            self.store.finish(EntryKey(*SESSION, "before"), b"{}", now=1.0, history=change)
        policies = Policies.of(Settings(**sections))
        self.builder = PromptBuilder(engine=self.engine, store=self.store, policies=lambda: policies)

    def call(self, **fields: Any) -> EngineCall:
        return self.builder.build(lone_job(**fields))


def _route(**route: Any) -> dict[str, Any]:
    return {"routes": {"default": route}}


def _contents(call: EngineCall) -> list[tuple[str, Any]]:
    return [(message["role"], message["content"]) for message in call.messages]


# --- defaults ----------------------------------------------------------------------------------------------------------


def test_a_request_says_more_than_its_route() -> None:
    bench = Bench(
        **_route(temperature=0.1, top_k=5, tools=[TOOL], thinking=True, thinking_budget=9, model="m"),
        engine={"models": ["n"], "chunk_timeout_s": 12},
    )
    call = bench.call(
        temperature=0.9, tools=[OTHER_TOOL], tool_choice="required", thinking=False, thinking_budget=0, model="n"
    )
    assert call.sampling == {"temperature": 0.9, "top_k": 5, "max_tokens": 1024}
    assert [tool["function"]["name"] for tool in call.tools or ()] == ["listen"]
    assert (call.tool_choice, call.thinking, call.thinking_budget, call.model) == ("required", False, 0, "n")
    assert call.chunk_timeout_s == 12.0


def test_a_route_says_what_a_request_leaves_open() -> None:
    bench = Bench(**_route(tools=[TOOL], thinking=True, thinking_budget=9, model="m"))
    call = bench.call()
    assert list(call.tools or ()) == [TOOL]
    assert (call.thinking, call.thinking_budget, call.model) == (True, 9, "m")
    assert bench.call(tools=[]).tools == (), "who wants no tools gets none"
    assert Bench().call().tools is None


@pytest.mark.parametrize("asked, given", [(None, 20), (7, 7), (20, 20), (99, 20)])
def test_no_answer_may_be_longer_than_the_worker_allows(asked: int | None, given: int) -> None:
    bench = Bench(limits={"max_tokens": 20})
    fields = {} if asked is None else {"max_tokens": asked}
    assert bench.call(**fields).sampling["max_tokens"] == given


def test_where_nobody_bounds_an_answer_the_engine_does() -> None:
    assert "max_tokens" not in Bench(generation={"max_tokens": None}).call().sampling


def test_what_the_engine_leaves_out_is_a_warning() -> None:
    bench = Bench()
    bench.engine.unknown = ("min_p", "seed")
    job = lone_job()
    bench.builder.build(job)
    assert job.answer.warnings == (
        "the engine does not know min_p; it was left out",
        "the engine does not know seed; it was left out",
    )


@pytest.mark.parametrize("vision", [True, False])
def test_pictures_go_to_a_model_that_can_see_and_to_no_other(vision: bool) -> None:
    bench = Bench()
    bench.engine.vision = vision
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, PICTURE]}]
    if vision:
        assert PICTURE in bench.call(messages=messages).messages[0]["content"]
    else:
        with pytest.raises(Unsupported) as told:
            bench.call(messages=messages)
        assert "messages" in told.value.details["fields"]
    assert len(bench.call(messages=[{"role": "user", "content": "no picture"}]).messages) == 1


@pytest.mark.parametrize(
    "route, roles",
    [
        ({"system_prompt": "Be brief.", "allow_system_prompt": False}, ["system", "user"]),
        ({"system_prompt": "Be brief."}, ["user"]),
        ({"allow_system_prompt": False}, ["user"]),
    ],
)
def test_a_route_that_allows_no_other_system_prompt_puts_its_own_before_messages_too(
    route: dict[str, Any], roles: list[str]
) -> None:
    call = Bench(**_route(**route)).call(messages=[{"role": "user", "content": "alone"}])
    assert [message["role"] for message in call.messages] == roles
    if len(roles) == 2:
        assert call.messages[0]["content"] == "Be brief."


def test_an_empty_system_prompt_of_a_request_takes_the_routes_away() -> None:
    bench = Bench(**_route(system_prompt="Be brief."))
    assert _contents(bench.call()) == [("system", "Be brief."), ("user", "hello")]
    assert _contents(bench.call(system_prompt="")) == [("user", "hello")]


# --- history -----------------------------------------------------------------------------------------------------------


def _said(words: int) -> list[dict[str, Any]]:
    """One exchange of so many words, an even number."""
    return [{"role": role, "content": "word " * (words // 2)} for role in ("user", "assistant")]


@pytest.mark.parametrize(
    "room, n_ctx, max_tokens, sections",
    [
        (3000, 4000, 1000, {}),
        (2000, 4000, None, {}),
        (2000, 4000, 3000, {}),
        (3000, 4000, 1000, {"sessions": {"history_tokens": 3500}}),
        (2500, 4000, 1000, {"sessions": {"history_tokens": 2500}}),
        (2500, None, 1000, {"sessions": {"history_tokens": 2500}}),
        (3000, None, 1000, {"engine": {"context_tokens": 4000}}),
        (3000, 4000, 1000, {"engine": {"context_tokens": 9999}}),
    ],
)
def test_history_leaves_room_for_the_answer_that_was_asked_for_up_to_half_of_the_context(
    room: int, n_ctx: int | None, max_tokens: int | None, sections: dict[str, Any]
) -> None:
    """Each word is a token of the engine; the prompt itself is one."""
    for words, dropped in ((room - 2, 0), (room, 2)):
        bench = Bench(n_ctx=n_ctx, history=_said(words), generation={"max_tokens": max_tokens}, **sections)
        job = lone_job()
        call = bench.builder.build(job)
        assert job.answer.dropped_messages == dropped
        assert len(call.messages) == 3 - dropped


def test_tools_take_room_of_the_history_too() -> None:
    """A history so short that its bytes alone settle that it fits, without a count of the engine."""
    counted: list[EngineCall] = []

    class Counting(Engine):
        @override
        def count_tokens(self, call: EngineCall, **more: Any) -> int | None:
            counted.append(call)
            return super().count_tokens(call, **more)

    bench = Bench(history=_said(2))
    bench.engine = Counting(n_ctx=2000)
    bench.builder._engine = bench.engine
    bench.call(max_tokens=100)
    assert counted == []
    large = {"type": "function", "function": {"name": "look", "description": "d" * 2000, "parameters": {}}}
    bench.call(max_tokens=100, tools=[large])
    assert [list(call.tools or ()) for call in counted] == [[large]]


def test_without_any_bound_the_whole_history_goes_along() -> None:
    assert len(Bench(n_ctx=None, history=_said(9000)).call().messages) == 3


def test_a_history_that_cannot_be_read_costs_the_memory_and_not_the_answer() -> None:
    class Unreadable(SqliteStore):
        @override
        def history(self, session: tuple[str, str]) -> tuple[Message, ...]:
            raise StoreError("disk I/O error")

    bench = Bench(history=_said(2))
    bench.builder._store = Unreadable(None)
    assert _contents(bench.call()) == [("user", "hello")]


def test_new_leaves_the_history_out() -> None:
    bench = Bench(history=_said(2))
    assert len(bench.call().messages) == 3
    assert len(bench.call(new=True).messages) == 1


# --- tool results ------------------------------------------------------------------------------------------------------


def _called(*ids: str) -> list[dict[str, Any]]:
    calls = [{"id": each, "type": "function", "function": {"name": "look", "arguments": "{}"}} for each in ids]
    return [{"role": "user", "content": "look"}, {"role": "assistant", "content": None, "tool_calls": calls}]


def _results(*ids: str) -> list[dict[str, str]]:
    return [{"tool_call_id": each, "content": "dark"} for each in ids]


def test_results_of_all_calls_go_on_in_any_order() -> None:
    bench = Bench(history=_called("a", "b"))
    call = bench.call(tool_results=_results("b", "a"))
    assert [message["role"] for message in call.messages] == ["user", "assistant", "tool", "tool"]


@pytest.mark.parametrize("given", [("a",), ("a", "c"), ("a", "b", "c")])
def test_results_that_do_not_answer_the_calls_are_refused_with_the_calls_that_wait(given: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest) as told:
        Bench(history=_called("a", "b")).call(tool_results=_results(*given))
    assert "a, b" in told.value.message
    assert "a, b" in told.value.details["fields"]["tool_results"]


def test_results_without_a_call_are_refused() -> None:
    with pytest.raises(BadRequest, match="called no tool") as told:
        Bench(history=_said(2)).call(tool_results=_results("a"))
    assert "tool_results" in told.value.details["fields"]


def test_a_refusal_of_results_names_only_so_many_calls() -> None:
    ids = [f"call-{number:03}" for number in range(100)]
    with pytest.raises(BadRequest) as told:
        Bench(history=_called(*ids)).call(tool_results=_results("a"))
    named = ", ".join(ids)[:200]
    assert told.value.message.endswith(named)
    assert told.value.details["fields"]["tool_results"].endswith(named)
