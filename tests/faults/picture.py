"""What a run looks like: a live table on a terminal, lines in a pipe, and the table of figures at the end."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tests.faults.checker import Checker
from tests.faults.run import Figures
from tests.faults.world import World

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
LINE_EVERY_S = 5.0


class Picture:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        # No console of rich's in a pipe: one line is one line there.
        self._live = Live(console=Console(file=out), refresh_per_second=5, transient=True) if out.isatty() else None
        self._printed_at = 0.0
        self._told = 0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, figures: Figures, checker: Checker, world: World) -> None:
        now = time.monotonic()
        if self._live is not None:
            if now >= self._printed_at + 0.25:
                self._printed_at = now
                self._live.update(_table_of(figures, checker, world))
            return
        while self._told < len(figures.happenings):
            happening = figures.happenings[self._told]
            self._told += 1
            print(f"{now - figures.began_at:7.1f} s  fault {happening.fault}", file=self._out, flush=True)
        if now >= self._printed_at + LINE_EVERY_S:
            self._printed_at = now
            print(f"{now - figures.began_at:7.1f} s  {_line(figures, checker)}", file=self._out, flush=True)


def _line(figures: Figures, checker: Checker) -> str:
    return (
        f"{checker.done}/{figures.requests} requests, {len(figures.happenings)}/{figures.planned} faults, {checker.open} open, "
        f"{checker.retries} retries, {checker.resends} sent again, worst recovery {figures.worst_s():.1f} s, "
        f"broken {len(checker.broken_so_far()) + len(figures.broken)}"
    )


def _table_of(figures: Figures, checker: Checker, world: World) -> Table:
    rows = Table(title=_line(figures, checker), title_justify="left", show_header=False, box=None, expand=True)
    at = time.monotonic() - figures.began_at
    rows.add_row("time", f"{at:.0f} s, life {len(world.logs())} of the worker")
    rows.add_row("ends", ", ".join(f"{code} {count}" for code, count in checker.ends.most_common()))
    for happening in figures.happenings[-8:]:
        how = "under way" if happening.mended_at is None else "mended"
        if happening.recovered_s is not None:
            how = f"recovered after {happening.recovered_s:.2f} s"
        rows.add_row("fault", str(happening.fault), how)
    for broken in (checker.broken_so_far() + figures.broken)[-5:]:
        rows.add_row("[red]broken", broken.promise, f"{broken.request_id} {broken.what[:120]}")
    return rows


def again(*, seed: int, options: argparse.Namespace) -> str:
    """The command that runs the same once more."""
    kinds = f" --kinds {options.kinds}" if options.kinds else ""
    window = f" --window {options.window}" if options.window != 3 else ""
    skip = f" --skip {options.skip}" if options.skip else ""
    without = f" --without {options.without}" if options.without else ""
    only = f" --only {options.only}" if options.only else ""
    pool = "--pool " if options.pool else ""
    made = f"{pool}--requests {options.requests} --faults {options.faults} --seed {seed}{kinds}{skip}{without}{window}"
    return f"python -m tests.faults {made}{only}"


def table(figures: Figures) -> str:
    """Plain lines, in Markdown."""
    counts = {
        promise: sum(b.promise == promise for b in figures.broken) for promise in ("lost", "twice", "torn", "hole")
    }
    others = len(figures.broken) - sum(counts.values())
    lines = [
        "",
        "| | |",
        "| --- | --- |",
        f"| requests | {figures.requests} |",
        f"| faults | {_faults(figures)} |",
        f"| time | {figures.took_s:.0f} s, {figures.lives} lives of the worker |",
        f"| recovery, median and worst | {figures.median_s():.2f} s, {figures.worst_s():.2f} s |",
        *(f"| {line} |" for line in figures.notes),
        *(f"| {promise} | {count} |" for promise, count in counts.items()),
        f"| other broken promises | {others} |",
        "",
        "| fault | times | recovery, median | worst |",
        "| --- | --- | --- | --- |",
    ]
    for kind, (times, median_s, worst_s) in figures.recovery_by_kind().items():
        lines.append(f"| {kind} | {times} | {_seconds(median_s)} | {_seconds(worst_s)} |")
    lines += [f"| {kind} | left out: {why} | | |" for kind, why in figures.left_out.items()]
    lines += ["", *(f"BROKEN {b.promise}: {b.request_id} {b.what}" for b in figures.broken[:40])]
    return "\n".join(lines)


def _faults(figures: Figures) -> str:
    made, asked = len(figures.happenings), figures.planned - figures.left_out_faults
    return str(made) if made == asked else f"{made} of {asked}: the requests ran out"


def write_docs(figures: Figures, command: str, name: str = "faults") -> None:
    write_between(name, f"Made by `{command}`.\n{table(figures).rstrip()}")


def write_between(name: str, text: str) -> None:
    """Put a text between its marks in the documentation."""
    begin, end = f"<!-- measured: {name} -->", f"<!-- end of {name} -->"
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    DOCS.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def _seconds(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.2f} s"
