"""docs/performance.md: what was measured goes between its two marks, with the plots beside it; all else is kept as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.figures import Figure, markdown, rows
from benchmarks.plots import COLOURS, DASHES, Line, Point, distribution, line_plot, point_plot

BEGIN = "<!-- measured: from here to the next mark `make bench BENCH_ARGS=--write-docs` writes -->"
END = "<!-- measured: end -->"
_STREAMS = (1, 2, 4, 8)
_PACES = (20, 50, 200)


class PageWithoutMarks(RuntimeError):
    """The page lacks the marks between which the figures belong."""


def write(
    page: Path,
    *,
    described: Mapping[str, Mapping[str, str]],
    titles: Mapping[str, str],
    figures: Sequence[Figure],
    curves: Mapping[str, Sequence[float]],
) -> list[Path]:
    """Put machine, tables and plots into the page; the files that were written."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PageWithoutMarks(f"{page} has not one line {BEGIN!r} with one line {END!r} after it")
    drawn = {name: plot for name, plot in _plots(figures, curves).items() if plot}
    for name, (_, svg) in drawn.items():
        (page.parent / f"performance-{name}.svg").write_text(svg, "utf-8")
    body = "\n\n".join(_sections(described, titles, figures, {name: title for name, (title, _) in drawn.items()}))
    page.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{body}\n\n{text[text.index(END) :]}", "utf-8")
    return [page, *(page.parent / f"performance-{name}.svg" for name in drawn)]


def _sections(
    described: Mapping[str, Mapping[str, str]],
    titles: Mapping[str, str],
    figures: Sequence[Figure],
    plots: Mapping[str, str],
) -> Iterator[str]:
    yield "### The machine\n\n" + markdown(
        [("", ""), *((name, value) for part in described.values() for name, value in part.items())]
    )
    for letter, title in titles.items():
        mine = [figure for figure in figures if figure.case == letter]
        if not mine:
            continue
        # The column of the case says nothing here.
        yield f"### {title[0].upper()}{title[1:]}\n\n" + markdown([row[1:] for row in rows(mine)])
        for name, told in plots.items():
            if _CASES[name] == letter:
                yield f"![{told}](performance-{name}.svg)"


_CASES = {"throughput": "a", "first-token": "b", "pace": "i"}


def _plots(figures: Sequence[Figure], curves: Mapping[str, Sequence[float]]) -> dict[str, tuple[str, str] | None]:
    """By name: title and SVG; None where it was not measured."""
    by_name = {figure.name: figure for figure in figures if figure.case == "a"}
    points = [
        Point(str(streams), figure.value, figure.low or figure.value, figure.high or figure.value)
        for streams in _STREAMS
        if (figure := by_name.get(f"tokens/s, bus / direct, {streams} stream{'s' * (streams > 1)}"))
    ]
    ratio = "Tokens per second over the bus, as a share of direct"
    first = "Time to the first token: 1 stream, and 8 streams (dashed)"
    late = "How late a token comes: 20, 50 (dashed) and 200 (dotted) tokens/s in each of 8 streams"
    of_first = [
        _line(curves[f"b {way} {streams}"], f"{way}, {streams}", way, dash)
        for way in ("direct", "bus")
        for streams, dash in zip((1, 8), DASHES, strict=False)
        if f"b {way} {streams}" in curves
    ]
    of_pace = [
        _line(curves[f"i {way} {pace}"], f"{way}, {pace} tokens/s", way, dash)
        for way in ("direct", "bus")
        for pace, dash in zip(_PACES, DASHES, strict=True)
        if f"i {way} {pace}" in curves
    ]
    percent = "percent of all, up to 99"
    return {
        "throughput": (ratio, point_plot(ratio, "streams at once", "bus / direct", points, target=0.97))
        if points
        else None,
        "first-token": (first, line_plot(first, "ms since the request", percent, of_first)) if of_first else None,
        "pace": (late, line_plot(late, "ms after its time", percent, of_pace)) if of_pace else None,
    }


def _line(percentiles: Sequence[float], name: str, way: str, dash: str) -> Line:
    return Line(name, distribution(percentiles), COLOURS[way], dash)
