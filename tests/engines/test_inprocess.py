"""What the in-process engine owes beyond the contract: it equals the server, survives misuse, and stops in native code."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.deltas import Delta, EngineCall, Finished, PromptProgress, Reasoning, Text, ToolCall
from llamacpp_mqtt_deploy.core.errors import (
    BadRequest,
    EngineLost,
    EngineUnavailable,
    IdleTimeout,
    ModelNotFound,
    RequestError,
    Unsupported,
)
from llamacpp_mqtt_deploy.engines.inprocess import downloading, inprocess_engine, modelfile, native, prefixes
from llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine import InprocessEngine
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.ports import Engine
from llamacpp_mqtt_deploy.stopping import Deadline, Stopped, StopSignal
from tests.engines.members import CITY_SCHEMA, WEATHER, say
from tests.support.inside import frozen_computation, make_engine, need_llama_cpp
from tests.support.llama_server import LlamaServer
from tests.support.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf
from tests.support.waiting import eventually

pytestmark = pytest.mark.inprocess


@pytest.fixture
def engine(tiny_gguf: Path) -> Iterator[InprocessEngine]:
    made = make_engine(tiny_gguf)
    yield made
    made.close(Deadline(5))


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Callable[..., InprocessEngine]]:
    """Open an engine with settings of one's own; not waited for."""
    need_llama_cpp()
    engines: list[InprocessEngine] = []

    def open_one(path: Path, **settings: Any) -> InprocessEngine:
        engine = InprocessEngine(EngineSettings(kind="inprocess", model_path=path, threads=1, **settings))
        engines.append(engine)
        engine.open()
        return engine

    yield open_one
    for engine in engines:
        engine.close(Deadline(5))


def play(engine: Engine, call: EngineCall, stop: StopSignal | None = None) -> list[Delta]:
    return list(engine.stream(call, stop=stop or StopSignal(), on_wait=lambda _: None))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


def finished(deltas: list[Delta]) -> Finished:
    assert isinstance(deltas[-1], Finished)
    return deltas[-1]


def calls_of(deltas: list[Delta]) -> list[tuple[str, Any]]:
    """Name and parsed arguments of each tool call."""
    calls: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    for delta in deltas:
        if isinstance(delta, ToolCall):
            names.setdefault(delta.index, delta.name or "")
            calls.setdefault(delta.index, []).append(delta.arguments)
    return [(names[index], json.loads("".join(pieces))) for index, pieces in calls.items()]


# --- the same as the server ------------------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 7},
        {"seed": 42, "top_k": 0, "top_p": 1.0},
        {"seed": 3, "min_p": 0.2, "temperature": 1.7},
        {"temperature": 0, "repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 0, "logit_bias": {"400": 3.5, "500": -100}},
    ],
    ids=["greedy", "defaults", "open", "hot", "penalties", "bias"],
)
def test_it_says_what_the_server_says(
    engine: InprocessEngine, start_llama_server: Callable[..., LlamaServer], sampling: dict[str, Any]
) -> None:
    # One of its own: what others have left in a server's slots is not evaluated again, and then the last digits differ.
    server = ServerEngine(EngineSettings(url=start_llama_server().url))
    server.open()
    for prompt in ("hello", "the water für 水 😀 is good", "a\n\nb  c"):
        turns = [("system", "be good"), ("user", prompt), ("assistant", "x y"), ("user", prompt)]
        call = EngineCall(
            messages=[{"role": role, "content": content} for role, content in turns],
            sampling={"max_tokens": 40, **sampling},
        )
        here, there = play(engine, call), play(server, call)
        assert text_of(here) == text_of(there)
        assert finished(here).usage.prompt_tokens == finished(there).usage.prompt_tokens
        assert finished(here).usage.completion_tokens == finished(there).usage.completion_tokens
    server.close(Deadline(5))


@pytest.mark.engine
def test_the_demo_model_answers_as_behind_the_server(start_llama_server: Callable[..., LlamaServer]) -> None:
    from llamacpp_mqtt_deploy import demo_model

    path = Path(demo_model.__file__).parent / "demo.gguf"
    running = start_llama_server(model=path, n_ctx=1024, slots=1)
    server = ServerEngine(EngineSettings(url=running.url))
    server.open()
    engine = make_engine(path, context_tokens=1024)
    call = say("Hello, who are you?", temperature=0, max_tokens=80)
    here, there = play(engine, call), play(server, call)
    assert text_of(here) == text_of(there)
    assert finished(here).finish_reason == finished(there).finish_reason
    assert finished(here).usage.completion_tokens == finished(there).usage.completion_tokens
    engine.close(Deadline(5))
    server.close(Deadline(5))


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_comes_whole(engine: InprocessEngine) -> None:
    # 🦊 is no token of this vocabulary: the model can only say its four bytes.
    form = {"type": "json_schema", "json_schema": {"name": "fox", "schema": {"const": "🦊ε🦊"}}}
    deltas = play(engine, replace(say("fox", max_tokens=60, temperature=0), response_format=form))
    texts = [delta.text for delta in deltas if isinstance(delta, Text)]
    assert "".join(texts).strip() == '"🦊ε🦊"'
    assert "🦊" in texts
    assert finished(deltas).usage.completion_tokens >= 12


def test_broken_characters_become_replacement_characters_and_no_empty_text(engine: InprocessEngine) -> None:
    bias = {str(3 + byte): 40 for byte in "🦊".encode()}
    deltas = play(engine, say("fox", max_tokens=200, temperature=1.0, seed=1, logit_bias=bias))
    texts = [delta.text for delta in deltas if isinstance(delta, Text)]
    assert "\ufffd" in "".join(texts)
    assert all(texts)
    "".join(texts).encode()


def test_a_stop_text_is_found_across_tokens_and_not_given(engine: InprocessEngine) -> None:
    whole = text_of(play(engine, say("hello", temperature=0, max_tokens=40)))
    for start in (5, 11, 17):
        stop = whole[start : start + 6]
        deltas = play(engine, say("hello", temperature=0, max_tokens=40, stop=["never", stop]))
        assert text_of(deltas) == whole[: whole.index(stop)]
        assert finished(deltas).finish_reason == "stop"
        assert finished(deltas).stop_sequence == stop


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_max_tokens_is_exact(engine: InprocessEngine, limit: int) -> None:
    done = finished(play(engine, say("für 水 😀", max_tokens=limit)))
    assert done.usage.completion_tokens == limit
    assert done.finish_reason == "length"


def test_the_end_of_the_models_turn_is_a_stop(engine: InprocessEngine) -> None:
    deltas = play(engine, say("hello", temperature=0, logit_bias=[["<|im_end|>", 60]]))
    assert finished(deltas).finish_reason == "stop"
    assert text_of(deltas) == ""


def test_a_full_context_ends_an_answer_with_length(tiny_gguf: Path) -> None:
    engine = make_engine(tiny_gguf, context_tokens=256)
    done = finished(play(engine, say("hello")))
    assert done.finish_reason == "length"
    assert 250 <= done.usage.prompt_tokens + done.usage.completion_tokens <= 257
    assert finished(play(engine, say("again", max_tokens=3))).usage.completion_tokens == 3
    engine.close(Deadline(5))


# --- memory of sessions ----------------------------------------------------------------------------------------------


def session(name: str, turns: int) -> EngineCall:
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{name} {turn} " + "the water is good " * 20})
        messages.append({"role": "assistant", "content": f"yes {turn}"})
    messages.append({"role": "user", "content": f"{name} last"})
    return EngineCall(messages=messages, sampling={"temperature": 0, "max_tokens": 4})


def test_sessions_that_take_turns_keep_their_prefixes(engine: InprocessEngine) -> None:
    names = ("ann", "ben", "cat")
    for name in names:
        assert finished(play(engine, session(name, 2))).usage.cached_tokens < 30
    alone = {}
    for name in names:
        done = finished(play(engine, session(name, 3)))
        assert done.usage.cached_tokens > done.usage.prompt_tokens // 2
        alone[name] = done
    # A restored state is as good as a computed one.
    fresh = finished(play(engine, session("dan", 1)))
    assert fresh.usage.cached_tokens < 30


def test_a_restored_state_gives_the_same_answer_as_a_computed_one(tiny_gguf: Path) -> None:
    remembering, forgetful = make_engine(tiny_gguf), make_engine(tiny_gguf, state_cache_mib=0)
    for turns in (1, 2, 3, 2, 3):
        for name in ("ann", "ben"):
            call = replace(session(name, turns), sampling={"temperature": 0, "max_tokens": 20})
            assert text_of(play(remembering, call)) == text_of(play(forgetful, call))
    remembering.close(Deadline(5))
    forgetful.close(Deadline(5))


def test_saved_states_stay_within_their_memory(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = prefixes.Prefixes

    def remember(*args: Any) -> Any:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(inprocess_engine, "Prefixes", remember)
    engine = make_engine(tiny_gguf, state_cache_mib=1)
    for number in range(20):
        play(engine, session(f"n{number}", 4))
        assert made[0].used_bytes <= 1024 * 1024
    assert len(made[0]) >= 2
    engine.close(Deadline(5))


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_cancel_stops_inside_a_batch(slow_gguf: Path) -> None:
    """A batch of this prompt takes two seconds; llama.cpp's own check between two operations ends it in a few milliseconds."""
    engine = make_engine(slow_gguf, batch_tokens=2048)
    stop = StopSignal()
    call = say("the water is good " * 1500, max_tokens=1)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            play(engine, call, stop)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    thread = threading.Thread(target=run, name="call")
    thread.start()
    eventually(lambda: engine.busy == 1)
    stop.wait(0.2)
    started = time.monotonic()
    stop.set("cancelled")
    thread.join(10)
    assert time.monotonic() - started < 1.5  # 0.3 s; the rest is for busy machines
    assert isinstance(errors[0], Stopped)
    eventually(lambda: engine.busy == 0, 1.5)
    engine.close(Deadline(5))


def test_what_was_computed_before_a_cancel_is_used_again(slow_gguf: Path) -> None:
    engine = make_engine(slow_gguf)
    call = say("the water is good " * 1500, max_tokens=1)
    stop = StopSignal()
    cancelled = engine.stream(call, stop=stop, on_wait=lambda _: None)
    next(delta for delta in cancelled if isinstance(delta, PromptProgress) and delta.processed >= 256)
    stop.set("cancelled")
    with pytest.raises(Stopped):
        list(cancelled)
    stream = engine.stream(call, stop=StopSignal(), on_wait=lambda _: None)
    progress = next(delta for delta in stream if isinstance(delta, PromptProgress))
    assert progress.cached >= 256
    stream.close()  # type: ignore[attr-defined]
    engine.close(Deadline(5))


def test_a_caller_that_reads_slowly_loses_nothing_and_can_leave(engine: InprocessEngine) -> None:
    call = say("hello", temperature=0, max_tokens=1500)
    whole = text_of(play(engine, call))
    stream = engine.stream(call, stop=StopSignal(), on_wait=lambda _: None)
    got = []
    for delta in stream:
        got.append(delta)
        if len(got) == 3:
            assert not StopSignal().wait(0.3)  # the queue fills meanwhile
    assert text_of(got) == whole
    stream = engine.stream(call, stop=StopSignal(), on_wait=lambda _: None)
    next(stream)
    StopSignal().wait(0.3)
    stream.close()  # type: ignore[attr-defined]
    assert engine.busy == 0


def test_a_computation_that_hangs_holds_no_caller_and_is_reported(
    engine: InprocessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess_engine, "WEDGED_AFTER_S", 0.3)
    with frozen_computation():
        started = time.monotonic()
        with pytest.raises(IdleTimeout):
            play(engine, replace(say("hello"), chunk_timeout_s=0.3))
        assert time.monotonic() - started < 3
        eventually(lambda: engine.info().state == "failed")
        assert "restart" in engine.info().detail.lower()
        assert not engine.restart()
        with pytest.raises(EngineUnavailable):
            play(engine, say("hello"))
        closing = time.monotonic()
        assert engine.info().state == "failed"
    eventually(lambda: engine.info().state == "ready")
    assert time.monotonic() - closing < 10
    assert text_of(play(engine, say("hello", max_tokens=5)))


def test_close_does_not_wait_for_a_computation_that_hangs(tiny_gguf: Path) -> None:
    engine = make_engine(tiny_gguf)
    reached = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            play(engine, say("hello"))
        except RequestError as error:
            errors.append(error)

    with frozen_computation(reached):
        thread = threading.Thread(target=run, name="call")
        thread.start()
        assert reached.wait(5)
        started = time.monotonic()
        engine.close(Deadline(0.3))
        assert time.monotonic() - started < 2
        thread.join(5)
        assert not thread.is_alive()
        assert errors[0].code == "shutting_down"  # type: ignore[attr-defined]
    eventually(lambda: engine._thread is not None and not engine._thread.is_alive())


def test_a_restart_loads_the_model_again_and_a_running_answer_is_lost(engine: InprocessEngine) -> None:
    stream = engine.stream(say("go on", max_tokens=8000), stop=StopSignal(), on_wait=lambda _: None)
    next(delta for delta in stream if isinstance(delta, Text))
    assert engine.restart()
    with pytest.raises(EngineLost):
        list(stream)
    assert text_of(play(engine, say("hello", max_tokens=5)))
    assert engine.info().state == "ready"


def test_two_hundred_interleaved_requests_mix_no_text_and_leak_nothing(engine: InprocessEngine) -> None:
    expected = {n: text_of(play(engine, own(n))) for n in range(10)}
    problems: list[str] = []
    before = 0

    def client(number: int) -> None:
        for turn in range(20):
            stop = StopSignal()
            deltas: list[Delta] = []
            try:
                for delta in engine.stream(own(number), stop=stop, on_wait=lambda _: None):
                    deltas.append(delta)
                    if turn % 4 == 1 and len(deltas) == 3 + number:
                        stop.set("cancelled")
                if text_of(deltas) != expected[number]:
                    problems.append(f"{number}/{turn}: {text_of(deltas)!r}")
            except Stopped:
                if not expected[number].startswith(text_of(deltas)):
                    problems.append(f"{number}/{turn} cancelled: {text_of(deltas)!r}")

    for round_number in range(2):
        clients = [threading.Thread(target=client, args=(n,), name=f"client-{n}") for n in range(10)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(60)
            assert not thread.is_alive()
        if round_number == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not problems
    assert engine.busy == 0
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 20 * 1024


def own(number: int) -> EngineCall:
    return say(f"session {number} " + "water " * number, seed=number, max_tokens=25)


# --- formats and tools -----------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ['a "quoted" \\ one', "Köln 水", "new\nline"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 3},
        "friend": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/friend"}]},
    },
    "required": ["name", "age", "tags", "friend"],
    "$defs": {
        "friend": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
    },
}


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_fits_its_schema(engine: InprocessEngine, seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    deltas = play(engine, replace(say("who", seed=seed, max_tokens=600), response_format=form))
    assert finished(deltas).finish_reason == "stop"
    jsonschema.validate(json.loads(text_of(deltas)), PERSON)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_constrained_answer_after_thinking_is_only_the_json(engine: InprocessEngine, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA}}
    call = say("city", temperature=temperature, max_tokens=200)
    deltas = play(engine, replace(call, response_format=form, thinking=True, thinking_budget=10))
    assert any(isinstance(delta, Reasoning) for delta in deltas)
    assert json.loads(text_of(deltas))["city"] in ("Rome", "Köln")
    assert finished(deltas).usage.reasoning_tokens


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a+$"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"type": "string", "maxLength": 10**9},
        {"enum": []},
        {"anyOf": []},
        {"type": "nonsense"},
        {"properties": 3},
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(engine: InprocessEngine, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(BadRequest):
        play(engine, replace(say("x"), response_format=form))
    assert engine.busy == 0
    assert text_of(play(engine, say("still alive", max_tokens=3)))


def test_a_grammar_that_llama_cpp_refuses_is_a_refusal_and_not_a_crash(
    engine: InprocessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "llamacpp_mqtt_deploy.engines.inprocess.planning.grammar_of", lambda schema: 'root ::= "unclosed'
    )
    with pytest.raises(BadRequest):
        play(engine, replace(say("x"), response_format={"type": "json_object"}))
    assert text_of(play(engine, say("still alive", max_tokens=3)))


def tools_call(**changes: Any) -> EngineCall:
    """A random model calls a tool when its mark is made likely."""
    call = say("weather", max_tokens=80, temperature=0)
    return replace(call, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False, **changes)


TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


def test_a_required_call_is_one_of_the_tools(engine: InprocessEngine) -> None:
    deltas = play(engine, tools_call())
    assert finished(deltas).finish_reason == "tool_calls"
    (name, arguments), *more = calls_of(deltas)
    assert not more
    assert (name, arguments) in [("get_weather", {"city": "Rome"}), ("get_time", {})]
    assert text_of(deltas) == ""


@pytest.mark.parametrize("name", ["get_weather", "get_time"])
def test_a_named_tool_is_the_one_that_is_called(engine: InprocessEngine, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    deltas = play(engine, replace(tools_call(), tool_choice=choice))
    assert [called for called, _ in calls_of(deltas)] == [name]
    ids = {delta.id for delta in deltas if isinstance(delta, ToolCall) and delta.id}
    assert len(ids) == 1
    assert next(iter(ids)).startswith("call_")


def test_several_calls_in_one_answer_are_told_apart(engine: InprocessEngine) -> None:
    call = replace(tools_call(), parallel_tool_calls=True)
    call = replace(call, sampling={**call.sampling, "logit_bias": [["<tool_call>", 60]], "max_tokens": 150})
    deltas = play(engine, call)
    assert len(calls_of_complete(deltas)) >= 2


def calls_of_complete(deltas: list[Delta]) -> list[int]:
    return sorted({delta.index for delta in deltas if isinstance(delta, ToolCall)})


def test_without_tool_choice_the_model_may_just_talk(engine: InprocessEngine) -> None:
    deltas = play(engine, replace(tools_call(), tool_choice=None))
    assert text_of(deltas)
    assert finished(deltas).finish_reason == "length"


def test_tool_choice_none_keeps_the_tools_from_the_model(engine: InprocessEngine) -> None:
    with_tools = engine.count_tokens(tools_call(), stop=StopSignal())
    without = engine.count_tokens(replace(tools_call(), tool_choice="none"), stop=StopSignal())
    assert with_tools is not None
    assert without is not None
    assert without < with_tools


def test_a_tool_that_is_not_there_cannot_be_named(engine: InprocessEngine) -> None:
    with pytest.raises(BadRequest):
        play(engine, replace(tools_call(), tool_choice={"type": "function", "function": {"name": "other"}}))


def test_tools_are_refused_where_the_template_knows_no_readable_form(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    engine = make_engine(write_tiny_gguf(tmp_path / "plain.gguf", chat_template=plain))
    assert not engine.info().tools
    assert not engine.info().thinking
    with pytest.raises(Unsupported):
        play(engine, tools_call())
    assert engine.unsupported_fields(replace(say("x"), thinking=True, thinking_budget=3)) == (
        "thinking",
        "thinking_budget",
    )
    assert engine.unsupported_fields(replace(say("x"), thinking=False)) == ()
    engine.close(Deadline(5))


# --- thinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thinking_budget_is_kept(engine: InprocessEngine, budget: int) -> None:
    call = replace(say("think", temperature=0, max_tokens=60), thinking=True, thinking_budget=budget)
    deltas = play(engine, call)
    reasoning = finished(deltas).usage.reasoning_tokens
    assert reasoning is not None
    assert budget <= reasoning <= budget + 8  # the forced end has tokens of its own
    assert text_of(deltas)
    assert "think>" not in text_of(deltas)


def test_a_template_that_always_thinks_is_overruled(tmp_path: Path) -> None:
    always = CHAT_TEMPLATE.split("{% if enable_thinking")[0] + "<think>\n{% endif %}"
    assert always != CHAT_TEMPLATE
    engine = make_engine(write_tiny_gguf(tmp_path / "always.gguf", chat_template=always))
    thinks = play(engine, replace(say("x", max_tokens=20), thinking=None))
    assert not text_of(thinks)
    silent = play(engine, replace(say("x", max_tokens=20), thinking=False))
    assert text_of(silent)
    assert not any(isinstance(delta, Reasoning) for delta in silent)
    engine.close(Deadline(5))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_model_is_not_found(engine: InprocessEngine) -> None:
    with pytest.raises(ModelNotFound):
        play(engine, replace(say("x"), model="other"))
    assert text_of(play(engine, replace(say("x", max_tokens=3), model=engine.info().models[0])))


def test_an_image_is_refused_with_a_sentence(engine: InprocessEngine) -> None:
    parts = [
        {"type": "text", "text": "what is this"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
    ]
    with pytest.raises(Unsupported):
        play(engine, EngineCall(messages=[{"role": "user", "content": parts}]))


def test_a_bias_on_a_token_that_is_not_there_is_refused(engine: InprocessEngine) -> None:
    with pytest.raises(BadRequest):
        play(engine, say("x", logit_bias={"99999999": 1}))


def test_tokens_are_counted_from_many_threads_while_one_generates(engine: InprocessEngine) -> None:
    stream = engine.stream(say("go on", max_tokens=3000), stop=StopSignal(), on_wait=lambda _: None)
    next(delta for delta in stream if isinstance(delta, Text))
    counts: list[int | None] = []
    call = say("the water für 水 is good " * 50)
    threads = [
        threading.Thread(target=lambda: counts.append(engine.count_tokens(call, stop=StopSignal())), name=f"count-{n}")
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(counts) == 8
    assert len(set(counts)) == 1
    stream.close()  # type: ignore[attr-defined]


# --- loading ---------------------------------------------------------------------------------------------------------


def failure(engine: InprocessEngine) -> str:
    eventually(lambda: engine.info().state == "failed")
    with pytest.raises(EngineUnavailable):
        play(engine, say("x"))
    assert engine.count_tokens(say("x"), stop=StopSignal()) is None
    return engine.info().detail


def test_a_missing_file_is_named(open_engine: Callable[..., InprocessEngine], tmp_path: Path) -> None:
    assert "does not exist" in failure(open_engine(tmp_path / "no.gguf"))


def test_under_systemd_a_file_in_home_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOCATION_ID", "1")
    with pytest.raises(modelfile.Unusable, match="ProtectHome"):
        modelfile.look_at(Path("/home/nobody-of-that-name/m.gguf"))


def test_a_folder_is_no_model(open_engine: Callable[..., InprocessEngine], tmp_path: Path) -> None:
    assert "directory" in failure(open_engine(tmp_path))


def test_a_file_that_is_no_gguf_is_named_so(open_engine: Callable[..., InprocessEngine], tmp_path: Path) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS" in failure(open_engine(junk))


def test_a_cut_off_file_is_reported(
    open_engine: Callable[..., InprocessEngine], tiny_gguf: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(tiny_gguf.read_bytes()[:400_000])
    assert "not complete" in failure(open_engine(half))


def test_an_unknown_architecture_asks_for_a_newer_library(
    open_engine: Callable[..., InprocessEngine], tiny_gguf: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"lxama"))
    assert "too old" in failure(open_engine(other))


def test_a_broken_template_fails_the_loading(open_engine: Callable[..., InprocessEngine], tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "broken.gguf", chat_template="{% for %}")
    assert "template" in failure(open_engine(model))


def test_gpu_layers_without_a_gpu_build_are_an_error_that_says_so(
    open_engine: Callable[..., InprocessEngine], tiny_gguf: Path
) -> None:
    need_llama_cpp()
    if native.Library.load().can_offload():
        pytest.skip("this build has GPU support")
    assert "GPU" in failure(open_engine(tiny_gguf, gpu_layers=10))


def test_a_missing_library_says_what_to_install(
    open_engine: Callable[..., InprocessEngine], tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.Library, "_one", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ValueError, match=r"\[inprocess\]"):
        open_engine(tiny_gguf)


def test_a_failed_loading_can_be_tried_again(
    open_engine: Callable[..., InprocessEngine], tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "late.gguf"
    engine = open_engine(path, context_tokens=512)
    failure(engine)
    path.write_bytes(tiny_gguf.read_bytes())
    assert engine.restart()
    assert engine.wait_ready(StopSignal(), 10)
    assert text_of(play(engine, say("x", max_tokens=2)))


def test_a_file_that_appears_later_is_loaded_by_itself(
    open_engine: Callable[..., InprocessEngine], tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inprocess_engine, "LOOK_AGAIN_S", 0.05)
    path = tmp_path / "mounted-late.gguf"
    engine = open_engine(path, context_tokens=512)
    failure(engine)
    path.with_suffix(".part").write_bytes(tiny_gguf.read_bytes())
    path.with_suffix(".part").rename(path)
    assert engine.wait_ready(StopSignal(), 10)


def test_the_engine_can_be_named_without_its_libraries() -> None:
    script = (
        "import sys; sys.modules.update(llama_cpp=None, jinja2=None, numpy=None); "
        "import llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_engine_without_a_model_is_a_configuration_error() -> None:
    with pytest.raises(ValueError, match=r"engine\.model_path"):
        InprocessEngine(EngineSettings(kind="inprocess")).open()


def test_a_context_beyond_the_models_own_is_capped(open_engine: Callable[..., InprocessEngine], tmp_path: Path) -> None:
    engine = open_engine(write_tiny_gguf(tmp_path / "short.gguf", context=512), context_tokens=4096)
    assert engine.wait_ready(StopSignal(), 10)
    assert engine.info().n_ctx == 512


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0", "q5_1", "q4_0"])
def test_every_kv_type_works(tiny_gguf: Path, kv_type: str) -> None:
    engine = make_engine(tiny_gguf, kv_type=kv_type)
    assert text_of(play(engine, say("x", max_tokens=3)))
    engine.close(Deadline(5))


def test_an_engine_that_is_closed_while_it_loads_ends(tiny_gguf: Path) -> None:
    need_llama_cpp()
    for _ in range(10):
        engine = InprocessEngine(EngineSettings(kind="inprocess", model_path=tiny_gguf, threads=1))
        engine.open()
        engine.close(Deadline(5))
        assert engine.info().state == "closed"
        engine.close(Deadline(5))
        assert engine._thread is not None
        assert not engine._thread.is_alive()


# --- downloading -----------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for huggingface_hub."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: Exception | None = None

    def list_repo_files(self, repo_id: str) -> list[str]:
        return ["README.md", "m-q4.gguf", "m-q8.gguf"]

    def hf_hub_download(self, *, repo_id: str, filename: str, tqdm_class: Any) -> str:
        if self.error is not None:
            raise self.error
        with tqdm_class(total=100, initial=0, unit="B") as bar:
            bar.update(50)
            bar.update(50)
        return str(self.path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> Hub:
    hub = Hub(tiny_gguf)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_a_download_tells_its_progress(hub: Hub, tiny_gguf: Path) -> None:
    told: list[float] = []
    assert downloading.fetch("a/b", "*q4*", told.append) == tiny_gguf
    assert told == [0.5, 1.0]


def test_a_model_is_downloaded_and_loaded(hub: Hub) -> None:
    need_llama_cpp()
    engine = InprocessEngine(
        EngineSettings(kind="inprocess", repo_id="a/b", filename="*q8*", threads=1, context_tokens=512)
    )
    engine.open()
    assert engine.wait_ready(StopSignal(), 10), engine.info()
    engine.close(Deadline(5))


@pytest.mark.parametrize(
    "filename,error,said",
    [
        ("*.gguf", None, "one of them"),
        ("*q5*", None, "no file"),
        ("m-q4.gguf", ConnectionError("no route"), "network"),
        ("m-q4.gguf", OSError(28, "No space left on device"), "disk is full"),
    ],
)
def test_a_download_that_fails_says_why(hub: Hub, filename: str, error: Exception | None, said: str) -> None:
    hub.error = error
    with pytest.raises(modelfile.Unusable, match=said):
        downloading.fetch("a/b", filename, lambda _: None)


def test_a_missing_hub_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(modelfile.Unusable, match="pip install huggingface_hub"):
        downloading.fetch("a/b", "m.gguf", lambda _: None)


# --- the end of the process ------------------------------------------------------------------------------------------

_LIVES = """
    import os, signal, sys, threading
    from pathlib import Path
    from llamacpp_mqtt_deploy.core.deltas import EngineCall, Text
    from llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine import InprocessEngine
    from llamacpp_mqtt_deploy.config.settings import EngineSettings
    from llamacpp_mqtt_deploy.stopping import Deadline, StopSignal
    engine = InprocessEngine(EngineSettings(kind="inprocess", model_path=Path(sys.argv[1]), context_tokens=4096, threads=1))
    engine.open()
    assert engine.wait_ready(StopSignal(), 30)
    call = EngineCall(messages=[{"role": "user", "content": "go on"}], sampling={"max_tokens": 4000})
    stream = engine.stream(call, stop=StopSignal(), on_wait=lambda _: None)
    next(delta for delta in stream if isinstance(delta, Text))
"""


@pytest.mark.parametrize(
    "end",
    [
        "",
        "engine.close(Deadline(5))",
        "del stream, engine",
        """
        signal.signal(signal.SIGTERM, lambda *_: engine.close(Deadline(5)))
        os.kill(os.getpid(), signal.SIGTERM)
        """,
    ],
    ids=["left-open", "closed", "forgotten", "sigterm"],
)
def test_the_process_ends_cleanly_in_the_middle_of_an_answer(tiny_gguf: Path, end: str) -> None:
    need_llama_cpp()
    script = textwrap.dedent(_LIVES) + textwrap.dedent(end)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tiny_gguf)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
