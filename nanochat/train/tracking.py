"""Metrics of a training run: JSONL always, the console, and Weights & Biases when asked.

Names come in groups (nanochat.train.metrics), of each of which W&B makes a panel.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from nanochat.files import atomic_write
from nanochat.paths import run_dir
from nanochat.runtime import get_dist_info
from nanochat.train.run_log import RunLog

NO_WANDB = "dummy"
AUTO = "auto"  # as a name: one is made of what the run is
PROJECT = "nanochat"


# Metrics are named `Group/name`, or `Group/name/part` where one is taken of many parts.
GROUPS = {
    "Time": "How long things take, and tokens per second.",
    "Loss": "Losses, of training and held out; smaller is better.",
    "Optimization": "Learning rates, and norms of gradients.",
    "Model": "Norms of weights and of their updates.",
    "Hardware": "Memory, and how much of the arithmetic is used.",
    "Activations": "What layers put out.",
    "Eval": "Tasks that are solved or not.",
    "RL": "Rewards and what is sampled.",
    "Stragglers": "Slowest rank against the median.",
}


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError, a developer's mistake, where a name is not `Group/name` with a group that is known."""
    for name in names:
        group, slash, rest = name.partition("/")
        if group not in GROUPS or not slash or not rest:
            raise ValueError(f"metric {name!r}: expected Group/name with a group of {', '.join(GROUPS)}")


def wandb_project(arch: str, mup: bool) -> str:
    """W&B project of a run: WANDB_PROJECT, else what it is one of (several widths that are compared are given theirs by
    scripts/run_mup_width_group_scaling.sh)."""
    if named := os.environ.get("WANDB_PROJECT"):
        return named
    if arch != "speedrun":
        return PROJECT
    return "speedrun-mup" if mup else "speedrun-basic"


class Tracker:
    """Writes records `{"stage": …, "step": …, "tokens": …, metric: value}` to runs/<run id>/metrics.jsonl, on rank 0.

    A record may come in several parts (training metrics, then an evaluation at the same step). resume_step, wandb_id:
    of the checkpoint that is resumed from; the same W&B run goes on. project: of W&B. log: gets every record too, and
    is closed with the tracker.
    """

    def __init__(
        self,
        stage: str,
        run: str,
        settings: dict[str, Any],
        resume_step: int | None = None,
        wandb_id: str | None = None,
        project: str = PROJECT,
        log: RunLog | None = None,
    ) -> None:
        self.stage, self.run_log = stage, log
        self.active = get_dist_info().rank == 0
        self.wandb: Any = None
        self.wandb_id: str | None = None
        if not self.active:
            return
        self.path = run_dir() / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_after(resume_step)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the length of the run
        if run != NO_WANDB:
            import wandb  # 0.7 s to import: only for those who use it

            # a resumed run goes on in the same W&B run, whose id its checkpoint knows
            self.wandb = wandb.init(
                project=project,
                name=run,
                group=stage,
                config=settings,
                id=wandb_id,
                resume="allow" if wandb_id else None,
            )
            self.wandb_id = self.wandb.id
            for group in GROUPS:
                self.wandb.define_metric(f"{group}/*", step_metric="step")

    def _drop_after(self, step: int | None) -> None:
        """A run that starts again, or resumes, repeats steps: its earlier records of them go (None: all of them). So do
        the evaluations of the step itself, which come after its checkpoint."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            trained = "Loss/train_loss" in record
            stays = step is not None and (record["step"] < step or (record["step"] == step and trained))
            if record.get("stage") != self.stage or stays:
                kept.append(line + "\n")
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(kept))

    def log(self, step: int, tokens: int, metrics: dict[str, Any]) -> None:
        """Record `metrics` at `step` (optimizer steps done) after `tokens` training tokens. Raises ValueError for names
        outside GROUPS."""
        check_names(metrics)
        if not self.active:
            return
        self.file.write(json.dumps({"stage": self.stage, "step": step, "tokens": tokens, **metrics}) + "\n")
        if self.wandb is not None:
            self.wandb.log({"step": step, "tokens": tokens, **metrics})
        if self.run_log is not None:
            self.run_log.step(step, tokens, metrics)

    def close(self) -> None:
        if self.run_log is not None:
            self.run_log.close()
        if self.active:
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()
