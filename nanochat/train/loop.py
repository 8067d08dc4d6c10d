"""The training loop of base, mid, sft and rl.

A script builds the parts (model, optimizer, loader, schedule, evaluations), puts them into a TrainingRun
(nanochat.train.run) and calls `train`. Between two steps, in this order: agree with the other ranks whether to stop,
save, stop, evaluate, end. It saves before it evaluates, because evaluations are long and may run out of memory.
How the model is spread over ranks is run.policy's business (nanochat.parallel), and makes no difference here.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nanochat import checkpoint, parallel
from nanochat.errors import UserError
from nanochat.optim.schedule import set_schedule
from nanochat.runtime import IGNORE_INDEX, Stopped, StopSignal, gather, get_dist_info, interruptible, print0
from nanochat.train.console import MAX_SKIPPED, Console, StepResult
from nanochat.train.run import Evaluation, Outcome, TrainingRun, attempt, resume

if TYPE_CHECKING:
    from nanochat.saver import Saver

SAVE_SECONDS = "Time/save_seconds"  # that the loop was held up by a checkpoint, s


def train(run: TrainingRun) -> Outcome:
    """Train to the last step, or until a signal asks to stop; the state is saved in both cases. Raises UserError, with
    the state saved too, where loss or gradient stay without a finite value."""
    from nanochat.saver import Saver  # takes 3 s: only for those who train

    device = run.model.get_device()
    if run.earlier:
        resume(run)
    run.observer.start(device)
    saver = Saver(run.folder, run.model, run.optimizer, run.settings.keep_last, run.settings.keep_every)
    if run.tokenizer is not None and get_dist_info().rank == 0:  # the store may have another later
        run.tokenizer.keep(run.folder / "tokenizer")
    stop, console = StopSignal(), Console(run, device)
    try:
        with _starting():
            run.warm_kernels(run)
        console.restart()
        finished = _loop(run, stop, console, saver)
    except Stopped:  # before the first step of this start was done: what there is to save is on the disk
        print0(f"stopped by {stop.received} at step {run.state.step:,}; run again with --resume=auto")
        return Outcome(False, {})
    except torch.OutOfMemoryError:
        raise UserError(
            f"{device} is out of memory at a device batch of {run.loader.device_batch_size} rows: {run.memory_advice}"
        ) from None
    finally:
        saver.close()
        run.loader.close()
        stop.restore()
        run.observer.close()
        console.tracker.close()
    if console.diverged:
        raise UserError(
            f"loss or gradient norm was not finite in {MAX_SKIPPED} steps in a row, up to step {run.state.step}; they "
            "changed nothing, and the state is saved: lower --matrix-lr and --embedding-lr"
        )
    if not finished:
        who = stop.received or "another rank"
        print0(f"stopped by {who} at step {run.state.step:,}, saved; run again with --resume=auto")
    return Outcome(finished, console.summary())


def _starting() -> AbstractContextManager[None]:
    """Warming up and the first step compile for minutes: a signal drops them, nothing is lost. Several ranks meet in
    them, and none can leave: there the step is ended first."""
    return nullcontext() if dist.is_initialized() else interruptible()


def _loop(run: TrainingRun, stop: StopSignal, console: Console, saver: "Saver") -> bool:
    """All steps. False where it stopped before all was done; the state is saved in both cases."""
    state, save_every = run.state, run.settings.save_every
    saved_step, start = state.step if state.step > 0 else -1, _starting()
    if state.step:
        run.prepare(state.step - 1)  # the evaluations of the step that is resumed from may come again
    with garbage_collection() as collect:
        while True:
            last = state.step == run.num_iterations
            due = [] if state.step == state.evaluated_step else run.evaluations
            due = [evaluation for evaluation in due if evaluation.due(state.step, last)]
            save_due = save_every > 0 and state.step % save_every == 0 and state.step > 0
            stopping = stop.agreed(run.model.get_device(), console.diverged)
            if last or save_due or due or stopping:
                console.flush()
                stopping |= console.diverged  # now all ranks have read the same steps

            # Once in a while: save the state.
            if state.step != saved_step and (last or save_due or stopping):
                _save(run, console, saver, last)
                saved_step = state.step
            # Once: stop before the end.
            if stopping:
                saver.wait()
                return False
            # Once in a while: evaluate. Where that is stopped it comes again at the next start.
            if due and not _evaluate(run, console, due):
                if state.step != saved_step:
                    _save(run, console, saver, last)
                saver.wait()
                return False
            state.evaluated_step = state.step
            # Once: end.
            if last:
                _finish(run, saver)
                return True

            with start:
                result = train_step(run)
            start = nullcontext()
            console.step(result)
            console.log(run.observer.after_step(state.step, background=saver.group))
            collect(state.step)


def train_step(run: TrainingRun) -> StepResult:
    """One optimizer step; never waits for the device."""
    world, step, observer = get_dist_info().world_size, run.state.step, run.observer
    observer.mark(step, "data")
    started = time.perf_counter()
    batches = [run.loader.next_batch() for _ in range(run.loader.batches_per_step)]
    waited = time.perf_counter() - started
    # Each target weighs the same wherever it lies: divide by the global count, not by each micro-batch's own (which
    # may be zero, when everything in it is masked).
    count = torch.stack([(targets != IGNORE_INDEX).sum() for _, targets, *_ in batches]).sum().float()
    observer.before_collective(time.perf_counter() - started, waited)
    if world > 1:
        dist.all_reduce(count)
    count = count.clamp(min=1)

    # Forward and backward.
    total = torch.zeros((), device=count.device)
    run.prepare(step)
    run.monitor.before_forward(step + 1)
    for index, (inputs, targets, *weights) in enumerate(batches):
        observer.mark(step, "forward")
        parallel.before_micro_batch(run.model, run.policy, last=index == len(batches) - 1)
        weighted = {"loss_weights": weights[0]} if weights else {}
        with observer.first_forward() if index == 0 else nullcontext():
            loss = run.forward(inputs, targets, loss_reduction="sum", **weighted)
        (loss * (world / count)).backward()  # gradients are averaged over ranks
        total += loss.detach()
    if world > 1:
        dist.all_reduce(total)
    mean = total / count

    # Update.
    multiplier, momentum = run.schedule(step)
    has_loss = run.loader.has_gradient_signal
    if not has_loss:
        multiplier = 0.0
    set_schedule(run.optimizer.param_groups, multiplier, momentum)
    observer.mark(step, "update")
    run.monitor.before_update()
    norm = run.optimizer.step(max_norm=run.grad_clip if run.grad_clip > 0 else None, loss=mean)
    run.optimizer.zero_grad(set_to_none=True)
    run.state.step += 1
    return StepResult(mean, norm, multiplier, has_loss, run.monitor.after_update(), waited)


def _evaluate(run: TrainingRun, console: Console, due: list[Evaluation]) -> bool:
    """Make these evaluations and record what they say; False, and nothing recorded, where a signal stopped any rank."""
    state = run.state
    run.model.eval()
    metrics: dict[str, float] = {}
    stopped = False
    with torch.no_grad(), parallel.unsharded_params(run.model, run.policy):
        for evaluation in due:
            run.observer.mark(state.step, "evaluate")
            measure, optional = partial(evaluation.run, state.step), evaluation.optional
            try:
                metrics |= attempt(state, optional, measure, dict[str, float]()) if optional else measure()
            except Stopped:
                stopped = True
            if stopped := any(gather(stopped)):
                break
    run.model.train()
    if stopped:
        return False
    if metrics:
        state.latest.update(metrics)
        for name, value in metrics.items():
            if name.startswith("Loss/"):
                state.best[name] = min(value, state.best.get(name, math.inf))
        console.log(metrics)
        print0(f"step {state.step:05d} | " + " | ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        gc.collect()  # the schedule of the loop only looks at young objects
    console.restart()
    return True


def _save(run: TrainingRun, console: Console, saver: "Saver", last: bool) -> None:
    """Start writing a checkpoint; training goes on meanwhile."""
    run.observer.mark(run.state.step, "save")
    meta = {**run.meta, "loop": asdict(run.state), "loader": run.loader.state_dict()}
    meta["wandb_id"] = console.tracker.wandb_id
    seconds = saver.save(run.state.step, meta, last)  # that the loop was held up
    console.log({SAVE_SECONDS: seconds})
    console.restart()


def _finish(run: TrainingRun, saver: "Saver") -> None:
    """Wait for the last checkpoint and add to it what its evaluations have said."""
    run.observer.mark(run.state.step, "save")
    saver.wait()
    if get_dist_info().rank == 0:
        known = {"loop": asdict(run.state), "val_bpb": run.state.latest.get("Loss/val_bpb")}
        checkpoint.update_meta(run.folder, run.state.step, known)


# A training step leaves 1 to 2 tracked objects and no cycles, so a young collection after 1 to 100 steps took under
# 0.01 ms: its cost does not matter here. What 100 bounds is how much garbage a wasteful loader or logger may pile up.
COLLECT_EVERY = 100


@contextmanager
def garbage_collection() -> Iterator[Callable[[int], None]]:
    """Python's garbage collector, run on all ranks at the same step. Yields `collect(step)`, to be called after each.

    Left to itself it starts at another step on each rank: then some rank is always collecting and the others wait for
    it. Measured on a 12-layer model: 328,000 tracked objects, nearly all from imports, and 0.18 s for a full
    collection. So the first call collects everything and freezes what is left; later ones collect young objects, every
    COLLECT_EVERY steps; older cycles wait for an evaluation. Afterwards the collector is as it was.
    """
    was_enabled = gc.isenabled()
    frozen = False

    def collect(step: int) -> None:
        nonlocal frozen
        if not frozen:
            gc.collect()
            gc.freeze()
            frozen = True
        elif step % COLLECT_EVERY == 0:
            gc.collect(1)

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
