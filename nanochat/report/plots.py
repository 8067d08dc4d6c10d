"""The plots of a report, as SVG that follows the colours of the page it stands in; the same values always give the
same text."""

import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochat.files import read_jsonl
from nanochat.sections import STDERR_SUFFIXES

MOST_POINTS = 400  # of a curve
LONGEST_LABEL = 32  # characters
GREY = "#94a3b8"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#14b8a6", "#ec4899")  # on white and black
TEXT = "#123456"  # stands for the colour of the page's text
ON_A_PAGE_OF_ITS_OWN = (
    "<style>svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }</style>"
)
STYLE: Any = {
    "svg.hashsalt": "nanochat", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.titlesize": 10,
    "axes.titleweight": "bold", "lines.linewidth": 1.6, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": "#808080", "grid.alpha": 0.25, "legend.frameon": False, "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), TEXT),
}  # fmt: skip

LOSSES = {
    "Loss/train_loss": "Training loss (nats per token)",
    "Loss/val_bpb": "Validation bits per byte",
    "Loss/val_loss": "Validation loss (nats per token)",
}
STEPS = {
    "Optimization/lr_multiplier": "Learning rate (share of the full one)",
    "Optimization/grad_norm": "Gradient norm before clipping",
    "Time/tokens_per_second": "Tokens per second",
    "Hardware/mfu": "MFU (share of the bf16 peak)",
}

Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One line, or one colour of bars."""

    name: str
    """In the legend; empty: none."""
    points: tuple[tuple[Any, ...], ...]
    """(x, y) in order of x; of bars (label, value, standard error or 0)."""
    faint: bool = False
    """A line behind the others that the legend leaves out; grey bars."""


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x: str
    series: tuple[Series, ...]
    bars: bool = False
    log_x: bool = False


class Plot(NamedTuple):
    """A file of the Markdown report, and its panels one by one for the page."""

    file: str
    about: str
    svg: str
    panels: list[dict[str, str]]


def plots(run_dir: Path, report: Mapping[str, Any]) -> list[Plot]:
    """What there is to draw of a run. report: as nanochat.report.collect gives it."""
    records = read_jsonl(run_dir / "metrics.jsonl")
    base = Track(records, "base")
    sections = {section["stage"]: section for section in report["sections"]}
    axes = (("tokens", base.tokens), ("minutes of training", base.minutes))
    groups = {
        "report_loss.svg": (
            "Training loss and validation bits per byte of the base model",
            [_line(title, label, base.points(name, x)) for label, x in axes for name, title in LOSSES.items()],
        ),
        "report_training.svg": (
            "Learning rate, gradient norm and speed while the base model was trained",
            [_line(title, "tokens", base.points(name, base.tokens)) for name, title in STEPS.items()],
        ),
        "report_chat.svg": ("Training on conversations, and what it brought", _chat_panels(records, sections)),
        "report_core.svg": ("The base model on the tasks of CORE", _core_panel(sections)),
        "report_time.svg": ("Where the time and the tokenizer's vocabulary went", _bars_of_the_run(report, sections)),
    }
    found = []
    for file, (about, panels) in groups.items():
        if panels := [panel for panel in panels if panel and panel.series]:
            alone = [{"title": panel.title, "svg": inline(draw((panel,)))} for panel in panels]
            svg = draw(tuple(panels)).replace("<defs>", f"<defs>{ON_A_PAGE_OF_ITS_OWN}", 1)
            found.append(Plot(file, about, svg, alone))
    return found


class Track:
    """What one stage of training recorded, step by step."""

    def __init__(self, records: Iterable[Mapping[str, Any]], stage: str) -> None:
        self.records = [record for record in records if record.get("stage") == stage and _is_number(record, "tokens")]
        seconds, self._minutes = 0.0, dict[int, float]()
        for record in self.records:
            seconds += record["Time/step_seconds"] if _is_number(record, "Time/step_seconds") else 0.0
            if seconds:
                self._minutes[record["step"]] = seconds / 60

    def tokens(self, record: Mapping[str, Any]) -> float | None:
        return float(record["tokens"])

    def minutes(self, record: Mapping[str, Any]) -> float | None:
        """Of training steps alone, up to that record."""
        return self._minutes.get(record["step"])

    def points(self, name: str, x: Any) -> list[tuple[float, float]]:
        """(x(record), value) of every record that has the metric, and a place on the axis."""
        found = ((x(record), record[name]) for record in self.records if _is_number(record, name))
        return [(place, value) for place, value in found if place is not None]


def _is_number(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return isinstance(value, int | float) and abs(value) < 1e30  # NaN is not either


def smooth(points: Points) -> list[tuple[float, float]]:
    """The mean of a fortieth of the curve on either side of each point; less where it begins, for there it is steep,
    and what there is where it ends."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    found = []
    for place, (x, _) in enumerate(points):
        side = min(len(points) // 40, place)
        first, end = place - side, min(place + side + 1, len(points))
        found.append((x, (sums[end] - sums[first]) / (end - first)))
    return found


def thin(points: Points) -> tuple[tuple[float, float], ...]:
    """At most about MOST_POINTS of them, with the last."""
    stride = math.ceil(len(points) / MOST_POINTS)
    return (*points[:-1:stride], points[-1]) if points else ()


def line_series(name: str, points: Points, noisy: bool = True) -> tuple[Series, ...]:
    """A curve; a long noisy one as it is, faintly, and smoothed."""
    if not points:
        return ()
    if len(points) < 40 or not noisy:
        return (Series(name, thin(points)),)
    return Series(name, thin(points), faint=True), Series(name, thin(smooth(points)))


def _line(title: str, x: str, points: Points) -> Panel:
    return Panel(title, x, line_series("", points, noisy="rate" not in title))


def _chat_panels(records: Sequence[Mapping[str, Any]], sections: Mapping[str, Any]) -> list[Panel]:
    tracks = {stage: Track(records, stage) for stage in ("mid", "sft", "rl")}
    losses = [
        Series(stage, thin(smooth(points)))
        for stage in ("mid", "sft")
        if (points := tracks[stage].points("Loss/train_loss", tracks[stage].tokens))
    ]
    rewards = tracks["rl"].points("RL/reward", lambda record: float(record["step"]))
    scores = []
    for stage in tracks:
        metrics = sections.get(f"chat_eval_{stage}", {}).get("metrics", {})
        bars = [(name, metrics[name], stderr) for name, stderr in _errors(metrics).items() if _is_number(metrics, name)]
        if bars:
            scores.append(Series(stage, tuple(bars)))
    return [
        Panel("Share of right answers", "", tuple(scores), bars=True),
        Panel("Training loss (nats per token)", "tokens", tuple(losses)),
        Panel("Mean reward of an answer, RL", "step", line_series("", rewards)),
    ]


def _errors(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Names of metrics that have a standard error -> that."""
    found = {}
    for name, value in metrics.items():
        for suffix in STDERR_SUFFIXES:
            if name.endswith(suffix) and isinstance(value, int | float):
                found[name.removesuffix(suffix)] = float(value)
    return found


def _core_panel(sections: Mapping[str, Any]) -> list[Panel]:
    bars = [(name, value, error) for name, value, error in _columns(sections.get("base_eval"), "Accuracy")]
    guesses = [(name, value / 100, 0.0) for name, value, _ in _columns(sections.get("base_eval"), "Guessing %")]
    series = (Series("right answers", tuple(bars)), Series("by guessing", tuple(guesses), faint=True))
    return [Panel("Share of right answers", "", series if bars else (), bars=True)]


def _columns(section: Mapping[str, Any] | None, column: str) -> list[tuple[str, float, float]]:
    """(task, value of a column, standard error) of each row of a section's first table that has them."""
    found = []
    for table in (section or {}).get("tables", [])[:1]:
        for row in table["rows"]:
            cells = dict(zip(table["columns"], row, strict=True))
            if _is_number(cells, column):
                error = cells["Standard error"] if _is_number(cells, "Standard error") else 0.0
                found.append((str(cells.get("Task", "")), float(cells[column]), float(error)))
    return found


def _bars_of_the_run(report: Mapping[str, Any], sections: Mapping[str, Any]) -> list[Panel]:
    times = [(row["stage"], row["seconds"] / 60, 0.0) for row in report["stages"] if row["seconds"]]
    lengths = []
    for table in sections.get("tok_eval", {}).get("tables", []):
        if table["columns"][:2] == ["Bytes", "Tokens"]:
            cells = ((str(row[0]), str(row[1]).replace(",", "")) for row in table["rows"])
            lengths = [(label, float(count), 0.0) for label, count in cells if count.isdecimal()]
    return [
        Panel("Minutes in each stage", "", (Series("", tuple(times)),) if times else (), bars=True),
        Panel("Tokens by their length in bytes", "", (Series("", tuple(lengths)),) if lengths else (), bars=True),
    ]


# ---- drawing


@lru_cache(maxsize=64)
def draw(panels: tuple[Panel, ...], columns: int = 2) -> str:
    """SVG text of these panels, without a background."""
    columns = min(columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(map(_height, row)) for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * columns, sum(heights)), layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
        for row, places in zip(rows, axes, strict=True):
            for place, axis in enumerate(places):
                if place >= len(row):
                    axis.set_axis_off()
                elif row[place].bars:
                    _draw_bars(axis, row[place])
                else:
                    _draw_lines(axis, row[place])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(TEXT, "currentColor")
    text = re.sub(r"(font: [^']*)'[^;\"]*", r"\1system-ui, sans-serif", text)
    return text[text.index("<svg") :]


def inline(svg: str) -> str:
    """As part of a page, whose width it takes."""
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def shorten(text: str) -> str:
    """As a label: names come from elsewhere, and must leave room for what they name."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def _height(panel: Panel) -> float:
    """Inches."""
    return max(2.0, 0.8 + 0.2 * sum(len(series.points) for series in panel.series)) if panel.bars else 2.8


def _draw_lines(axis: Axes, panel: Panel) -> None:
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel(panel.x)
    axis.grid()
    if panel.log_x:
        axis.set_xscale("log")
    if panel.x == "step":
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for side, place in ((axis.xaxis, 0), (axis.yaxis, 1)):
        if max((abs(point[place]) for series in panel.series for point in series.points), default=0) >= 1000:
            side.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    names = list(dict.fromkeys(series.name for series in panel.series))
    for series in panel.series:
        colour = COLOURS[names.index(series.name) % len(COLOURS)]
        marker = "o" if len(series.points) <= 32 and not series.faint else ""
        x, y = zip(*series.points, strict=True)
        named = shorten(series.name) or "_"
        look: dict[str, Any] = {"alpha": 0.3, "linewidth": 0.8} if series.faint else {"label": named}
        axis.plot(x, y, color=colour, marker=marker, markersize=3.5, **look)
    if len(names) > 1:
        axis.legend()


def _draw_bars(axis: Axes, panel: Panel) -> None:
    """Bars from left to right, the first on top, each with its value; those of one label side by side."""
    axis.set_title(panel.title, loc="left")
    labels = list(dict.fromkeys(label for series in panel.series for label, *_ in series.points))
    height = 0.8 / len(panel.series)
    for place, series in enumerate(panel.series):
        at = [labels.index(label) - 0.4 + height * (place + 0.5) for label, *_ in series.points]
        values, errors = [point[1] for point in series.points], [point[2] for point in series.points]
        bars = axis.barh(
            at,
            values,
            height * 0.92,
            color=GREY if series.faint else COLOURS[place % len(COLOURS)],
            label=series.name or "_",
            xerr=errors if any(errors) else None,
            error_kw={"ecolor": TEXT, "elinewidth": 0.8},
        )
        whole = all(value == round(value) for value in values) and max(values, default=0) > 1
        texts = [f"{value:,.0f}" if whole else f"{value:,.2f}" for value in values]
        axis.bar_label(bars, texts, padding=3, fontsize=7)
    axis.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axis.invert_yaxis()
    axis.margins(x=0.15)
    if all(point[1] >= 0 for series in panel.series for point in series.points):
        axis.set_xlim(left=0)
    axis.tick_params(left=False)
    if len(panel.series) > 1:  # below: there is always a bar where it would stand
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.08), ncols=len(panel.series), borderaxespad=0)
