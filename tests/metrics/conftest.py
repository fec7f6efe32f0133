"""A bus with nobody on it yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.whole_worker import Bus, bus_in


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    with bus_in(tmp_path) as bus:
        yield bus
