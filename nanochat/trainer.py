"""THE training loop: base, mid and sft share it.

A script builds the parts (model, optimizer, loader, schedule, evaluations), puts them into a TrainingRun and calls
`train`. What happens at each step boundary, in this order: evaluations that are due, checkpoint, stop if asked, step.
How the model is spread over ranks is run.policy's business (nanochat.parallel), and makes no difference here.
"""

import gc
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import checkpoint, parallel, preflight
from nanochat.collector import scheduled
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.loss import IGNORED
from nanochat.optim import MuonAdamW
from nanochat.paths import get_base_dir
from nanochat.runtime import (
    BROKEN,
    STOP,
    StopSignal,
    get_dist_info,
    peak_flops,
    peak_memory_bytes,
    print0,
    ranks_per_node,
    synchronize,
)
from nanochat.schedule import set_schedule
from nanochat.stragglers import StragglerReport
from nanochat.tracking import Tracker
from nanochat.watchdog import Watchdog, lower_timeout

if TYPE_CHECKING:
    from nanochat.saver import Saver

WARMUP_STEPS = 5  # left out of tokens/s and MFU: they compile, tune kernels and fill the allocator
SMOOTHING = 0.9  # of the printed loss


class Loader(Protocol):
    """Where the trainer gets its micro-batches from (nanochat.dataloader.TrainLoader, for one).

    A batch is (inputs, targets), each (B, T) int64, or (inputs, targets, weights) with the factors of the losses.
    """

    batches_per_step: int
    """Micro-batches of one optimizer step; the same number on every rank."""
    device_batch_size: int
    """Rows of each: at most what was asked for."""

    def next_batch(self) -> tuple[Tensor, ...]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def epoch(self) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    """Something measured every so many steps."""

    every: int
    """Steps between two measurements; 0 or less: never, except as `at_end` says."""
    at_end: bool
    """Also after the last step."""
    run: Callable[[int], dict[str, float]]
    """step -> metrics, named `Group/name`. Called on every rank, in evaluation mode, without gradients."""

    def due(self, step: int, last: bool) -> bool:
        return (self.every > 0 and step % self.every == 0 and step > 0) or (last and self.at_end)


@dataclass
class LoopState:
    """Counters of the loop; stored with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    smoothed_loss: float = 0.0
    """Exponential moving average of the training loss, before bias correction."""
    seconds: float = 0.0
    """Time spent in training steps, evaluations left out."""
    steady_steps: int = 0
    """Steps behind tokens/s and MFU: all but the first few of each start."""
    steady_seconds: float = 0.0
    """Time those took."""
    evaluated_step: int = -1
    """Last step whose evaluations have been made."""
    best: dict[str, float] = field(default_factory=dict)
    """Smallest value of each Loss/ metric of the evaluations."""
    latest: dict[str, float] = field(default_factory=dict)
    """Newest value of each metric."""


@dataclass
class TrainingRun:
    """Everything `train` needs."""

    stage: str
    """base, mid or sft."""
    folder: Path
    """Where checkpoints go."""
    model: GPT
    """The model itself."""
    forward: Callable[..., Tensor]
    """The model as it is trained: compiled, or the model itself. Called as forward(x, y, loss_reduction="sum")."""
    optimizer: MuonAdamW
    loader: Loader
    num_iterations: int
    """Optimizer steps of the whole run."""
    tokens_per_step: int
    """Tokens in one global batch."""
    schedule: Callable[[int], tuple[float, float]]
    """step -> (learning-rate multiplier, Muon momentum)."""
    grad_clip: float
    """Largest global gradient norm; 0 = no clipping."""
    save_every: int
    """Steps between checkpoints; 0 or less: only the last."""
    evaluations: list[Evaluation]
    tracker: Tracker
    meta: dict[str, Any]
    """What else a checkpoint says of the run: settings, model config, tokenizer."""
    policy: parallel.Policy = field(default_factory=lambda: parallel.Policy("ddp", torch.float32))
    """How the model is spread over the ranks."""
    keep_last: int = 2
    """Newest checkpoints to keep: should the last turn out damaged, there is one before it."""
    keep_every: int = -1
    """Keep also the checkpoints of steps that are multiples of this; 0 or less: none."""
    step_metrics: Callable[[], dict[str, float]] = dict
    """Further metrics of the step just made, named `Group/name`; printed with the loss."""
    teaches: Callable[[], bool] = lambda: True
    """Whether there is anything to learn from the batches just taken; the same on every rank. Where there is not, the
    weights stay: Muon would take a full step along old momentum, however small the gradient."""
    flops_per_token: float | None = None
    """Of forward and backward; None: time is not spent on training alone, so no MFU."""
    memory_advice: str = "halve --device-batch-size (the total batch, and so the result, stays the same)"
    """What to do when the device is out of memory."""
    state: LoopState = field(default_factory=LoopState)


@dataclass(frozen=True)
class Outcome:
    """What a call of `train` came to."""

    finished: bool
    """False: stopped by a signal, saved, to be continued."""
    metrics: dict[str, float]
    """Final figures for the report."""


def resume(run: TrainingRun, meta: dict[str, Any]) -> None:
    """Put model, optimizer, generators and counters where the checkpoint with this meta.json left them (not the loader,
    whose state is given to its constructor)."""
    step = meta["step"]
    checkpoint.load_weights(run.folder, step, run.model)
    checkpoint.load_optimizer(run.folder, step, run.optimizer, meta["optimizer_steps"])
    rank = get_dist_info().rank
    if rank < len(meta["rng"]):
        checkpoint.set_rng_state(meta["rng"][rank])
    run.state = LoopState(**meta["loop"])
    print0(f"resumed from step {step:,} in {run.folder}")


@dataclass
class _Companions:
    """What goes along with the loop."""

    stop: StopSignal
    console: "_Console"
    saver: "Saver"
    watchdog: Watchdog
    stragglers: StragglerReport


def train(run: TrainingRun) -> Outcome:
    """Train to the last step, or until a signal asks to stop; the state is saved in both cases."""
    from nanochat.saver import Saver  # takes 3 s: only for those who train

    device = run.model.get_device()
    if get_dist_info().world_size > ranks_per_node():
        preflight.check(device, get_base_dir())  # on several hosts one slow one sets the pace: name it now
    saver = Saver(run.folder, run.model, run.optimizer, run.keep_last, run.keep_every)
    with_ = _Companions(StopSignal(), _Console(run, device), saver, Watchdog(), StragglerReport(device))
    try:
        with scheduled() as collect:
            finished = _loop(run, with_, collect)
        if not finished:
            saver.wait()
    except torch.OutOfMemoryError:
        raise UserError(
            f"{device} is out of memory at a device batch of {run.loader.device_batch_size} rows: {run.memory_advice}"
        ) from None
    finally:
        saver.close()
        run.loader.close()
        with_.stop.restore()
        with_.watchdog.close()
    if not finished:
        who = with_.stop.received or "another rank"
        print0(f"stopped by {who} at step {run.state.step:,}, saved; run again with --resume=auto")
    return Outcome(finished, with_.console.summary())


def _loop(run: TrainingRun, with_: _Companions, collect: Callable[[int], None]) -> bool:
    """All steps. True when all is done, False when a signal came before that."""
    device = run.model.get_device()
    console, watchdog, state = with_.console, with_.watchdog, run.state
    saved_step = state.step if state.step > 0 else -1
    started_at = state.step
    while True:
        last = state.step == run.num_iterations
        asked = with_.stop.agreed(device, broken=console.failure is not None)
        if asked == BROKEN:
            console.flush()
            raise UserError(console.failure or "another rank has found that the loss or a gradient is not finite")
        stopping = asked == STOP
        due = [] if stopping or state.step == state.evaluated_step else run.evaluations
        due = [evaluation for evaluation in due if evaluation.due(state.step, last)]
        save_due = run.save_every > 0 and state.step % run.save_every == 0 and state.step > 0
        # Saved before it is evaluated: evaluations are long, and may run out of memory.
        if state.step != saved_step and (last or stopping or save_due):
            console.check()
            watchdog.mark(state.step, "save")
            _save(run, with_.saver, last)
            saved_step = state.step
            console.restart()
        if due:
            console.check()
            _evaluate(run, due, watchdog)
            console.restart()
        if not stopping:
            state.evaluated_step = state.step
        if stopping:
            return False
        if last:
            watchdog.mark(state.step, "save")
            with_.saver.wait()
            if get_dist_info().rank == 0:
                known = {"loop": asdict(state), "val_bpb": state.latest.get("Loss/val_bpb")}
                checkpoint.update_meta(run.folder, state.step, known)
            return True
        result = _train_step(run, watchdog, with_.stragglers)
        console.step(result, synced=state.step - started_at == WARMUP_STEPS)
        if state.step == started_at + 1:
            lower_timeout(
                device=device, leave=with_.saver.group
            )  # all ranks have compiled: from here on a long wait is a fault
        if slow := with_.stragglers.report(state.step):
            run.tracker.log(state.step, state.step * run.tokens_per_step, slow)
        collect(state.step)


def _train_step(run: TrainingRun, watchdog: Watchdog, stragglers: StragglerReport) -> tuple[Tensor, Tensor, float]:
    """One optimizer step. Returns (mean loss over all ranks, gradient norm, learning-rate multiplier), unread."""
    world = get_dist_info().world_size
    step = run.state.step
    watchdog.mark(step, "data")
    started = time.perf_counter()
    batches = [run.loader.next_batch() for _ in range(run.loader.batches_per_step)]
    waited = time.perf_counter() - started
    # Each target weighs the same wherever it lies: divide by the global count, not by each micro-batch's own (which
    # may be zero, when everything in it is masked).
    count = torch.stack([(targets != IGNORED).sum() for _, targets, *_ in batches]).sum().float()
    stragglers.record(time.perf_counter() - started, waited)
    if world > 1:
        dist.all_reduce(count)
    count = count.clamp(min=1)
    total = torch.zeros((), device=count.device)
    for index, (inputs, targets, *weights) in enumerate(batches):
        watchdog.mark(step, "forward")  # of every micro-batch: a sign of life
        parallel.before_micro_batch(run.model, run.policy, last=index == len(batches) - 1)
        weighted = {"loss_weights": weights[0]} if weights else {}
        with stragglers.forward() if index == 0 else nullcontext():
            loss = run.forward(inputs, targets, loss_reduction="sum", **weighted)
        (loss * (world / count)).backward()  # gradients are averaged over ranks
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    multiplier, momentum = run.schedule(step)
    if not run.teaches():
        multiplier = 0.0
    set_schedule(run.optimizer.param_groups, multiplier, momentum)
    watchdog.mark(step, "update")
    norm = run.optimizer.step(max_norm=run.grad_clip if run.grad_clip > 0 else None)
    run.optimizer.zero_grad(set_to_none=True)
    run.state.step += 1
    return total / count, norm, multiplier


def _evaluate(run: TrainingRun, due: list[Evaluation], watchdog: Watchdog) -> None:
    """Make these evaluations and record what they say."""
    state = run.state
    run.model.eval()
    metrics: dict[str, float] = {}
    with torch.no_grad(), parallel.whole_weights(run.model, run.policy):
        for evaluation in due:
            watchdog.mark(state.step, "evaluate")
            metrics.update(evaluation.run(state.step))
    run.model.train()
    if not metrics:
        return
    state.latest.update(metrics)
    for name, value in metrics.items():
        if name.startswith("Loss/"):
            state.best[name] = min(value, state.best.get(name, math.inf))
    run.tracker.log(state.step, state.step * run.tokens_per_step, metrics)
    print0(f"step {state.step:05d} | " + " | ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    gc.collect()  # the schedule of the loop only looks at young objects


def _save(run: TrainingRun, saver: "Saver", last: bool) -> None:
    """Start writing a checkpoint; training goes on meanwhile."""
    meta = {**run.meta, "loop": asdict(run.state), "loader": run.loader.state_dict()}
    meta["wandb_id"] = run.tracker.wandb_id
    seconds = saver.save(run.state.step, meta, last)  # that the loop was held up
    run.tracker.log(run.state.step, run.state.step * run.tokens_per_step, {"Time/save_seconds": seconds})


class _Console:
    """Turns the unread tensors of training steps into log lines and metrics, about once a second.

    Reading a value waits for the device; doing so at every step would leave it idle in between.
    """

    def __init__(self, run: TrainingRun, device: torch.device) -> None:
        self.run, self.device = run, device
        self.world = get_dist_info().world_size
        self.flops_per_token = run.flops_per_token
        self.peak = peak_flops(device) if run.flops_per_token else None
        self.pending: list[tuple[int, Tensor, Tensor, float, dict[str, float]]] = []
        self.seen = 0
        self.clock = time.perf_counter()
        self.failure: str | None = None  # why training cannot go on

    def check(self) -> None:
        """Flush, on all ranks; they see the same values. Raises UserError when training cannot go on."""
        self.flush()
        if self.failure is not None:
            raise UserError(self.failure)

    def step(self, result: tuple[Tensor, Tensor, float], synced: bool) -> None:
        self.pending.append((self.run.state.step, *result, self.run.step_metrics()))
        if synced or self.seen < WARMUP_STEPS or time.perf_counter() - self.clock > 1.0:
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
        for step, loss_tensor, norm_tensor, multiplier, further in self.pending:
            loss, norm = loss_tensor.item(), norm_tensor.item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                # A norm that is not finite has spoilt the weights, though the loss shows it only at the next step.
                name, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
                self.failure = (
                    f"the {name} is {value} at step {step}: lower --matrix-lr and --embedding-lr; the checkpoints "
                    "before this step stand"
                )
                break
            state.smoothed_loss = SMOOTHING * state.smoothed_loss + (1 - SMOOTHING) * loss
            metrics = {
                "Loss/train_loss": loss,
                "Optimization/grad_norm": norm,
                "Optimization/lr_multiplier": multiplier,
                "Time/step_seconds": seconds,
                "Time/tokens_per_second": rate,
                **further,
            }
            if self.peak:
                metrics["Hardware/mfu"] = self._mfu(rate)
            state.latest.update(metrics)
            self.run.tracker.log(step, step * self.run.tokens_per_step, metrics)
        self.pending.clear()
        if self.failure is None:
            self._print(step, seconds, rate, further)

    def restart(self) -> None:
        """Leave what has just been done (an evaluation, a checkpoint) out of the time of the next step."""
        if not self.pending:
            self.clock = time.perf_counter()

    def _mfu(self, tokens_per_second: float) -> float:
        assert self.peak is not None and self.flops_per_token is not None
        return self.flops_per_token * tokens_per_second / (self.peak * self.world)

    def _print(self, step: int, seconds: float, rate: float, further: dict[str, float]) -> None:
        state, total = self.run.state, self.run.num_iterations
        smoothed = state.smoothed_loss / (1 - SMOOTHING**step)
        pace = state.steady_seconds / state.steady_steps if state.steady_steps else seconds
        mfu = f" | mfu {100 * self._mfu(rate):.1f}%" if self.peak else ""
        also = "".join(f" | {name.split('/')[1]} {value:.4f}" for name, value in further.items())
        multiplier, norm = (state.latest[f"Optimization/{name}"] for name in ("lr_multiplier", "grad_norm"))
        print0(
            f"step {step:05d}/{total:05d} ({100 * step / total:.1f}%) | loss {smoothed:.4f}{also} | "
            f"lrm {multiplier:.2f} | norm {norm:.3f} | {1000 * seconds:,.1f} ms | {rate:,.0f} tok/s{mfu} | "
            f"epoch {self.run.loader.epoch():.2f} | "
            f"{state.seconds / 60:.1f} min, {pace * (total - step) / 60:.1f} left"
        )

    def summary(self) -> dict[str, float]:
        """Final figures. Tokens/s and MFU are means over the steady steps, whose number stands beside them."""
        state = self.run.state
        result: dict[str, float] = {"steps": state.step, "tokens": state.step * self.run.tokens_per_step}
        result.update(
            {f"final {name.split('/')[1]}": value for name, value in state.latest.items() if _is_result(name)}
        )
        result.update({f"minimum {name.split('/')[1]}": value for name, value in state.best.items()})
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


def _is_result(name: str) -> bool:
    return name.startswith(("Loss/", "Eval/"))
