"""Brokers of their own for the tests of the client's side: all of them use the root `llm`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client.worker import ACCESS_LIST, PASSWORDS
from tests.support.mosquitto import Mosquitto


@pytest.fixture
def broker(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    return start_mosquitto()


@pytest.fixture
def guarded(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    """With passwords and the access list that the protocol recommends."""
    return start_mosquitto(users=PASSWORDS, acl=ACCESS_LIST)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What `lmd` finds around it: no configuration but what a test gives, and a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LMD_")}
    return kept | {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "LMD_CONFIG": os.devnull}
