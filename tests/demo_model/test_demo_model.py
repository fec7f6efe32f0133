"""The demo model in both engines: same tokens, same numbers and same words as in PyTorch."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from llamacpp_mqtt_deploy import demo_model
from tests.demo_model.exact_server import ExactServer, known_names

CLOSE = 1e-3  # greatest difference of a logit or a log-probability between an engine and PyTorch, both in F32
# The same with the file as it is shipped: llama.cpp rounds activations to F16 (11 bits) where a weight is F16, through
# six layers, at logits of about 20. Measured: 0.009.
CLOSE_F16 = 0.05
MOST_BYTES = 4_000_000  # a larger file is a burden for every clone and every wheel

GET_TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Returns the current time.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def test_the_model_is_a_real_file_of_less_than_four_megabytes() -> None:
    path = demo_model.path()
    assert path.is_file()
    assert path.stat().st_size < MOST_BYTES
    assert path.read_bytes()[:4] == b"GGUF"


@pytest.mark.inprocess
def test_it_loads_in_well_under_a_second() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    llama_cpp.Llama(str(demo_model.path()), n_ctx=512, n_threads=1, verbose=False).close()  # the library starts up
    started = time.perf_counter()
    llama_cpp.Llama(str(demo_model.path()), n_ctx=512, n_threads=1, verbose=False).close()
    assert time.perf_counter() - started < 1.0


# --- llama.cpp's server ---------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_server_splits_text_into_the_tokens_of_the_training(
    server: ExactServer, references: list[dict[str, Any]]
) -> None:
    for row in references:
        body = {"content": row["prompt"], "add_special": False, "parse_special": True}
        assert server.post("/tokenize", body)["tokens"] == row["prompt_ids"]


def _farthest_log_probability(server: ExactServer, references: list[dict[str, Any]]) -> float:
    """The greatest difference between the server's and PyTorch's log-probabilities, over all tokens after each prompt."""
    farthest = 0.0
    for row in references:
        logits = row["logits_after_prompt"]
        normal = math.log(math.fsum(math.exp(value) for value in logits))
        body = {"prompt": row["prompt_ids"], "n_predict": 1, "temperature": 0, "n_probs": len(logits)}
        (place,) = server.post("/completion", body)["completion_probabilities"]
        seen = {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}
        assert len(seen) == len(logits)
        for index, logit in enumerate(logits):
            if logit - normal > -50:  # F32 leaves nothing of a probability far below
                farthest = max(farthest, abs(seen[index] - (logit - normal)))
    return farthest


@pytest.mark.engine
def test_the_servers_log_probabilities_are_those_of_pytorch(
    f32_server: ExactServer, references: list[dict[str, Any]]
) -> None:
    assert _farthest_log_probability(f32_server, references) < CLOSE


@pytest.mark.engine
def test_the_servers_log_probabilities_stay_close_with_the_file_as_shipped(
    server: ExactServer, references: list[dict[str, Any]]
) -> None:
    assert _farthest_log_probability(server, references) < CLOSE_F16


@pytest.mark.engine
def test_the_server_writes_the_tokens_that_pytorch_writes(
    server: ExactServer, references: list[dict[str, Any]]
) -> None:
    for row in references:
        count = len(row["answer_ids"])
        body = {"prompt": row["prompt_ids"], "n_predict": count, "temperature": 0, "return_tokens": True}
        answer = server.post("/completion", body)
        assert answer["stop_type"] == "eos"
        assert answer["tokens"] == row["answer_ids"]


@pytest.mark.engine
@pytest.mark.parametrize("question", known_names())
def test_the_server_gives_the_known_answer(server: ExactServer, known: dict[str, Any], question: str) -> None:
    choice = server.chat([{"role": "user", "content": question}])
    assert choice["message"]["content"] == known["single"][question]
    assert choice["finish_reason"] == "stop"


@pytest.mark.engine
def test_the_server_remembers_a_name_over_turns(server: ExactServer, known: dict[str, Any]) -> None:
    messages = known["conversation"]
    for place in range(0, len(messages), 2):
        assert server.chat(messages[: place + 1])["message"]["content"] == messages[place + 1]["content"]
    assert messages[-1]["content"] == "Your name is Ada."


@pytest.mark.engine
def test_the_server_finds_the_call_of_the_offered_tool_and_the_model_uses_its_result(server: ExactServer) -> None:
    question: list[dict[str, Any]] = [{"role": "user", "content": "What time is it?"}]
    choice = server.chat(question, tools=[GET_TIME])
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_time"
    assert json.loads(call["function"]["arguments"]) == {}
    result = {"role": "tool", "tool_call_id": call["id"], "content": '{"time": "14:05"}'}
    answer = server.chat([*question, choice["message"], result], tools=[GET_TIME])
    assert answer["message"]["content"] == "It is 14:05 now."


@pytest.mark.engine
def test_the_server_finds_no_call_when_the_question_needs_no_tool(server: ExactServer, known: dict[str, Any]) -> None:
    choice = server.chat([{"role": "user", "content": "Count from 1 to 5"}], tools=[GET_TIME])
    assert choice["finish_reason"] == "stop"
    assert not choice["message"].get("tool_calls")
    assert choice["message"]["content"] == known["single"]["Count from 1 to 5"]


# --- llama-cpp-python -----------------------------------------------------------------------------------------------


@pytest.mark.inprocess
def test_llama_cpp_python_splits_text_into_the_tokens_of_the_training(
    llama: Any, references: list[dict[str, Any]]
) -> None:
    for row in references:
        assert llama.tokenize(row["prompt"].encode(), add_bos=False, special=True) == row["prompt_ids"]


def _farthest_logit(llama: Any, row: dict[str, Any]) -> float:
    """The greatest difference from PyTorch: all logits after the prompt, the likeliest tokens in all of the answer."""
    llama.reset()
    llama.eval(row["prompt_ids"] + row["answer_ids"])
    start = len(row["prompt_ids"]) - 1
    after_prompt = llama.scores[start].tolist()
    farthest: float = max(abs(a - b) for a, b in zip(after_prompt, row["logits_after_prompt"], strict=True))
    for place, (token, top) in enumerate(zip(row["answer_ids"], row["top"], strict=True), start):
        logits = llama.scores[place].tolist()
        assert max(range(len(logits)), key=logits.__getitem__) == token
        normal = math.log(math.fsum(math.exp(value) for value in logits))
        for index, expected in zip(top["ids"], top["logprobs"], strict=True):
            farthest = max(farthest, abs(logits[index] - normal - expected))
    return farthest


@pytest.mark.inprocess
def test_the_logits_of_llama_cpp_python_are_those_of_pytorch(f32_llama: Any, references: list[dict[str, Any]]) -> None:
    assert max(_farthest_logit(f32_llama, row) for row in references) < CLOSE


@pytest.mark.inprocess
def test_the_logits_of_llama_cpp_python_stay_close_with_the_file_as_shipped(
    llama: Any, references: list[dict[str, Any]]
) -> None:
    assert max(_farthest_logit(llama, row) for row in references) < CLOSE_F16


@pytest.mark.inprocess
@pytest.mark.parametrize("question", known_names())
def test_llama_cpp_python_gives_the_known_answer(llama: Any, known: dict[str, Any], question: str) -> None:
    messages = [{"role": "user", "content": question}]
    choice = llama.create_chat_completion(messages, temperature=0.0, max_tokens=400)["choices"][0]
    assert choice["message"]["content"] == known["single"][question]
    assert choice["finish_reason"] == "stop"


@pytest.mark.inprocess
def test_llama_cpp_python_shows_the_call_of_the_offered_tool_as_text(llama: Any) -> None:
    answer = llama.create_chat_completion(
        [{"role": "user", "content": "What time is it?"}], tools=[GET_TIME], temperature=0.0, max_tokens=100
    )
    text = answer["choices"][0]["message"]["content"]
    assert text == '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


# --- the template ---------------------------------------------------------------------------------------------------


def _chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.engine
def test_the_servers_template_engine_renders_a_conversation_with_tools_in_the_hermes_way(server: ExactServer) -> None:
    messages = _chat(("system", "Be brief."), ("user", "What time is it?"))
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    messages.append({"role": "tool", "tool_call_id": "1", "content": "14:05"})
    prompt = server.post("/apply-template", {"messages": messages, "tools": [GET_TIME]})["prompt"].removeprefix("<s>")
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n{")
    assert prompt.endswith(
        "<|im_start|>user\nWhat time is it?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n14:05\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
