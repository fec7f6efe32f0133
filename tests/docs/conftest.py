"""Worlds for the commands and snippets of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.docs.world import DEMO_MODEL, World
from tests.support.llama_server import LlamaServer

WorldWith = Callable[[str], World]


@pytest.fixture(scope="module")
def demo_server() -> Iterator[LlamaServer]:
    server = LlamaServer(DEMO_MODEL, slots=2, n_ctx=1024, alias="demo").start()
    yield server
    server.close()


@pytest.fixture(scope="module")
def world_with(tmp_path_factory: pytest.TempPathFactory, demo_server: LlamaServer) -> Iterator[WorldWith]:
    """The world with these settings (`LMD_STREAMING__MODE=simulated ...`), or for this worker (`lmd run --set ...`); made when it
    is first asked for.
    """
    worlds: dict[str, World] = {}

    def made(settings: str) -> World:
        if settings not in worlds:
            environment = "" if settings.startswith("lmd run") else settings
            pairs = dict(pair.split("=", 1) for pair in environment.split())
            worlds[settings] = World(tmp_path_factory.mktemp("world"), demo_server, pairs)
        return worlds[settings]

    yield made
    for world in worlds.values():
        world.close()


@pytest.fixture
def world(world_with: WorldWith) -> World:
    """The plain world with its worker running."""
    plain = world_with("lmd run")
    plain.start_worker()
    return plain
