"""A short run of the rig: real broker, real engine, the worker as a process, and everything that can go wrong with them.

The long one is `make faults`, with a new seed each time: what a new one finds shall not turn somebody's unrelated change red. A
seed that fails says how to run it again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.run import run
from tests.faults.schedule import make

pytestmark = [pytest.mark.broker, pytest.mark.engine]

REQUESTS, FAULTS = 60, 8
# Each of these is over within seconds; the others belong to the long run.
KINDS = (
    "broker.kill",
    "broker.stop",
    "client.kill",
    "daemon.kill",
    "daemon.term",
    "disk.full",
    "engine.kill",
    "engine.garbage",
    "engine.mid_line",
    "net.cut",
    "net.double",
    "wire.cut",
    "wire.double",
)


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_doubled_or_torn_whatever_breaks(seed: int, tmp_path: Path) -> None:
    faults = make(seed=seed, requests=REQUESTS, faults=FAULTS, kinds=KINDS)
    command = f"python -m tests.faults --requests {REQUESTS} --faults {FAULTS} --seed {seed} --kinds {','.join(KINDS)}"
    print(f"again: {command}")
    figures = run(seed=seed, requests=REQUESTS, faults=faults, keep=tmp_path / "kept")
    lines = "\n".join(f"{broken.promise}: {broken.request_id} {broken.what}" for broken in figures.broken)
    assert not figures.broken, (
        f"seed {seed} broke a promise:\n{lines}\nhistories and logs in {tmp_path}/kept; again: {command}"
    )
