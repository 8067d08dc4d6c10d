"""Points -> SVG: line charts, readable on light and dark pages, no plotting library.

`line_chart` draws one curve a panel; `render_lines` several, with a legend and logarithmic axes.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420, 280  # of one panel, in px
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 44  # margins around the plotting area, in px
MOST_POINTS = 800  # about two points a pixel column
MOST_DOTS = 32  # a curve of up to so many points shows each of them
LEGEND_LINE = 16  # height of a line of the legend, in px
MOST_OCTAVES = 9  # a logarithmic axis is ticked at powers of 2 up to here, at powers of 10 beyond

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

# (on a light page, on a dark page), told apart by most who are colour-blind; after the last, again and dashed
COLOURS = [("#0969da", "#58a6ff"), ("#bc4c00", "#ffa657"), ("#1a7f37", "#56d364"), ("#8250df", "#d2a8ff"),
           ("#9a6700", "#e3b341"), ("#1b7c83", "#39c5cf"), ("#cf222e", "#ff7b72"), ("#6e7781", "#9198a1")]  # fmt: skip
LINES_STYLE = (
    STYLE
    + "".join(f"  .c{i} {{ stroke: {light} }} .f{i} {{ fill: {light} }}\n" for i, (light, _) in enumerate(COLOURS))
    + "  @media (prefers-color-scheme: dark) {\n"
    + "".join(f"    .c{i} {{ stroke: {dark} }} .f{i} {{ fill: {dark} }}\n" for i, (_, dark) in enumerate(COLOURS))
    + "  }\n"
)


class Panel(NamedTuple):
    """One curve: (x, y) points in order of x, and the words around it."""

    title: str
    x_label: str
    points: Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One curve of several: (x, y) points in order of x. Series of one name are one colour, in all panels, and one
    entry of the legend; a series of a single point is a mark."""

    name: str
    points: Sequence[tuple[float, float]]


class LinePanel(NamedTuple):
    """Curves over one pair of axes, and the words around them. On a logarithmic axis only points above 0 are drawn."""

    title: str
    x_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    y_label: str = ""


def line_chart(panels: Sequence[Panel]) -> str:
    """SVG text with `panels` side by side. Points that are not finite are left out."""
    parts = [_panel(panel, left=index * WIDTH) for index, panel in enumerate(panels)]
    width = WIDTH * max(1, len(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img">\n<style>{STYLE}</style>\n{"".join(parts)}</svg>\n'
    )


def render_lines(panels: Sequence[LinePanel], columns: int = 3, share_y: bool = False) -> str:
    """SVG text with `panels` in rows of `columns`, a legend below each. Points that are not finite are left out.

    share_y: all panels have the same range of y, so that they can be compared by eye (their log_y must agree).
    """
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    colours = {name: index for index, name in enumerate(names)}
    drawn = [
        [Series(series.name, thin(_drawable(panel, series.points))) for series in panel.series] for panel in panels
    ]
    every_y = [y for curves in drawn for _, points in curves for _, y in points] if share_y else []
    height = HEIGHT + LEGEND_LINE * max((len(_legend_lines(panel.series)) for panel in panels), default=0)
    parts = []
    for index, (panel, curves) in enumerate(zip(panels, drawn, strict=True)):
        left, top = index % columns * WIDTH, index // columns * height
        parts.append(_lines_panel(panel._replace(series=curves), colours, every_y, left, top))
    width = WIDTH * max(1, min(columns, len(panels)))
    total = height * max(1, math.ceil(len(panels) / columns))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width}" height="{total}" '
        f'role="img">\n<style>{LINES_STYLE}</style>\n{"".join(parts)}</svg>\n'
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


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """(value, label) at powers of 2 within [low, high], or of 10 where those would be more than MOST_OCTAVES, at most
    about ten. Where not even two powers lie within: round numbers, as on a linear axis."""
    for base in (2, 10):
        first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
        if base == 2 and last - first >= MOST_OCTAVES:
            continue
        if last <= first:
            break
        powers = [float(base) ** power for power in range(first, last + 1, max(1, math.ceil((last - first) / 9)))]
        if base == 2:
            return [(value, _whole(value) if value >= 1 else f"1/{_whole(1 / value)}") for value in powers]
        return [(value, si(value) if 1e-4 < value < 1e15 else f"{value:.0e}") for value in powers]
    return [(value, si(value)) for value in ticks(low, high)]


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


def _whole(value: float) -> str:
    """A power of 2 as it is known: 2048, but 1.05M."""
    return f"{value:.0f}" if value < 1e5 else si(value)


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


def _lines_panel(panel: LinePanel, colours: dict[str, int], every_y: Sequence[float], left: int, top: int) -> str:
    """One panel; its points can be drawn (see _drawable). every_y: what the range of y must hold as well."""
    parts = [f'<text class="title" x="{left + LEFT}" y="{top + 18}">{escape(panel.title)}</text>\n']
    points = [point for series in panel.series for point in series.points]
    if not points:
        return parts[0] + f'<text x="{left + LEFT}" y="{top + HEIGHT / 2}">no data</text>\n'
    x_axis = _Axis([x for x, _ in points], panel.log_x, left + LEFT, left + WIDTH - RIGHT)
    y_axis = _Axis([*every_y, *(y for _, y in points)], panel.log_y, top + HEIGHT - BOTTOM, top + TOP)
    for value, label in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{left + LEFT}" x2="{left + WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>\n')
        parts.append(f'<text x="{left + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>\n')
    for value, label in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<text x="{x:.1f}" y="{top + HEIGHT - 26}" text-anchor="middle">{label}</text>\n')
    middle = left + (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{top + HEIGHT - 8}" text-anchor="middle">{escape(panel.x_label)}</text>\n')
    if panel.y_label:
        x, y = left + 11, top + (TOP + HEIGHT - BOTTOM) / 2
        turned = f'x="{x}" y="{y}" transform="rotate(-90 {x} {y})" text-anchor="middle"'
        parts.append(f"<text {turned}>{escape(panel.y_label)}</text>\n")
    for series in panel.series:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
        parts.append(_curve(places, colours[series.name]))
    for line, entries in enumerate(_legend_lines(panel.series)):
        for name, x in entries:
            y = top + HEIGHT + LEGEND_LINE * line + 4
            parts.append(_curve([(left + x, y), (left + x + 16, y)], colours[name], dots=False))
            parts.append(f'<text x="{left + x + 20}" y="{y + 4}">{escape(name)}</text>\n')
    return "".join(parts)


def _curve(places: Sequence[tuple[float, float]], colour: int, dots: bool = True) -> str:
    """A polyline in px with its points; a single point is a larger ring."""
    kind = colour % len(COLOURS)
    if len(places) == 1:
        ((x, y),) = places
        return f'<circle class="line c{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>\n'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashed = ' stroke-dasharray="5 3"' if colour >= len(COLOURS) else ""
    text = f'<polyline class="line c{kind}"{dashed} points="{path}"/>\n' if places else ""
    if dots and len(places) <= MOST_DOTS:
        text += "".join(f'<circle class="f{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>\n' for x, y in places)
    return text


def _legend_lines(series: Sequence[Series]) -> list[list[tuple[str, int]]]:
    """Lines of the legend: each of (name, its place in px from the left of the panel). A name of "" has no entry."""
    lines: list[list[tuple[str, int]]] = []
    x = WIDTH
    for name in dict.fromkeys(one.name for one in series if one.name):
        size = 34 + round(6.2 * len(name))  # a stroke, the name in letters of about 6 px, a gap
        if not lines or x + size > WIDTH:
            lines.append([])
            x = LEFT
        lines[-1].append((name, x))
        x += size
    return lines


def _drawable(panel: LinePanel, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that have a place on the axes of `panel`."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    # a factor of 2 beyond these must still be a number
    return [
        (x, y) for x, y in finite if (1e-300 < x < 1e300 or not panel.log_x) and (1e-300 < y < 1e300 or not panel.log_y)
    ]


class _Axis:
    """Values -> px, from `first` to `last`."""

    def __init__(self, values: Sequence[float], log: bool, first: float, last: float) -> None:
        self.log, self.first, self.last = log, first, last
        if log:
            self.low, self.high = math.log2(min(values)), math.log2(max(values))
            if self.high - self.low < 1e-9:
                self.low, self.high = self.low - 1, self.high + 1
        else:
            self.low, self.high = _span(values)

    def place(self, value: float) -> float:
        at = math.log2(value) if self.log else value
        return self.first + (at - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[tuple[float, str]]:
        if self.log:
            return log_ticks(2.0**self.low, 2.0**self.high)
        return [(value, si(value)) for value in ticks(self.low, self.high)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, spread where they are (nearly) the same, so that a scale exists."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high), 1e-9)
    return (low, high) if high - low > 1e-9 * size else (low - size / 2, high + size / 2)
