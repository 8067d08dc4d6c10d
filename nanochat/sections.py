"""What a stage leaves for the report: runs/<run id>/report/<stage>.json. Stages import this and not the report."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat import paths
from nanochat.files import atomic_write_text


def write_section(stage: str, title: str, data: Mapping[str, Any]) -> None:
    """Leave `stage`'s section for the report, as runs/<run id>/report/<stage>.json. Only rank 0 writes.

    `data` may hold settings and metrics (name -> value; the standard error of metric `x` is `x_stderr` or
    `x standard error`), tables ({title, columns, rows}), samples ({prompt, text}), notes (sentences) and synthetic
    (True when the numbers come from generated data). The metrics val_bpb and train_bpb of base stages, and all metrics
    of evaluation stages, also go into the summary table.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    section = {"stage": stage, "title": title, "time": time.time(), **data}
    atomic_write_text(sections_dir(paths.run_dir()) / f"{stage}.json", json.dumps(plain(section), indent=1) + "\n")


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
