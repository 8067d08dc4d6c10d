"""Curves as SVG, in panels side by side; the same points always give the same file."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Curve = tuple[str, Sequence[tuple[float, float]]]
"""(name, points (x, y) in order of x)."""

STYLE: Any = {"svg.hashsalt": "nanochat", "svg.fonttype": "none", "font.size": 9, "lines.markersize": 4}


def line_panels(
    panels: Mapping[str, Sequence[Curve]], x_label: str, y_label: str, columns: int = 2, log_axes: str = ""
) -> str:
    """SVG text: one panel a title, all with the same range of y. log_axes: "", "x", "y" or "xy", drawn in base 2.

    Curves of one name have one colour and one entry in the legend; a curve of a single point is a ring. Points without
    a place on the axes (not finite, or not above 0 where the axis is logarithmic) are left out.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name, _ in curves))
    rows = max(1, math.ceil(len(panels) / columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
        handles: dict[str, Line2D] = {}
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            axis.set(title=title, xlabel=x_label, ylabel=y_label)
            axis.grid(alpha=0.3)
            for side in log_axes:
                getattr(axis, f"set_{side}scale")("log", base=2, nonpositive="mask")
                getattr(axis, f"{side}axis").set_major_formatter("{x:g}")
            for name, points in curves:
                x, y = [x for x, _ in points], [y for _, y in points]
                (line,) = axis.plot(x, y, **_style(names.index(name), ring=len(points) == 1))
                handles.setdefault(name, line)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4 * columns, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _style(index: int, ring: bool) -> dict[str, Any]:
    """Of curve number `index`: ten colours, then the same dashed."""
    style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "marker": "."}
    return style | ({"marker": "o", "markersize": 8, "fillstyle": "none"} if ring else {})
