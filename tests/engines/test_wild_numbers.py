"""Numbers that no engine can mean are told to nobody, and neither health nor status ends over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy.config.settings import EngineSettings
from llamacpp_mqtt_deploy.core.completions import CompletionReader, error_from
from llamacpp_mqtt_deploy.core.deltas import Finished, PromptProgress, TokenUsage
from llamacpp_mqtt_deploy.core.events import encode
from llamacpp_mqtt_deploy.engines.server.server_engine import ServerEngine
from llamacpp_mqtt_deploy.testing.scripted_engine import ScriptedEngine
from tests.support.sham_server import DONE, ShamServer, delta, reply, stream
from tests.support.whole_worker import Bus, bus_in

WILD = ["1e30", "1" + "0" * 400, "NaN", "-1", "-1e30", '"5"', "true", "[5]", '{"a": 1}', "null", "18446744073709551615"]
NAMES = ("prompt_tokens", "completion_tokens", "total_tokens")


def _usage(number: str) -> bytes:
    fields = ", ".join(f'"{name}": {number}' for name in NAMES)
    details = f'"prompt_tokens_details": {{"cached_tokens": {number}}}'
    reasoning = f'"completion_tokens_details": {{"reasoning_tokens": {number}}}'
    return f'{{"choices": [], "usage": {{{fields}, {details}, {reasoning}}}}}'.encode()


def _timings(number: str) -> bytes:
    names = ("cache_n", "prompt_n", "predicted_n", "predicted_per_second")
    return ('{"choices": [], "timings": {' + ", ".join(f'"{name}": {number}' for name in names) + "}}").encode()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with bus_in(tmp_path) as bus:
        yield bus


@pytest.mark.parametrize("number", WILD)
@pytest.mark.parametrize("where", [_usage, _timings])
def test_a_count_that_cannot_be_is_as_good_as_none(number: str, where: Any) -> None:
    reader = CompletionReader()
    reader.read(b'{"choices": [{"index": 0, "delta": {"content": "one"}, "finish_reason": "stop"}]}')
    reader.read(where(number))
    reader.read(b"[DONE]")
    finished = reader.finished()
    assert finished == Finished("stop", TokenUsage(completion_tokens=1))
    assert type(finished.usage.completion_tokens) is int


@pytest.mark.parametrize("number", WILD)
def test_progress_that_cannot_be_counts_as_none(number: str) -> None:
    reader = CompletionReader()
    told = f'"prompt_progress": {{"processed": {number}, "total": {number}, "cache": {number}}}'
    deltas = reader.read(f'{{"choices": [{{"index": 0, "delta": {{}}}}], {told}}}'.encode())
    assert deltas == [PromptProgress(0, 0, 0)]


@pytest.mark.parametrize("number", WILD)
def test_numbers_of_an_overflow_that_cannot_be_are_left_out(number: str) -> None:
    told = {"type": "exceed_context_size_error", "message": "too long"} | dict.fromkeys(
        ("n_prompt_tokens", "n_ctx"), json.loads(number)
    )
    assert error_from(told, 400).details == {}


@pytest.mark.parametrize("number", WILD)
def test_slots_and_context_that_cannot_be_are_not_believed(number: str) -> None:
    with ShamServer() as sham:
        props = f'{{"total_slots": {number}, "default_generation_settings": {{"n_ctx": {number}}}}}'
        sham.on("/props", reply(200, props.encode()))
        engine = ServerEngine(EngineSettings(url=sham.url, dialect="llamacpp"))
        info = engine.probe()
    assert (info.slots, info.n_ctx) == (1, None)
    encode({"slots": info.slots, "n_ctx": info.n_ctx})


def test_a_server_with_thousands_of_slots_gets_as_many_threads_as_the_settings_allow() -> None:
    with ShamServer() as sham:
        sham.on("/props", reply(200, {"total_slots": 100_000, "default_generation_settings": {"n_ctx": 512}}))
        assert ServerEngine(EngineSettings(url=sham.url)).probe().slots == 256


@pytest.mark.parametrize("number", ["1e30", "1" + "0" * 400, "NaN"])
def test_health_goes_on_after_an_engine_counted_wildly(bus: Bus, number: str) -> None:
    with ShamServer() as sham:
        answer = stream(delta(content="good"), delta("stop"), b"data: " + _usage(number) + b"\n\n", DONE)
        sham.on("/v1/chat/completions", answer)
        bus.worker(ServerEngine(EngineSettings(url=sham.url)), status__health_every_s=1)
        bus.ask("hi", request_id="r1")
        done = bus.listener.terminal("r1")
        assert (done["type"], done["full_content"], done["usage"]["completion_tokens"]) == ("done", "good", 1)
        bus.listener.events.clear()
        health = bus.listener.until(_topic="llm/health/w1")
        assert (health["requests"]["done"], health["tokens"]["completion"]) == (1, 1)


def test_health_goes_on_after_an_engine_of_any_kind_counted_wildly(bus: Bus) -> None:
    engine = ScriptedEngine()
    wild = TokenUsage(prompt_tokens=10**30, completion_tokens=-(10**30), cached_tokens=2**80)
    engine.play("good", Finished("stop", wild, tokens_per_second=float("inf")))
    worker = bus.worker(engine, status__health_every_s=1)
    bus.ask("hi", request_id="r1")
    done = bus.listener.terminal("r1")
    assert (done["type"], done["full_content"]) == ("done", "good")
    bus.listener.events.clear()
    health = bus.listener.until(_topic="llm/health/w1")
    assert health["tokens"] == {"prompt": 0, "cached": 0, "completion": 0}
    bus.broker.drop_connection(worker.client_id)
    bus.listener.events.clear()
    bus.listener.until(state="online")


def test_what_is_published_is_json_whatever_number_is_in_it() -> None:
    told = {"a": 10**30, "b": [-(10**30)], "c": float("nan"), "d": 2**64 - 1}
    assert json.loads(encode(told)) == {"a": None, "b": [None], "c": None, "d": 2**64 - 1}
