"""Fixtures that bring a real llama.cpp into tests: a tiny model file and servers that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.llama_server import LlamaServer
from tests.support.openai_server import OpenAiServer
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.2 million random weights, some thousand tokens per second."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="session")
def slow_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that needs some seconds for a prompt of ten thousand tokens."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "slow.gguf", layers=8, width=256)


@pytest.fixture(scope="session")
def llama_server(tiny_gguf: Path) -> Iterator[LlamaServer]:
    """A running server with 4 slots of 8192 tokens over TCP, shared by the tests of one process: leave it running, idle."""
    server = LlamaServer(tiny_gguf).start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def slow_llama_server(slow_gguf: Path) -> Iterator[LlamaServer]:
    """A running server with 2 slots whose prompts take long enough to be cancelled; shared, leave it running and idle."""
    server = LlamaServer(slow_gguf, slots=2).start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def slow_unix_llama_server(slow_gguf: Path) -> Iterator[LlamaServer]:
    """As `slow_llama_server`, behind a unix socket."""
    server = LlamaServer(slow_gguf, slots=2, unix=True).start()
    yield server
    server.close()


@pytest.fixture
def start_llama_server(tiny_gguf: Path) -> Iterator[Callable[..., LlamaServer]]:
    """Start a server of one's own, for tests that kill it or want it different: `start_llama_server(slots=2, unix=True)`."""
    servers: list[LlamaServer] = []

    def start(*, model: Path = tiny_gguf, wait: bool = True, **wishes: Any) -> LlamaServer:
        server = LlamaServer(model, **wishes)
        servers.append(server)
        return server.start(wait=wait)

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def shared_openai_server() -> Iterator[OpenAiServer]:
    server = OpenAiServer().start()
    yield server
    server.close()


@pytest.fixture
def openai_server(shared_openai_server: OpenAiServer) -> OpenAiServer:
    """An OpenAI-compatible server of another make, with nothing scripted."""
    shared_openai_server.reset()
    return shared_openai_server
