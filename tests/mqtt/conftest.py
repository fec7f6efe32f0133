"""What several tests of the link read from and write to."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.fed_wire import listening


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    with listening(tmp_path_factory.mktemp("broker")) as waiting:
        yield waiting
