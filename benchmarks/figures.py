"""What was measured: figures with their spread and the target that they should meet, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number: the median of `n` values, `low` and `high` their quartiles.

    `target` is `<= 1.2` or `>= 0.97`, empty where there is none.
    """

    case: str
    name: str
    value: float
    unit: str = ""
    n: int = 1
    low: float | None = None
    high: float | None = None
    target: str = ""

    @property
    def text(self) -> str:
        """The value with its quartiles."""
        spread = f" ({shown(self.low)} - {shown(self.high)})" if self.n > 1 and self.low is not None else ""
        return shown(self.value) + spread

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if not self.target:
            return None
        sign, _, limit = self.target.partition(" ")
        return self.value <= float(limit) if sign == "<=" else self.value >= float(limit)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def median_of(case: str, name: str, values: Sequence[float], *, unit: str = "", target: str = "") -> Figure:
    """The median of these values with their quartiles."""
    low, high = quartiles(values)
    return Figure(
        case=case,
        name=name,
        value=statistics.median(values),
        unit=unit,
        n=len(values),
        low=low,
        high=high,
        target=target,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of the values lies (the nearest one that occurs)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def shown(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    size = abs(value)
    return (
        f"{value:.0f}"
        if size >= 100
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.3f}"
        if size < 2
        else f"{value:.2f}"
    )


HEAD: tuple[str, ...] = ("case", "what", "median", "unit", "quartiles", "n", "target", "verdict")


def rows(figures: Iterable[Figure], older: Mapping[tuple[str, str], float] | None = None) -> list[tuple[str, ...]]:
    """The table with its head; with `older` values (by case and name) a column with their ratio, older through new."""
    table: list[tuple[str, ...]] = [(*HEAD, "old/new") if older is not None else HEAD]
    for figure in figures:
        spread = f"{shown(figure.low)} - {shown(figure.high)}" if figure.n > 1 and figure.low is not None else ""
        met = {True: "ok", False: "missed", None: ""}[figure.met]
        row: tuple[str, ...] = (
            figure.case,
            figure.name,
            shown(figure.value),
            figure.unit,
            spread,
            str(figure.n),
            figure.target,
            met,
        )
        if older is not None:
            before = older.get((figure.case, figure.name))
            row = (*row, f"{before / figure.value:.2f}" if before is not None and figure.value else "")
        table.append(row)
    return table


def aligned(table: Sequence[Sequence[str]]) -> str:
    """The table as columns for a terminal."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)
    return "\n".join(lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
