"""A short form of `make soak`: after a load the worker holds what it held before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.soak import Sample, grown, soak

pytestmark = [pytest.mark.broker, pytest.mark.engine]


def test_after_a_load_with_cancels_threads_descriptors_and_rows_are_what_they_were(tmp_path: Path) -> None:
    samples: list[Sample] = []
    with soak(tmp_path, limits__remember_s=1) as world:
        world.load(1.5, samples.append)
        before = world.rest()
        world.load(before.at_s + 2.5, samples.append)
        after = world.rest()
    assert after.ended - before.ended > 0
    assert after.cancelled - before.cancelled > 0
    assert max(sample.rows for sample in samples) > before.rows
    assert not grown(before, after), (before, after)


def test_what_is_held_longer_than_needed_is_named() -> None:
    before = Sample(1.0, 50_000_000, threads=20, descriptors=30, rows=3, database_bytes=65_536, ended=5, cancelled=1)
    assert grown(before, before) == []
    after = replace(before, threads=21, descriptors=38, rows=4, database_bytes=265_536, ended=500)
    assert grown(before, after) == [
        "threads at rest grew from 20 to 21",
        "descriptors at rest grew from 30 to 38",
        "rows at rest grew from 3 to 4",
        "the database at rest grew from 65536 to 265536 bytes",
    ]
