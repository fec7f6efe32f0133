"""The engines that the contract suite knows: one function for each, in `MEMBERS`."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings, ManagedSettings
from llamacpp_mqtt_deploy.core.deltas import EngineCall, PromptProgress
from llamacpp_mqtt_deploy.engines.inprocess.inprocess_engine import InprocessEngine
from llamacpp_mqtt_deploy.engines.managed.managed_engine import ManagedEngine
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.io_loop import IoLoop
from llamacpp_mqtt_deploy.ports import Engine
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from tests.support.inside import frozen_computation, make_engine
from tests.support.llama_server import LlamaServer
from tests.support.openai_server import MODEL, OpenAiServer
from tests.support.ports import free_port

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]},
    },
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def say(text: str, **sampling: object) -> EngineCall:
    """A call with one user message."""
    return EngineCall(
        messages=[{"role": "user", "content": text}], sampling={"temperature": 0.8, "seed": 7, **sampling}
    )


@dataclass(kw_only=True)
class Member:
    """An open engine and what it needs to show each clause of the contract."""

    engine: Engine
    busy: Callable[[], int]
    """Slots that the engine's own books call busy."""
    short: EngineCall
    """Gives some text, limited by `max_tokens`."""
    endless: Callable[[], EngineCall]
    """A generation of many seconds."""
    long_prompt: Callable[[], EngineCall]
    """A prompt that takes many seconds and shows progress."""
    overflow: EngineCall
    tools: EngineCall
    json_schema: EngineCall
    thinking: EngineCall
    frozen: Callable[[], AbstractContextManager[object]]
    """While inside, the engine takes requests and gives nothing."""
    unreachable: Engine
    """An engine of this kind whose source of tokens does not exist; gives up after 0.3 s."""
    lacks: frozenset[str] = frozenset()
    """What engines of this kind cannot: `progress`, `thinking`, `counting` (tokens), `limiting` (max_tokens), `parallel`
    (two requests at once), be `away`."""


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Hold a process still: its sockets take connections and requests, and nothing comes back."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@functools.cache
def io_loop() -> IoLoop:
    """One loop for all engines of a test process, as in a worker."""
    loop = IoLoop()
    loop.start()
    return loop


def nobody() -> ServerEngine:
    """An engine whose server does not run."""
    engine = ServerEngine(EngineSettings(url=f"http://127.0.0.1:{free_port()}", unavailable_after_s=0.3))
    engine.open()
    return engine


def scripted_member(request: pytest.FixtureRequest) -> Iterator[Member]:
    def endless() -> EngineCall:
        engine.play("word ", Gate())
        return say("go on")

    def long_prompt() -> EngineCall:
        engine.play(PromptProgress(0, 100, 0), PromptProgress(50, 100, 0), Gate())
        return say("long")

    @contextlib.contextmanager
    def silent() -> Iterator[None]:
        engine.play(Silence())
        yield

    engine = ScriptedEngine(slots=2, n_ctx=4096)
    engine.open()
    away = ScriptedEngine(unavailable_after_s=0.3)
    away.become("unreachable")
    yield Member(
        engine=engine,
        busy=lambda: engine.busy,
        short=say("the water für 水 😀 is good", max_tokens=8),
        endless=endless,
        long_prompt=long_prompt,
        overflow=say("word " * 5000),
        tools=replace(say("weather"), tools=[WEATHER], tool_choice="required"),
        json_schema=replace(say("city"), response_format={"type": "json_object"}),
        thinking=replace(say("think"), thinking=True),
        frozen=silent,
        unreachable=away,
    )


def _server(server: LlamaServer) -> Iterator[Member]:
    engine = ServerEngine(EngineSettings(url=server.url, unavailable_after_s=5.0), loop=io_loop())
    engine.open()
    yield llamacpp_member(engine, busy=server.busy_slots, pid=lambda: server.pid)


def llamacpp_member(engine: Engine, *, busy: Callable[[], int], pid: Callable[[], int]) -> Member:
    """An engine whose server runs the slow model with two slots of 8192 tokens."""
    prompts = iter(range(1000))
    tools = say("weather", max_tokens=60, temperature=0, logit_bias=[["<tool_call>", 50]])
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA}}
    return Member(
        engine=engine,
        busy=busy,
        short=say("the water für 水 😀 is good", max_tokens=8),
        endless=lambda: say("go on", max_tokens=8000),
        # A prompt that was seen before would come from the server's cache.
        long_prompt=lambda: say(f"{next(prompts)} " + "the water is good " * 1500, max_tokens=1),
        overflow=say("the water " * 9000, max_tokens=1),
        tools=replace(tools, tools=[WEATHER], tool_choice="required"),
        json_schema=replace(say("city", max_tokens=200), response_format=schema),
        thinking=replace(say("think", max_tokens=30), thinking=True, thinking_budget=5),
        frozen=lambda: frozen(pid()),
        unreachable=nobody(),
    )


def server_member(request: pytest.FixtureRequest) -> Iterator[Member]:
    yield from _server(request.getfixturevalue("slow_llama_server"))


def unix_server_member(request: pytest.FixtureRequest) -> Iterator[Member]:
    yield from _server(request.getfixturevalue("slow_unix_llama_server"))


def managed_member(request: pytest.FixtureRequest) -> Iterator[Member]:
    settings = EngineSettings(
        kind="managed",
        model_path=request.getfixturevalue("slow_gguf"),
        slots=2,
        context_tokens=8192,
        batch_tokens=64,
        threads=1,
        managed=ManagedSettings(cache_ram_mib=16, extra_args=("--no-warmup", "--reasoning", "off")),
    )
    engine = ManagedEngine(settings)
    engine.open()

    def busy() -> int:
        if engine.info().state != "ready" or engine._inner is None:
            return 0
        return sum(slot.working for slot in engine._inner.slots_progress() or ())

    def pid() -> int:
        assert engine._life is not None
        return engine._life.child.pid

    # Its server is its own affair: it is restarted or has failed, and is never merely away.
    yield replace(llamacpp_member(engine, busy=busy, pid=pid), lacks=frozenset({"away"}))


def openai_member(request: pytest.FixtureRequest) -> Iterator[Member]:
    server: OpenAiServer = request.getfixturevalue("openai_server")
    engine = ServerEngine(EngineSettings(url=server.url, model=MODEL, slots=2, context_tokens=4096), loop=io_loop())
    engine.open()

    def endless() -> EngineCall:
        server.script(type="stream_fault", kind="stall", after_chunks=3, stall_seconds=60)
        return say("go on and on and on")

    def long_prompt() -> EngineCall:
        server.script(type="slow_first_token", seconds=60)
        return say("long")

    yield Member(
        engine=engine,
        busy=lambda: engine.busy,
        short=say("the water für 水 😀 is good"),
        endless=endless,
        long_prompt=long_prompt,
        overflow=say("word"),
        tools=replace(say("weather"), tools=[WEATHER], tool_choice="required"),
        json_schema=replace(
            say("city"), response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA}}
        ),
        thinking=say("think"),
        frozen=lambda: frozen(server.pid),
        unreachable=nobody(),
        lacks=frozenset({"progress", "thinking", "counting", "limiting"}),
    )


def inprocess_member(request: pytest.FixtureRequest) -> Iterator[Member]:
    engine: InprocessEngine = make_engine(request.getfixturevalue("slow_gguf"))
    prompts = iter(range(1000))
    away = InprocessEngine(EngineSettings(kind="inprocess", model_path=Path("/nonexistent/model.gguf")))
    away.open()
    tools = say("weather", max_tokens=60, temperature=0, logit_bias=[["<tool_call>", 50]])
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA}}
    yield Member(
        engine=engine,
        busy=lambda: engine.busy,
        short=say("the water für 水 😀 is good", max_tokens=8),
        endless=lambda: say("go on", max_tokens=8000),
        long_prompt=lambda: say(f"{next(prompts)} " + "the water is good " * 1500, max_tokens=1),
        overflow=say("the water " * 9000, max_tokens=1),
        tools=replace(tools, tools=[WEATHER], tool_choice="required"),
        json_schema=replace(say("city", max_tokens=200), response_format=schema),
        thinking=replace(say("think", max_tokens=30), thinking=True, thinking_budget=5),
        frozen=frozen_computation,
        unreachable=away,
        lacks=frozenset({"parallel", "away"}),
    )


MEMBERS: dict[str, Callable[[pytest.FixtureRequest], Iterator[Member]]] = {
    "inprocess": inprocess_member,
    "managed": managed_member,
    "openai": openai_member,
    "scripted": scripted_member,
    "server": server_member,
    "server-unix": unix_server_member,
}
