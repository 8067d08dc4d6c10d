"""Numbers, times and text as the report and the console show them."""

import math
from collections.abc import Mapping
from typing import Any

STDERR_SUFFIXES = ("_stderr", " standard error")


def label(name: str) -> str:
    """A metric's name for people: val_bpb -> val bpb."""
    return name.replace("_", " ")


def number(value: Any) -> str:
    """A value for people: thousands separators, four decimals, exponents for the very large and very small."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.4e}"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if size >= 1e12 or size < 1e-3:
        return f"{value:.4g}"
    return f"{value:,.4f}" if size < 1000 else f"{value:,.1f}"


def metric_text(metrics: Mapping[str, Any], name: str) -> str:
    """A metric with its standard error, where the section gives one: `0.9812 ± 0.0021`."""
    for suffix in STDERR_SUFFIXES:
        if isinstance(metrics.get(name + suffix), int | float):
            return f"{number(metrics[name])} ± {number(metrics[name + suffix])}"
    return number(metrics[name])


def duration(seconds: float | None) -> str:
    """Seconds for people: `9.3 s`, `2 min 5 s`, `3 h 7 min`."""
    if seconds is None:
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table."""
    return number(value).replace("|", "\\|").replace("\n", " ")


def fence(text: str) -> str:
    """`text` as a Markdown code block that nothing inside can close."""
    marks = "```"
    while marks in text:
        marks += "`"
    return f"{marks}text\n{text}\n{marks}"
