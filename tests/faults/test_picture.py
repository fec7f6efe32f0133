"""What a run of the rig shows in the end: its table, how to run it again, and what it writes into the documentation."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.faults import picture
from tests.faults.picture import again, table, write_docs
from tests.faults.run import Figures, Happening
from tests.faults.schedule import make

OPTIONS = {"requests": 200, "faults": 8, "kinds": "", "skip": "", "without": "", "window": 3, "only": "", "pool": False}


def _figures(*, planned: int, made: int, left_out: int = 0) -> Figures:
    faults = make(seed=1, requests=200, faults=made, kinds=["net.cut", "flood"])
    happenings = [Happening(fault, 1.0, mended_at=2.0, recovered_s=0.5) for fault in faults]
    figures = Figures(200, planned, 0.0, happenings, left_out_faults=left_out)
    figures.notes = ["histories compared | 4"]
    return figures


def test_a_run_tells_how_to_run_it_again() -> None:
    plain = again(seed=7, options=argparse.Namespace(**OPTIONS))
    assert plain == "python -m tests.faults --requests 200 --faults 8 --seed 7"
    special = OPTIONS | {"kinds": "net.", "skip": "net.cut", "without": "bare", "window": 5, "only": "3,17"}
    assert again(seed=7, options=argparse.Namespace(**special)) == (
        f"{plain} --kinds net. --skip net.cut --without bare --window 5 --only 3,17"
    )


@pytest.mark.parametrize(
    "figures, told",
    [
        (_figures(planned=8, made=8), "| faults | 8 |"),
        (_figures(planned=8, made=6), "| faults | 6 of 8: the requests ran out |"),
        (_figures(planned=8, made=6, left_out=2), "| faults | 6 |"),
    ],
)
def test_faults_that_did_not_happen_are_told(figures: Figures, told: str) -> None:
    assert told in table(figures).splitlines()


def test_the_table_replaces_the_one_in_the_documentation_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "reliability.md"
    page.write_text(
        "before\n<!-- measured: faults -->\n\nold\n\n<!-- end of faults -->\nafter\n<!-- measured: soak -->\n"
    )
    monkeypatch.setattr(picture, "DOCS", page)
    for _ in range(2):
        write_docs(_figures(planned=8, made=8), "the command")
    text = page.read_text()
    assert text.startswith("before\n<!-- measured: faults -->\n\nMade by `the command`.\n\n| | |\n")
    assert text.endswith(
        "| flood | 4 | 0.50 s | 0.50 s |\n| net.cut | 4 | 0.50 s | 0.50 s |\n\n<!-- end of faults -->\nafter\n<!-- measured: soak -->\n"
    )
    assert "old" not in text
