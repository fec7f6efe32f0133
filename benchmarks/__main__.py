"""What the bus costs, measured: `python -m benchmarks`, or `make bench`. docs/performance.md tells how to read it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from benchmarks.bench import Bench
from benchmarks.cancelling import cancels
from benchmarks.ceiling import ceiling
from benchmarks.chat import second_turn
from benchmarks.figures import aligned, rows
from benchmarks.floor import floor
from benchmarks.footprint import footprint
from benchmarks.inprocess import in_process
from benchmarks.page import write
from benchmarks.processor import cost
from benchmarks.samples import LoadFailed
from benchmarks.speed import first_token, throughput
from benchmarks.through_gateway import through_gateway
from benchmarks.users import paced
from benchmarks.waiting import long_queue
from benchmarks.world import ROOT, World

CASES: Mapping[str, Callable[[Bench], None]] = {
    "a": throughput,
    "b": first_token,
    "c": cost,
    "d": ceiling,
    "e": second_turn,
    "f": footprint,
    "g": cancels,
    "h": in_process,
    "i": paced,
    "k": floor,
    "l": through_gateway,
    "m": long_queue,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    wanted = parser.parse_args(arguments)
    if wanted.quick and wanted.write_docs:
        parser.error("figures of --quick are none for docs/performance.md")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    older = _values(wanted.compare) if wanted.compare else None
    with World() as world:
        bench = Bench(world, wanted.quick)
        described = world.described()
        for name, value in (line for part in described.values() for line in part.items()):
            bench.tell(f"{name}: {value}")
        seconds, failed = {}, []
        for letter in wanted.only or CASES:
            bench.tell(f"({letter}) {_title(CASES[letter])}")
            started = time.monotonic()
            try:
                CASES[letter](bench)
            except LoadFailed as problem:
                # The others took minutes, too.
                print(f"({letter}) failed: {problem}", file=sys.stderr)
                failed.append(letter)
            seconds[letter] = round(time.monotonic() - started, 1)
            bench.tell(f"  took {seconds[letter]:.0f} s")
    print()
    print(aligned(rows(bench.figures, older)))
    record = {
        **described,
        "quick": wanted.quick,
        "seconds": seconds,
        "failed": failed,
        "figures": [figure.as_json() for figure in bench.figures],
        "curves": bench.curves,
    }
    if wanted.json:
        wanted.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}. The page in docs/ stays as it is.", file=sys.stderr)
        return 1
    if wanted.write_docs:
        titles = {letter: _title(case) for letter, case in CASES.items()}
        written = write(
            ROOT / "docs" / "performance.md",
            described=described,
            titles=titles,
            figures=bench.figures,
            curves=bench.curves,
        )
        print("written:", ", ".join(path.name for path in written))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    cases = ", ".join(f"{letter}: {_title(case)}" for letter, case in CASES.items())
    parser.add_argument("--only", type=_letters, metavar="A,B,...", help=f"only these cases ({cases})")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to read figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    parser.add_argument("--write-docs", action="store_true", help="put figures and plots into docs/performance.md")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show the ratio to the figures of an older file")
    return parser


def _title(case: Callable[[Bench], None]) -> str:
    return (case.__doc__ or "").partition(") ")[2].rstrip(".")


def _letters(text: str) -> list[str]:
    letters = [letter.strip() for letter in text.split(",") if letter.strip()]
    if unknown := [letter for letter in letters if letter not in CASES]:
        raise argparse.ArgumentTypeError(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return letters


def _values(path: Path) -> dict[tuple[str, str], float]:
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {(figure["case"], figure["name"]): figure["value"] for figure in record["figures"]}


if __name__ == "__main__":
    sys.exit(main())
