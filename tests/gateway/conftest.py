"""Worlds for the tests of the gateway: a broker, a worker and a gateway, all real, the engine scripted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway.world import RunningGateway, World, world_of
from tests.support.mosquitto import Mosquitto


@pytest.fixture
def world(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> Iterator[World]:
    """Nothing but the broker runs yet."""
    with world_of(start_mosquitto(), tmp_path) as world:
        yield world


@pytest.fixture
def gateway(world: World) -> RunningGateway:
    """A gateway with a worker that echoes."""
    world.worker()
    return world.gateway()


@pytest.fixture
def http(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=20) as client:
        yield client
