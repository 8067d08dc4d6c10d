"""What a run says: lines on the console, records in runs/<run id>/metrics.jsonl, Weights & Biases when asked, and the
final figures. The tensors of a step are read late: reading at once would leave the device idle."""

import json
import math
import os
import pkgutil
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.files import atomic_write_text, read_jsonl
from nanochat.flags import NO_WANDB
from nanochat.hardware import device_name, memory_metrics, peak_flops, peak_memory_bytes, unlisted
from nanochat.paths import run_dir
from nanochat.runtime import get_dist_info, print0, synchronize
from nanochat.train.run import PROJECT, TrainingRun

WARMUP_STEPS = 5  # left out of tokens/s and MFU: they compile, tune kernels and fill the allocator
SMOOTHING = 0.9  # of the printed loss
MAX_SKIPPED = 5  # steps in a row: one loss that is not finite can be an accident, this many are not

# Metrics are named `Group/name`, or `Group/name/part` where one is taken of many parts.
GROUPS = ("Time", "Loss", "Optimization", "Model", "Hardware", "Activations", "Eval", "RL", "Stragglers")
TRAIN_LOSS = "Loss/train_loss"  # mean cross-entropy of the targets of a step, nats
GRAD_NORM = "Optimization/grad_norm"  # gradient norm before clipping: of all, /group: of a parameter group
LR_MULTIPLIER = "Optimization/lr_multiplier"  # learning rates over their full ones
SKIPPED = "Optimization/skipped_steps"  # so far, because loss or gradient were not finite
TRAINED = frozenset({TRAIN_LOSS, GRAD_NORM, SKIPPED})  # what each training step has one of
STEP_SECONDS = "Time/step_seconds"  # a step, evaluations and checkpoints left out, s
DATA_SECONDS = "Time/data_seconds"  # that this rank's host waited for the batches of a step, s
TOKENS_PER_SECOND = "Time/tokens_per_second"  # training tokens over all ranks, 1/s
MFU = "Hardware/mfu"  # FLOPs of the model over the dense bf16 peak of all devices


class StepResult(NamedTuple):
    """What a training step came to, not yet synced to the host."""

    loss: Tensor  # mean over all ranks, 0-D
    norm: Tensor  # of the gradient before clipping, 0-D; where it or the loss is not finite, the step changed nothing
    multiplier: float  # of the learning rates
    has_loss: bool  # whether any target counted; where none did, the loss of 0 is none
    snapshot: Callable[[], dict[str, float]] | None  # what the monitor saw, where it looked
    data_seconds: float = 0.0  # that the host waited for the batches


class Console:
    """Turns the results of training steps into log lines and metrics, about once a second."""

    def __init__(self, run: TrainingRun, device: torch.device) -> None:
        self.run, self.device = run, device
        self.world = get_dist_info().world_size
        self.flops_per_token = run.flops_per_token
        self.peak = peak_flops(device) if run.flops_per_token else None
        if self.peak is None and run.flops_per_token and device.type == "cuda":
            print0(f"no MFU: {unlisted('bf16 peak', [device_name(device)])}")
        self.tracker = Tracker(run.meta, run.settings.run, run.earlier, run.wandb_project)
        self.pending: list[tuple[int, StepResult, dict[str, float]]] = []
        self.seen = 0
        self.clock = time.perf_counter()
        self.skipped_in_a_row = 0
        self.diverged = False  # MAX_SKIPPED steps in a row have been skipped

    def step(self, result: StepResult) -> None:
        """Take note of a step; the first few, and then one a second, are read and printed at once."""
        self.pending.append((self.run.state.step, result, self.run.step_metrics()))
        if self.seen + len(self.pending) <= WARMUP_STEPS or time.perf_counter() - self.clock > 1.0:
            self.flush()

    def flush(self) -> None:
        """Read what has come up since the last time, record it, print the newest step."""
        if not self.pending:
            return
        synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.clock = now - self.clock, now
        state, count = self.run.state, len(self.pending)
        seconds = elapsed / count
        state.seconds += elapsed
        if self.seen >= WARMUP_STEPS:
            state.steady_steps += count
            state.steady_seconds += elapsed
        self.seen += count
        rate = self.run.tokens_per_step / seconds
        always = {STEP_SECONDS: seconds, TOKENS_PER_SECOND: rate, **memory_metrics(self.device)}
        if self.peak:
            always[MFU] = self._mfu(rate)
        read = torch.stack([torch.stack([result.loss, result.norm]) for _, result, _ in self.pending]).tolist()
        for (step, result, further), (loss, norm) in zip(self.pending, read, strict=True):
            if math.isfinite(loss) and math.isfinite(norm):
                self._record(step, result, loss, norm, {**always, **further})
            else:
                self._skipped(step, loss, norm)
        self.pending.clear()
        if self.skipped_in_a_row == 0:
            self._print(step, seconds, rate, further)

    def _record(self, step: int, result: StepResult, loss: float, norm: float, further: dict[str, float]) -> None:
        state = self.run.state
        self.skipped_in_a_row = 0
        metrics = {GRAD_NORM: norm, LR_MULTIPLIER: result.multiplier, DATA_SECONDS: result.data_seconds, **further}
        if result.has_loss:
            state.smoothed_loss = SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * loss
            metrics = {TRAIN_LOSS: loss, **metrics}
        else:
            state.without_loss += 1
            if state.without_loss == 1:
                print0(f"step {step:05d} has no target: nothing is learnt in such steps, and they have no loss")
        state.latest.update(metrics)
        if result.snapshot is not None:  # hundreds of metrics, which checkpoints need not keep
            metrics.update(result.snapshot())
        self.log(metrics, step)

    def _skipped(self, step: int, loss: float, norm: float) -> None:
        state = self.run.state
        state.skipped += 1
        self.skipped_in_a_row += 1
        self.diverged |= self.skipped_in_a_row >= MAX_SKIPPED
        self.log({SKIPPED: state.skipped}, step)
        if self.skipped_in_a_row <= MAX_SKIPPED:
            print0(f"step {step:05d} skipped, weights and optimizer unchanged: loss {loss}, gradient norm {norm}")

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record metrics, of the newest step unless another is given."""
        step = self.run.state.step if step is None else step
        if metrics:
            self.tracker.log(step, step * self.run.tokens_per_step, metrics)

    def restart(self) -> None:
        """Leave what has just been done (an evaluation, a checkpoint) out of the time of the next step."""
        if not self.pending:
            self.clock = time.perf_counter()

    def _mfu(self, tokens_per_second: float) -> float:
        assert self.peak is not None and self.flops_per_token is not None
        return self.flops_per_token * tokens_per_second / (self.peak * self.world)

    def _print(self, step: int, seconds: float, rate: float, further: dict[str, float]) -> None:
        state, total = self.run.state, self.run.num_iterations
        losses = step - state.skipped - state.without_loss
        smoothed = state.smoothed_loss / (1 - SMOOTHING**losses) if losses else math.nan
        pace = state.steady_seconds / state.steady_steps if state.steady_steps else seconds
        mfu = f" | mfu {100 * self._mfu(rate):.1f}%" if self.peak else ""
        also = "".join(f" | {name.split('/')[1]} {value:.4f}" for name, value in further.items())
        multiplier, norm = state.latest[LR_MULTIPLIER], state.latest[GRAD_NORM]
        print0(
            f"step {step:05d}/{total:05d} ({100 * step / total:.1f}%) | loss {smoothed:.4f}{also} | "
            f"lrm {multiplier:.2f} | norm {norm:.3f} | {1000 * seconds:,.1f} ms | {rate:,.0f} tok/s{mfu} | "
            f"epoch {self.run.loader.epoch():.2f} | "
            f"{state.seconds / 60:.1f} min, {pace * (total - step) / 60:.1f} left"
        )

    def summary(self) -> dict[str, Any]:
        """Final metrics. Tokens/s and MFU are means over the steady steps, whose number stands beside them."""
        state = self.run.state
        result: dict[str, Any] = {"device": device_name(self.device), "ranks": self.world, "steps": state.step}
        result["tokens"] = state.step * self.run.tokens_per_step
        final = {name: value for name, value in state.latest.items() if name.startswith(("Loss/", "Eval/"))}
        result.update({f"final {name.split('/')[1]}": value for name, value in final.items()})
        result.update({f"minimum {name.split('/')[1]}": value for name, value in state.best.items()})
        if state.skipped:
            result["steps skipped (not finite)"] = state.skipped
        if state.without_loss:
            result["steps without a target"] = state.without_loss
        result["training minutes"] = state.seconds / 60
        if self.flops_per_token:
            result["training FLOPs"] = self.flops_per_token * state.step * self.run.tokens_per_step
        result["peak memory GiB"] = peak_memory_bytes(self.device) / 2**30
        if state.steady_steps:
            rate = state.steady_steps * self.run.tokens_per_step / state.steady_seconds
            result["tokens per second"] = rate
            result["steps averaged"] = state.steady_steps
            if self.peak:
                result["mfu"] = self._mfu(rate)
                result["peak FLOP/s per device"] = self.peak
        return result


class Tracker:
    """Writes records `{"stage": …, "step": …, "tokens": …, metric: value}` to runs/<run id>/metrics.jsonl, and to W&B
    unless `name` is "dummy"; on rank 0. A step may have several records (training, then an evaluation)."""

    def __init__(
        self, meta: dict[str, Any], name: str, earlier: dict[str, Any] | None = None, project: str = PROJECT
    ) -> None:
        """earlier: meta of the checkpoint that the run goes on from: its W&B run goes on too."""
        self.stage = meta["stage"]
        self.active = get_dist_info().rank == 0
        self.failed = False  # a record could not be written
        self.wandb: Any = None
        self.wandb_id: str | None = None
        if not self.active:
            return
        earlier = earlier or {}
        self.path = run_dir() / "metrics.jsonl"
        self._drop_after(earlier.get("step"), earlier.get("loop", {}).get("evaluated_step"))
        self.file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open for the length of the run
        if name != NO_WANDB:
            connect = pkgutil.resolve_name("nanochat.train.tracking:connect")  # an annex, which takes 1 s to import
            self.wandb = connect(project, name, self.stage, meta, earlier.get("wandb_id"), [f"{g}/*" for g in GROUPS])
            self.wandb_id = self.wandb.id

    def _drop_after(self, step: int | None, evaluated: int | None) -> None:
        """A run that starts again, or resumes, repeats steps: its earlier records of them go (None: all of them). So do
        the evaluations of the step itself, which come after its checkpoint, unless it knows them (`evaluated`)."""

        def stays(record: dict[str, Any]) -> bool:
            if record.get("stage") != self.stage:
                return True
            known = not TRAINED.isdisjoint(record) or evaluated == step
            return step is not None and (record["step"] < step or (record["step"] == step and known))

        kept = [json.dumps(record) + "\n" for record in read_jsonl(self.path) if stays(record)]
        atomic_write_text(self.path, "".join(kept))

    def log(self, step: int, tokens: int, metrics: dict[str, Any]) -> None:
        """Record `metrics` at `step` (optimizer steps done) after `tokens` training tokens. Raises ValueError for names
        outside GROUPS."""
        check_names(metrics)
        if not self.active:
            return
        self._try(self.file.write, json.dumps({"stage": self.stage, "step": step, "tokens": tokens, **metrics}) + "\n")
        if self.wandb is not None:
            self.wandb.log({"step": step, "tokens": tokens, **metrics})

    def _try(self, write: Callable[..., object], *text: str) -> None:
        """A full disk is no reason to end a run; what was not written comes with the next record that can be."""
        try:
            write(*text)
        except OSError as error:
            if not self.failed:
                print0(f"warning: {self.path} takes no records ({error}): make room; training goes on")
            self.failed = True

    def close(self) -> None:
        if self.active:
            self._try(self.file.close)
            if self.wandb is not None:
                self.wandb.finish()


def check_names(names: Iterable[str]) -> None:
    """Raises ValueError, a developer's mistake, where a name is not `Group/name` with a group that is known."""
    for name in names:
        group, slash, rest = name.partition("/")
        if group not in GROUPS or not slash or not rest:
            raise ValueError(f"metric {name!r}: expected Group/name with a group of {', '.join(GROUPS)}")


def wandb_project(arch: str, mup: bool) -> str:
    """W&B project of a base run: WANDB_PROJECT, else what it is one of (several widths that are compared are given
    theirs by scripts/run_mup_width_group_scaling.sh)."""
    if named := os.environ.get("WANDB_PROJECT"):
        return named
    if arch != "speedrun":
        return PROJECT
    return "speedrun-mup" if mup else "speedrun-basic"


def wandb_name(run: str, arch: str, width: int, mup_base_width: int, now: datetime) -> str:
    """--run, or for auto speedrun_20250831_143022_mup_w1024_base768, speedrun_20250831_143022_sp_w768 without muP."""
    if run != "auto":
        return run
    kind = f"mup_w{width}_base{mup_base_width}" if mup_base_width else f"sp_w{width}"
    return f"{arch}_{now:%Y%m%d_%H%M%S}_{kind}"
