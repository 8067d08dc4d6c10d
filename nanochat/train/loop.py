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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import checkpoint, parallel
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.optim.schedule import set_schedule
from nanochat.runtime import BROKEN, IGNORE_INDEX, STOP, StopSignal, get_dist_info, print0
from nanochat.train.collector import scheduled
from nanochat.train.console import WARMUP_STEPS, Console, StepResult
from nanochat.train.monitor import Monitor
from nanochat.train.observer import Observer
from nanochat.train.tracking import Tracker
from nanochat.train.warmup import SyntheticLoader, warm_up

if TYPE_CHECKING:
    from nanochat.saver import Saver

SAVE_SECONDS = "Time/save_seconds"  # that the loop was held up by a checkpoint, s


class Loader(Protocol):
    """Where the trainer gets its micro-batches from (nanochat.dataloader.RowLoader, for one).

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
    prepare: Callable[[int], None] = lambda step: None
    """What else follows from the number of steps done, such as attention windows; before the first forward pass of
    each step."""
    warm_kernels: bool = False
    """Compile and tune kernels before the first step, on made-up tokens, and undo it (nanochat.train.warmup)."""
    monitor: Monitor | None = None
    """Looks inside the model every so many steps."""
    observer: Observer = field(default_factory=Observer)
    """Watches the run from outside: nanochat.cluster names slow and stuck ranks."""
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
    console: Console
    saver: "Saver"


def train(run: TrainingRun) -> Outcome:
    """Train to the last step, or until a signal asks to stop; the state is saved in both cases."""
    from nanochat.saver import Saver  # takes 3 s: only for those who train

    device = run.model.get_device()
    saver = Saver(run.folder, run.model, run.optimizer, run.keep_last, run.keep_every)
    with_ = _Companions(StopSignal(), Console(run, device), saver)
    run.observer.start(device)
    try:
        if run.warm_kernels:
            _warm_kernels(run)
            with_.console.restart()
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
        run.observer.close()
    if not finished:
        who = with_.stop.received or "another rank"
        print0(f"stopped by {who} at step {run.state.step:,}, saved; run again with --resume=auto")
    return Outcome(finished, with_.console.summary())


def _warm_kernels(run: TrainingRun) -> None:
    """Steps and an evaluation on made-up tokens, undone; neither run.loader nor run.state is touched."""
    rehearsal = replace(run, loader=SyntheticLoader(run.loader, run.model), state=LoopState(), observer=Observer())

    def steps() -> None:
        _train_step(rehearsal)
        rehearsal.state.step = 0
        if run.evaluations:
            run.model.eval()
            with torch.no_grad(), parallel.unsharded_params(run.model, run.policy):
                run.forward(*rehearsal.loader.next_batch(), loss_reduction="none")
            run.model.train()

    seconds = warm_up(run.model, run.optimizer, steps)
    if run.monitor is not None:
        run.monitor.restart()
    print0(f"kernels warmed up in {seconds:.1f} s")


def _loop(run: TrainingRun, with_: _Companions, collect: Callable[[int], None]) -> bool:
    """All steps. True when all is done, False when a signal came before that."""
    device = run.model.get_device()
    console, observer, state = with_.console, run.observer, run.state
    saved_step = state.step if state.step > 0 else -1
    started_at = state.step
    if state.step:
        run.prepare(state.step - 1)  # the evaluations of the step that is resumed from may come again
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
            observer.mark(state.step, "save")
            _save(run, with_.saver, last)
            saved_step = state.step
            console.restart()
        if due:
            console.check()
            _evaluate(run, due)
            console.restart()
        if not stopping:
            state.evaluated_step = state.step
        if stopping:
            return False
        if last:
            observer.mark(state.step, "save")
            with_.saver.wait()
            if get_dist_info().rank == 0:
                known = {"loop": asdict(state), "val_bpb": state.latest.get("Loss/val_bpb")}
                checkpoint.update_meta(run.folder, state.step, known)
            return True
        result = _train_step(run)
        console.step(result, synced=state.step - started_at == WARMUP_STEPS)
        if slow := observer.after_step(state.step, background=with_.saver.group):
            run.tracker.log(state.step, state.step * run.tokens_per_step, slow)
        collect(state.step)


def _train_step(run: TrainingRun) -> StepResult:
    """One optimizer step; waits for nothing."""
    world = get_dist_info().world_size
    step = run.state.step
    run.observer.mark(step, "data")
    started = time.perf_counter()
    batches = [run.loader.next_batch() for _ in range(run.loader.batches_per_step)]
    waited = time.perf_counter() - started
    # Each target weighs the same wherever it lies: divide by the global count, not by each micro-batch's own (which
    # may be zero, when everything in it is masked).
    count = torch.stack([(targets != IGNORE_INDEX).sum() for _, targets, *_ in batches]).sum().float()
    run.observer.before_collective(time.perf_counter() - started, waited)
    if world > 1:
        dist.all_reduce(count)
    count = count.clamp(min=1)
    total = torch.zeros((), device=count.device)
    run.prepare(step)
    if run.monitor is not None:
        run.monitor.start(step + 1)
    for index, (inputs, targets, *weights) in enumerate(batches):
        run.observer.mark(step, "forward")  # of every micro-batch: a sign of life
        parallel.before_micro_batch(run.model, run.policy, last=index == len(batches) - 1)
        weighted = {"loss_weights": weights[0]} if weights else {}
        with run.observer.first_forward() if index == 0 else nullcontext():
            loss = run.forward(inputs, targets, loss_reduction="sum", **weighted)
        (loss * (world / count)).backward()  # gradients are averaged over ranks
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    multiplier, momentum = run.schedule(step)
    if not run.teaches():
        multiplier = 0.0
    set_schedule(run.optimizer.param_groups, multiplier, momentum)
    run.observer.mark(step, "update")
    if run.monitor is not None:
        run.monitor.before_update()
    norm = run.optimizer.step(max_norm=run.grad_clip if run.grad_clip > 0 else None)
    run.optimizer.zero_grad(set_to_none=True)
    reading = run.monitor.after_update() if run.monitor is not None else None
    run.state.step += 1
    return StepResult(total / count, norm, multiplier, reading)


def _evaluate(run: TrainingRun, due: list[Evaluation]) -> None:
    """Make these evaluations and record what they say."""
    state = run.state
    run.model.eval()
    metrics: dict[str, float] = {}
    with torch.no_grad(), parallel.unsharded_params(run.model, run.policy):
        for evaluation in due:
            run.observer.mark(state.step, "evaluate")
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
    run.tracker.log(run.state.step, run.state.step * run.tokens_per_step, {SAVE_SECONDS: seconds})
