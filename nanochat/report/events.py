"""metrics.jsonl as event files of TensorBoard: scalars over steps, a series a stage, settings as text.

Needs an optional package: `uv pip install tensorboard==2.21.0`.
"""

import math
from pathlib import Path
from typing import Any

from nanochat import ledger, report
from nanochat.errors import UserError
from nanochat.files import read_jsonl
from nanochat.sections import number

NOT_METRICS = frozenset({"stage", "step", "tokens"})


def export(run_dir: Path) -> Path:
    """Write runs/<run>/tensorboard anew, and return it. Raises UserError without the package, or without metrics."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"TensorBoard cannot be imported ({error}): `uv pip install tensorboard==2.21.0` into this environment"
        ) from None
    records = read_jsonl(run_dir / "metrics.jsonl")
    if not records:
        raise UserError(f"{run_dir / 'metrics.jsonl'} has no records: train first, or name another run")
    folder = run_dir / "tensorboard"
    for old in folder.glob("*/events.out.tfevents.*"):
        old.unlink()  # a second series beside the same one would be drawn over it
    for stage in dict.fromkeys(str(record.get("stage")) for record in records):
        writer = SummaryWriter(str(folder / stage))
        times = Clock(run_dir, stage)
        for record in (record for record in records if record.get("stage") == stage):
            now = times.after(record)
            for name, value in record.items():
                if name not in NOT_METRICS and isinstance(value, int | float):
                    writer.add_scalar(name, value, record["step"], walltime=now)
        if text := _settings(run_dir, stage):
            writer.add_text("settings", text)
        writer.close()
    return folder


class Clock:
    """When a record was made, as far as it is known: the start of its stage and the steps since then, so that
    TensorBoard's axes of time are those of training."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        started = [
            record["time"]
            for record in ledger.read(run_dir)
            if record["status"] == "started" and record["stage"].removesuffix("_train").removeprefix("chat_") == stage
        ]
        self.now = float(started[-1]) if started else 0.0

    def after(self, record: dict[str, Any]) -> float:
        seconds = record.get("Time/step_seconds", 0.0)
        self.now += seconds if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0
        return self.now


def _settings(run_dir: Path, stage: str) -> str:
    """Those of the report's section of this stage, as a table of Markdown."""
    names = {f"{stage}_train", f"chat_{stage}"}
    for section in report.read_sections(run_dir):
        if section["stage"] in names:
            rows = [f"|{name}|{number(value)}|" for name, value in section["settings"].items()]
            return "\n".join(["|setting|value|", "|---|---|", *rows])
    return ""
