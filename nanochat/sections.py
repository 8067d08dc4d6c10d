"""What a stage leaves for the report: runs/<run id>/report/<stage>.json, and how numbers are written for people.

Stages import this and not the report.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.files import atomic_write_text, inside

STDERR_SUFFIXES = ("_stderr", " standard error")


def write_section(stage: str, title: str, data: Mapping[str, Any]) -> Path | None:
    """Leave `stage`'s section for the report as runs/<run id>/report/<stage>.json, and return that. Only rank 0 writes.

    `data` may hold settings and metrics (name -> value; the standard error of metric `x` is `x_stderr` or
    `x standard error`), tables ({title, columns, rows}), samples ({prompt, text}), facts (numbers and short strings
    for the sentences in report/notes/<stage>.md.j2), notes (sentences that the stage has printed too) and synthetic
    (True when the numbers come from generated data). The metrics val_bpb and train_bpb of base stages, and all metrics
    of evaluation stages, also go into the summary table.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    section = {"stage": stage, "title": title, "time": time.time(), **data}
    path = inside(sections_dir(paths.run_dir()), f"{stage}.json")
    atomic_write_text(path, json.dumps(plain(section), indent=1) + "\n")
    return path


def keeps_results(*folders: str) -> bool:
    """Whether what an evaluation finds can be written into these folders of the store and into the run's. Where it
    cannot, as in the store of somebody else, this says so before the work: it is printed all the same."""
    places = (paths.run_dir(), *(paths.get_base_dir() / folder for folder in folders))
    closed = next((place for place in places if not paths.is_writable(place)), None)
    if closed is not None and os.environ.get("RANK", "0") == "0":
        print(f"note: {closed} cannot be written: results are printed and not kept", flush=True)
    return closed is None


def sections_dir(run_dir: Path) -> Path:
    return run_dir / "report"


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tuples, paths and NumPy or torch scalars made plain, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


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
    if size >= 1e9 or size < 1e-3:
        return f"{value:.4g}"
    return f"{value:,.{4 if size < 1000 else 1 if size < 1e5 else 0}f}"


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
