"""Points -> SVG: line charts side by side, readable on light and dark pages, no plotting library."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 280  # of one panel, in px
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 44  # margins around the plotting area, in px
MOST_POINTS = 800  # about two points a pixel column

STYLE = """
  text { font: 11px system-ui, sans-serif; fill: #57606a }
  .title { font-size: 13px; font-weight: 600; fill: #1f2328 }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .line { fill: none; stroke: #0969da; stroke-width: 1.5; stroke-linejoin: round }
  .dot { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #9198a1 } .title { fill: #f0f6fc } .grid { stroke: #3d444d } .line { stroke: #58a6ff }
    .dot { fill: #58a6ff }
  }
"""


class Panel(NamedTuple):
    """One curve: (x, y) points in order of x, and the words around it."""

    title: str
    x_label: str
    points: Sequence[tuple[float, float]]


def line_chart(panels: Sequence[Panel]) -> str:
    """SVG text with `panels` side by side. Points that are not finite are left out."""
    parts = [_panel(panel, left=index * WIDTH) for index, panel in enumerate(panels)]
    width = WIDTH * max(1, len(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img">\n<style>{STYLE}</style>\n{"".join(parts)}</svg>\n'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` of `points`, evenly by index, the first and the last among them."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def si(value: float) -> str:
    """Short number for an axis: 1500000 -> 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _panel(panel: Panel, left: int) -> str:
    title = f'<text class="title" x="{left + LEFT}" y="18">{escape(panel.title)}</text>\n'
    points = [(x, y) for x, y in panel.points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return title + f'<text x="{left + LEFT}" y="{HEIGHT / 2}">no data</text>\n'
    points = thin(points)
    x_low, x_high = _span([x for x, _ in points])
    y_low, y_high = _span([y for _, y in points])

    def across(x: float) -> float:
        return left + LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [title]
    for tick in ticks(y_low, y_high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{left + LEFT}" x2="{left + WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>\n')
        parts.append(f'<text x="{left + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{si(tick)}</text>\n')
    for tick in ticks(x_low, x_high):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - 26}" text-anchor="middle">{si(tick)}</text>\n')
    middle = left + LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.x_label)}</text>\n')
    path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    parts.append(f'<polyline class="line" points="{path}"/>\n')
    x, y = points[-1]
    parts.append(f'<circle class="dot" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>\n')
    parts.append(f'<text x="{across(x):.1f}" y="{down(y) - 8:.1f}" text-anchor="end">{y:.4g}</text>\n')
    return "".join(parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, spread where they are (nearly) the same, so that a scale exists."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high), 1e-9)
    return (low, high) if high - low > 1e-9 * size else (low - size / 2, high + size / 2)
