"""`python -m tests.faults --requests 10000 --faults 300 --seed 7`: breaks everything, again and again, and counts what was lost."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.picture import Picture, again, table, write_docs
from tests.faults.pool_world import PoolWorld
from tests.faults.run import Figures, run
from tests.faults.schedule import KINDS, OFTEN, POOL_KINDS, Fault, make, shrink
from tests.faults.world import World


def main() -> int:
    options = _options()
    seed = options.seed if options.seed is not None else secrets.randbelow(10**6)
    known = (*POOL_KINDS, *OFTEN) if options.pool else tuple(KINDS)
    kinds = [kind for kind in known if not options.kinds or any(kind.startswith(k) for k in options.kinds.split(","))]
    kinds = [kind for kind in kinds if kind not in options.skip.split(",")]
    faults = make(
        seed=seed,
        requests=options.requests,
        faults=options.faults,
        kinds=kinds,
        pool=options.pool,
        alone=0.4 if options.pool else 0.7,
    )
    if options.only:
        numbers = {int(number) for number in options.only.split(",")}
        faults = [fault for fault in faults if fault.number in numbers]
    command = again(seed=seed, options=options)
    print(f"seed {seed}: {options.requests} requests, {len(faults)} faults. Again: {command}", flush=True)
    figures = _run(options, seed, faults)
    print(table(figures))
    if figures.broken:
        print(f"Again: {command}")
        if options.shrink:
            fewest = shrink(faults, lambda some: _fails(options, seed, some))
            left = ",".join(str(fault.number) for fault in fewest)
            options.only = left
            print(
                f"Fewest faults that still fail: {[str(f) for f in fewest]}\nAgain: {again(seed=seed, options=options)}"
            )
    elif options.write_docs:
        write_docs(figures, command, "faults of a pool" if options.pool else "faults")
    return 1 if figures.broken else 0


def _fails(options: argparse.Namespace, seed: int, some: Sequence[Fault]) -> bool:
    broken = _run(options, seed, some).broken
    numbers = ",".join(str(fault.number) for fault in some)
    what = f"breaks {', '.join(sorted({each.promise for each in broken}))}" if broken else "breaks nothing"
    print(f"{len(some)} faults ({numbers}): {what}", flush=True)
    return bool(broken)


def _run(options: argparse.Namespace, seed: int, faults: Sequence[Fault]) -> Figures:
    without = options.without.split(",")
    with Picture(sys.stdout) as picture:
        return run(
            seed=seed,
            requests=options.requests,
            faults=faults,
            keep=options.keep,
            show=picture.show,
            without=without,
            window=options.window,
            world=PoolWorld if options.pool else World,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--pool", action="store_true", help="four workers on one PostgreSQL, and faults of theirs")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, help="chooses requests and faults; random when absent")
    parser.add_argument("--kinds", default="", help="only kinds that begin so, separated by commas: net.,daemon.kill")
    parser.add_argument(
        "--without", default="", help="kinds of requests to leave out, separated by commas: bare,cancel"
    )
    parser.add_argument("--skip", default="", help="kinds of faults to leave out, separated by commas")
    parser.add_argument("--window", type=int, default=3, help="requests that each client has under way")
    parser.add_argument("--only", default="", help="only these faults of the schedule, by number: 3,17")
    parser.add_argument(
        "--shrink", action="store_true", help="after a failure look for the fewest faults that still fail"
    )
    parser.add_argument("--keep", type=Path, help="folder for histories and logs of a run that failed")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/reliability.md")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
