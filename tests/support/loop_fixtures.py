"""The I/O loop as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamacpp_mqtt_deploy.io_loop import IoLoop


@pytest.fixture
def loop() -> Iterator[IoLoop]:
    """One that runs."""
    made = IoLoop()
    made.start()
    yield made
    made.close()
