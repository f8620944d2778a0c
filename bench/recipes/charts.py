"""Line charts without a plotting library: as text for a terminal, and as an SVG picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise

MARKS = "*o+x#@%&"  # of the lines of a text chart, in order
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#e29578", "#7768ae", "#6c757d", "#b08900", "#00798c")
WIDTH, HEIGHT = 760, 280  # of a panel of the picture, in pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 36, 44  # around its lines


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    lines   name -> (y of each x); all as long as xs
    low     the least of the y axis; None: the least y
    high    the largest likewise
    """

    title: str
    x_label: str
    xs: list[float]
    lines: dict[str, list[float]]
    low: float | None = None
    high: float | None = None

    def __post_init__(self):
        if not self.xs or not self.lines:
            raise ValueError(f"chart {self.title!r} has no points")
        for name, ys in self.lines.items():
            if len(ys) != len(self.xs):
                raise ValueError(
                    f"chart {self.title!r}: line {name!r} has {len(ys)} points, need {len(self.xs)}"
                )
            if not all(map(math.isfinite, ys)):
                raise ValueError(f"chart {self.title!r}: line {name!r} is not finite")

    def bounds(self) -> tuple[float, float, float, float]:
        """The least and largest x, then y; never equal."""
        ys = [y for line in self.lines.values() for y in line]
        low = min(ys) if self.low is None else self.low
        high = max(ys) if self.high is None else self.high
        left, right = min(self.xs), max(self.xs)
        return left, right if right > left else left + 1, low, high if high > low else low + 1


def as_text(chart: Chart, width: int = 72, height: int = 14) -> str:
    """`width` characters and `height` lines of points and what is between them, and a legend."""
    left, right, low, high = chart.bounds()
    cells = [[" "] * width for _ in range(height)]

    def column(x: float) -> int:
        return round((x - left) / (right - left) * (width - 1))

    def row(y: float) -> int:
        share = min(max((y - low) / (high - low), 0.0), 1.0)
        return round((1 - share) * (height - 1))

    for mark, ys in zip(_marks(chart), chart.lines.values(), strict=True):
        for (x0, y0), (x1, y1) in pairwise(zip(chart.xs, ys, strict=True)):
            for at in range(column(x0), column(x1)):
                share = (at - column(x0)) / (column(x1) - column(x0))
                cells[row(y0 + share * (y1 - y0))][at] = "."
        for x, y in zip(chart.xs, ys, strict=True):
            cells[row(y)][column(x)] = mark
    labels = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    margin = max(map(len, labels.values()))
    body = [f"{labels.get(n, ''):>{margin}} |{''.join(r).rstrip()}" for n, r in enumerate(cells)]
    ends = f"{left:g}", f"{chart.x_label} {right:g}"
    axis = f"{'':>{margin}} +{'-' * width}"
    below = f"{'':>{margin}}  {ends[0]}{ends[1]:>{width - len(ends[0])}}"
    legend = "   ".join(f"{m} {name}" for m, name in zip(_marks(chart), chart.lines, strict=True))
    return "\n".join([chart.title, *body, axis, below, f"{'':>{margin}}  {legend}"])


def _marks(chart: Chart) -> list[str]:
    return [MARKS[n % len(MARKS)] for n in range(len(chart.lines))]


def as_svg(charts: list[Chart]) -> str:
    """The charts one below the other."""
    panels = [
        f'<g transform="translate(0,{n * HEIGHT})">\n{_panel(chart)}\n</g>'
        for n, chart in enumerate(charts)
    ]
    size = f'width="{WIDTH}" height="{HEIGHT * len(charts)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *panels, "</svg>\n"])


def _panel(chart: Chart) -> str:
    left, right, low, high = chart.bounds()
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_of(x: float) -> float:
        return LEFT + (x - left) / (right - left) * inner_width

    def y_of(y: float) -> float:
        return TOP + (1 - min(max((y - low) / (high - low), 0.0), 1.0)) * inner_height

    parts = [_words(LEFT, TOP - 14, chart.title, "start", 14)]
    for y in _ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + inner_width}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}" '
            'stroke="#dddddd"/>'
        )
        parts.append(_words(LEFT - 8, y_of(y) + 4, f"{y:g}", "end"))
    for x in _ticks(left, right):
        parts.append(_words(x_of(x), TOP + inner_height + 18, f"{x:g}", "middle"))
    parts.append(_words(LEFT + inner_width / 2, HEIGHT - 8, chart.x_label, "middle"))
    for n, (name, ys) in enumerate(chart.lines.items()):
        colour, at = COLOURS[n % len(COLOURS)], TOP + 8 + 18 * n
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(chart.xs, ys, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        edge = LEFT + inner_width + 14
        parts.append(f'<rect x="{edge}" y="{at - 5}" width="14" height="4" fill="{colour}"/>')
        parts.append(_words(edge + 20, at, name, "start"))
    return "\n".join(parts)


def _words(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {where}>{escape(text)}</text>"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to nine of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = max(f * power for f in (1, 2, 5) if f * power <= (high - low) / 4)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]
