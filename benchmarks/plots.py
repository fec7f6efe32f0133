"""Plots as SVG, written by hand: points with their spread, and distributions as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 50, 60
COLOURS = {"direct": "#57606a", "bus": "#0969da", "target": "#bc4c00"}
DASHES = ("", "8 4", "2 4")


@dataclass(frozen=True, slots=True)
class Point:
    """A median with its quartiles; `label` stands below it."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """A named line through these points."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dash: str = ""


def point_plot(title: str, x_title: str, y_title: str, points: Sequence[Point], *, target: float | None = None) -> str:
    """Medians side by side, with whiskers from quartile to quartile and a line at the target."""
    lows, highs = [point.low for point in points], [point.high for point in points]
    known = [] if target is None else [target]
    axes = _Axes(0.0, float(len(points)), *_bounds(min(lows + known), max(highs + known)))
    parts = [axes.frame(title, x_title, y_title, x_ticks=False)]
    if target is not None:
        y = axes.y(target)
        parts.append(_stroke(_LEFT, y, _WIDTH - _RIGHT, y, COLOURS["target"], dash="8 4"))
        parts.append(_text(_WIDTH - _RIGHT - 4, y - 6, f"target {target:g}", anchor="end", fill=COLOURS["target"]))
    for number, point in enumerate(points):
        x = axes.x(number + 0.5)
        parts.append(_stroke(x, axes.y(point.low), x, axes.y(point.high), COLOURS["bus"], width=2))
        parts.append(f'<circle cx="{x:.1f}" cy="{axes.y(point.value):.1f}" r="5" fill="{COLOURS["bus"]}"/>')
        parts.append(_text(x + 10, axes.y(point.value) + 4, f"{point.value:.3f}"))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 18, point.label, anchor="middle"))
    return _document(title, parts)


def line_plot(title: str, x_title: str, y_title: str, lines: Sequence[Line]) -> str:
    """Lines on common axes, with a legend."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    axes = _Axes(*_bounds(min(0.0, *xs), max(xs)), *_bounds(min(0.0, *ys), max(ys)))
    parts = [axes.frame(title, x_title, y_title)]
    for number, line in enumerate(lines):
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
        y = _HEIGHT - _BOTTOM - 14 - 18 * (len(lines) - 1 - number)
        parts.append(_stroke(_WIDTH - 210, y - 4, _WIDTH - 180, y - 4, line.colour, dash=line.dash, width=2))
        parts.append(_text(_WIDTH - 172, y, line.name))
    return _document(title, parts)


def distribution(percentiles: Sequence[float], *, up_to: int = 99) -> list[tuple[float, float]]:
    """The points (value, percent of all below it) of the percentiles 0 to 100, without the last ones."""
    return [(value, float(percent)) for percent, value in enumerate(percentiles) if percent <= up_to]


class _Axes:
    """Values to places in the picture."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self._x_low, self._x_high, self._y_low, self._y_high = x_low, x_high, y_low, y_high

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x_low) / (self._x_high - self._x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._y_low) / (self._y_high - self._y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, title: str, x_title: str, y_title: str, *, x_ticks: bool = True) -> str:
        parts = [
            _text(_LEFT, 26, title, size=16),
            _text(_WIDTH / 2, _HEIGHT - 16, x_title, anchor="middle"),
            f'<text transform="translate(18 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>',
        ]
        for value in _ticks(self._y_low, self._y_high):
            y = self.y(value)
            parts += [
                _stroke(_LEFT, y, _WIDTH - _RIGHT, y, "#d0d7de"),
                _text(_LEFT - 8, y + 4, f"{value:g}", anchor="end"),
            ]
        for value in _ticks(self._x_low, self._x_high) if x_ticks else ():
            x = self.x(value)
            parts += [
                _stroke(x, _HEIGHT - _BOTTOM, x, _HEIGHT - _BOTTOM + 5, COLOURS["direct"]),
                _text(x, _HEIGHT - _BOTTOM + 18, f"{value:g}", anchor="middle"),
            ]
        bottom = _HEIGHT - _BOTTOM
        parts.append(_stroke(_LEFT, bottom, _WIDTH - _RIGHT, bottom, COLOURS["direct"]))
        return "\n".join(parts)


def _bounds(low: float, high: float) -> tuple[float, float]:
    """Round borders around these values."""
    step = _step(low, high)
    below, above = math.floor(low / step) * step, math.ceil(high / step) * step
    return (below, above) if above > below else (below - step, above + step)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten: four to ten of them between the borders."""
    rough = (high - low) / 5 or 1.0
    power = math.pow(10, math.floor(math.log10(rough)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str, *, dash: str = "", width: float = 1) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, fill: str = "#1f2328") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{escape(text)}</text>'
    )


def _document(title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12" '
        f'role="img" aria-label="{escape(title)}">'
    )
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>', *parts, "</svg>", ""])
