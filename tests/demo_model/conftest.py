"""Fixtures of the demo model's tests: the engines that load it, and what they are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamacpp_mqtt_deploy import demo_model
from tests.demo_model.exact_server import HERE, ExactServer
from tests.demo_model.widen import write_f32_copy


@pytest.fixture(scope="session")
def f32_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as F32 tensors. With F16 tensors llama.cpp also rounds what it multiplies them with to F16."""
    pytest.importorskip("gguf")
    return write_f32_copy(demo_model.path(), tmp_path_factory.mktemp("model") / "demo-f32.gguf")


@pytest.fixture(scope="module")
def server() -> Iterator[ExactServer]:
    """The server with the file as it is shipped."""
    pytest.importorskip("xllamacpp")
    running = ExactServer(demo_model.path())
    yield running
    running.close()


@pytest.fixture(scope="module")
def f32_server(f32_copy: Path) -> Iterator[ExactServer]:
    pytest.importorskip("xllamacpp")
    running = ExactServer(f32_copy)
    yield running
    running.close()


def _llama(path: Path) -> Any:
    """llama-cpp-python, set up as the server is, keeping the logits of every place."""
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(
        str(path),
        n_ctx=1024,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )


@pytest.fixture(scope="module")
def llama() -> Iterator[Any]:
    """llama-cpp-python with the file as it is shipped."""
    model = _llama(demo_model.path())
    yield model
    model.close()


@pytest.fixture(scope="module")
def f32_llama(f32_copy: Path) -> Iterator[Any]:
    model = _llama(f32_copy)
    yield model
    model.close()


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    """PyTorch's greedy answers: `single` (question -> answer) and one `conversation`."""
    answers: dict[str, Any] = json.loads((HERE / "known_answers.json").read_text())
    return answers


@pytest.fixture(scope="session")
def references() -> list[dict[str, Any]]:
    """PyTorch's token ids and log-probabilities for some prompts and their answers."""
    rows: list[dict[str, Any]] = json.loads((HERE / "reference_logits.json").read_text())
    return rows
