"""Fixtures that bring a real PostgreSQL into tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.postgres_server import PostgresServer, close_shared, shared_postgres


@pytest.fixture
def postgres() -> PostgresServer:
    """A running PostgreSQL for everybody, shared by the tests of one process: leave it running, use a schema of your own."""
    return shared_postgres()


@pytest.fixture
def start_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Start one of one's own: `start_postgres(fsync=True, settings={"max_connections": "10"})`."""
    servers: list[PostgresServer] = []

    def start(**wishes: Any) -> PostgresServer:
        servers.append(PostgresServer(**wishes))
        return servers[-1].start()

    yield start
    for server in servers:
        server.close()


def pytest_unconfigure(config: pytest.Config) -> None:
    close_shared()
