"""The direct Python API: against the scripted engine, and against a real llama.cpp server."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from llamacpp_mqtt_deploy.core.deltas import Finished, Reasoning, TokenUsage, ToolCall
from llamacpp_mqtt_deploy.core.errors import EngineLost, EngineUnavailable, IdleTimeout, RequestError, TimedOut
from llamacpp_mqtt_deploy.direct import DeploymentConfig, LlamaCppClient
from llamacpp_mqtt_deploy.testing.scripted_engine import Gate, ScriptedEngine, Silence
from tests.support.llama_server import LlamaServer
from tests.support.ports import free_port
from tests.support.waiting import eventually

HELLO = [{"role": "user", "content": "Count from 1 to 10"}]


def test_pieces_join_to_the_answer_and_debug_info_tells_the_rest() -> None:
    engine = ScriptedEngine()
    engine.play(Reasoning("Hm."), "one", " two", Finished("length", TokenUsage(3, 2), tokens_per_second=50.0))
    info: dict[str, Any] = {}
    with LlamaCppClient(DeploymentConfig(temperature=0.5), engine=engine) as client:
        assert list(client.generate_stream(HELLO, max_tokens=2, debug_info=info)) == ["one", " two"]
    assert info["finish_reason"] == "length"
    assert info["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "cached_tokens": 0}
    assert info["reasoning"] == "Hm."
    assert info["timings"]["tokens_per_second"] == 50.0
    assert info["timings"]["first_token_ms"] <= info["timings"]["total_ms"]
    assert engine.calls[-1].sampling == {"temperature": 0.5, "max_tokens": 2}


def test_tool_calls_are_put_together() -> None:
    engine = ScriptedEngine()
    engine.play(ToolCall(0, "c1", "light", ""), ToolCall(0, None, None, '{"on":'), ToolCall(0, None, None, "true}"))
    info: dict[str, Any] = {}
    tools = [{"type": "function", "function": {"name": "light"}}]
    assert LlamaCppClient(engine=engine).generate(HELLO, debug_info=info, tools=tools, tool_choice="required") == ""
    assert info["tool_calls"][0]["function"] == {"name": "light", "arguments": '{"on":true}'}
    assert engine.calls[-1].tool_choice == "required"


@pytest.mark.parametrize("error", [EngineLost("gone"), IdleTimeout("silent")])
def test_an_error_is_an_exception_after_the_pieces_before_it(error: RequestError) -> None:
    engine = ScriptedEngine()
    engine.play("half", error)
    stream = LlamaCppClient(engine=engine).generate_stream(HELLO)
    assert next(stream) == "half"
    with pytest.raises(type(error), match=error.message):
        next(stream)


def test_the_overall_limit_ends_a_generation_that_hangs() -> None:
    engine = ScriptedEngine()
    engine.play("half", Silence())
    with pytest.raises(TimedOut, match=r"after 0\.1 s"):
        LlamaCppClient(DeploymentConfig(timeout_s=0.1), engine=engine).generate(HELLO)
    eventually(lambda: engine.busy == 0)


def test_leaving_early_frees_the_slot_at_once() -> None:
    engine = ScriptedEngine()
    engine.play("one", "two", Gate())
    for _ in LlamaCppClient(engine=engine).generate_stream(HELLO):
        break
    assert engine.busy == 0


def test_a_server_that_is_not_there_is_an_exception() -> None:
    config = DeploymentConfig(server_url=f"http://127.0.0.1:{free_port()}", wait_for_server_s=0.2)
    with pytest.raises(EngineUnavailable):
        LlamaCppClient(config).generate(HELLO)


@pytest.mark.engine
def test_a_real_server_streams(llama_server: LlamaServer) -> None:
    info: dict[str, Any] = {}
    with LlamaCppClient(DeploymentConfig(server_url=llama_server.url)) as client:
        pieces = list(client.generate_stream(HELLO, temperature=0.0, max_tokens=8, debug_info=info))
        assert "".join(pieces) == client.generate(HELLO, temperature=0.0, max_tokens=8)
    assert 1 <= info["usage"]["completion_tokens"] <= 8


@pytest.mark.engine
def test_nothing_but_the_programs_own_output_reaches_stdout(llama_server: LlamaServer) -> None:
    program = (
        "from llamacpp_mqtt_deploy.direct import DeploymentConfig, LlamaCppClient\n"
        f"client = LlamaCppClient(DeploymentConfig(server_url={llama_server.url!r}))\n"
        "client.generate([{'role': 'user', 'content': 'hi'}], max_tokens=1)\n"
        "print('mine')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "mine\n"
    assert result.stderr == ""


def test_the_key_is_in_no_representation() -> None:
    assert "secret" not in repr(DeploymentConfig(api_key="secret"))
