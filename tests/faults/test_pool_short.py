"""A short run of the rig for a pool: four workers, a real PostgreSQL, a real broker, and what can go wrong with them.

The long one is `make faults-pool`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.pool_world import PoolWorld
from tests.faults.run import run
from tests.faults.schedule import make

pytestmark = [pytest.mark.broker, pytest.mark.engine]

REQUESTS, FAULTS, SEED = 100, 9, 1
# Each of these is over within seconds; the others belong to the long run.
KINDS = (
    "worker.kill",
    "worker.stop",
    "database.kill",
    "database.restart",
    "data.cut",
    "net.cut",
    "net.double",
    "broker.term",
    "wire.cut",
)


def test_a_pool_loses_doubles_and_tears_nothing_whatever_breaks(tmp_path: Path) -> None:
    faults = make(seed=SEED, requests=REQUESTS, faults=FAULTS, kinds=KINDS, pool=True, alone=0.4)
    kinds = ",".join(KINDS)
    command = f"python -m tests.faults --pool --requests {REQUESTS} --faults {FAULTS} --seed {SEED} --kinds {kinds}"
    print(f"again: {command}")
    figures = run(seed=SEED, requests=REQUESTS, faults=faults, keep=tmp_path / "kept", world=PoolWorld)
    lines = "\n".join(f"{broken.promise}: {broken.request_id} {broken.what}" for broken in figures.broken)
    assert not figures.broken, (
        f"a promise was broken:\n{lines}\nhistories and logs in {tmp_path}/kept; again: {command}"
    )
    assert len(figures.happenings) == FAULTS
