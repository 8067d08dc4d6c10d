"""A training run: what base, mid, sft and rl share before the loop starts and after it ends.

The types that the loop works with, and who may write into a checkpoint folder: a new run, or the
one that was stopped there. Two runs never share a folder.
"""

import math
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat import checkpoint, cli, parallel
from nanochat.config import LEARNING_RATES
from nanochat.dataloader import target_batches
from nanochat.errors import UserError
from nanochat.eval.bpb import VAL_BPB, VAL_LOSS, evaluate_bpb, evaluate_loss
from nanochat.files import from_json, hold
from nanochat.flags import ParentFlags, Resume, RunFlags
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.parallel import Policy
from nanochat.paths import check_writable, get_base_dir
from nanochat.runtime import gather, get_dist_info, on_first_rank, print0
from nanochat.sections import write_section
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.observer import Observer

PROJECT = "nanochat"  # in Weights & Biases


# Flags that change what is measured or where, but not (except for rounding) what the weights become; the tags are the
# folder itself.
OBSERVERS = {"run", "eval_every", "eval_tokens", "eval_questions", "eval_samples", "core_metric_every",
             "core_metric_max_per_task", "sample_every", "save_every", "resume", "device_type", "device_batch_size",
             "activation_memory_budget", "model_tag", "out_tag", "parallel", "use_fsdp", "keep_last", "keep_every",
             "monitor_interval", "coord_check", "coord_check_every", "warm_kernels", "unsafe_exec"}  # fmt: skip

# ---- what the loop works with


class Loader(Protocol):
    """Where micro-batches come from (nanochat.dataloader.RowLoader, nanochat.train.rollouts).

    A batch is (inputs, targets), each (B, T) int64, or (inputs, targets, weights) with the factors of the losses.
    """

    batches_per_step: int  # micro-batches of one optimizer step; the same number on every rank
    device_batch_size: int  # rows of each: at most what was requested
    has_gradient_signal: bool = True
    """Whether there is anything to learn from the batches of the step; the same on every rank. Where there is not, the
    weights stay: Muon would take a full step along old momentum, however small the gradient."""

    def next_batch(self) -> tuple[Tensor, ...]: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def epoch(self) -> float:
        return 0.0

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class Evaluation:
    """Something measured every so many steps."""

    every: int  # steps between two measurements; 0 or less: never, except as `at_end` says
    at_end: bool  # also after the last step
    run: Callable[[int], dict[str, float]]
    """step -> metrics, named `Group/name`. Called on every rank, in evaluation mode, without gradients."""
    optional: str = ""  # what to call it where its failure is only reported (see attempt); empty: the run ends

    def due(self, step: int, last: bool) -> bool:
        return (self.every > 0 and step % self.every == 0 and step > 0) or (last and self.at_end)


@dataclass
class LoopState:
    """Counters of the loop; stored with every checkpoint."""

    step: int = 0  # optimizer steps done
    smoothed_loss: float = 0.0  # exponential moving average of the training loss, before bias correction
    skipped: int = 0  # steps whose loss or gradient was not finite, so that they changed nothing
    without_loss: int = 0  # steps in which no target counted
    seconds: float = 0.0  # time spent in training steps, evaluations left out
    steady_steps: int = 0  # steps behind tokens/s and MFU: all but the first few of each start
    steady_seconds: float = 0.0  # time those took
    evaluated_step: int = -1  # last step whose evaluations have been made
    best: dict[str, float] = field(default_factory=dict)  # smallest value of each Loss/ metric of the evaluations
    latest: dict[str, float] = field(default_factory=dict)  # newest value of each metric
    failures: list[str] = field(default_factory=list)  # what could not be measured, and why


@dataclass
class Claim:
    """A run whose folder nobody else may write into until this process ends."""

    folder: Path  # where checkpoints go
    settings: RunFlags
    meta: dict[str, Any]  # what every checkpoint says of the run
    earlier: Any  # meta.json of the checkpoint that the run goes on from; empty at its start, None: it is complete
    model: GPT
    optimizer: MuonAdamW
    num_iterations: int  # optimizer steps of the whole run
    tokenizer: RustBPETokenizer | None = None  # kept beside the checkpoints; None: not known
    policy: Policy = field(default_factory=lambda: Policy("ddp", torch.float32))  # how the model is spread over ranks


@dataclass(kw_only=True)
class TrainingRun(Claim):
    """Everything that nanochat.train.loop.train needs."""

    forward: Callable[..., Tensor]
    """The model as it is trained: compiled, or the model itself. Called as forward(x, y, loss_reduction="sum")."""
    loader: Loader
    tokens_per_step: int  # tokens in one global batch
    schedule: Callable[[int], tuple[float, float]]  # step -> (learning-rate multiplier, Muon momentum)
    grad_clip: float  # largest global gradient norm; 0 = no clipping
    evaluations: list[Evaluation]
    prepare: Callable[[int], None] = lambda step: None
    """What else follows from the number of steps done, such as attention windows; before the first forward pass of
    each step."""
    step_metrics: Callable[[], dict[str, float]] = dict
    """Further metrics of the step just made, named `Group/name`; printed with the loss."""
    monitor: Observer = field(default_factory=Observer)  # looks inside the model (nanochat.train.monitor)
    observer: Observer = field(default_factory=Observer)  # watches the ranks while they train
    warm_kernels: Callable[["TrainingRun"], None] = lambda run: None
    """Compiles and tunes kernels before the first step, and undoes it (nanochat.train.warmup)."""
    flops_per_token: float | None = None  # forward and backward; None: time not spent on training alone, so no MFU
    memory_advice: str = "halve --device-batch-size (the total batch, and so the result, stays the same)"
    wandb_project: str = PROJECT
    state: LoopState = field(default_factory=LoopState)


@dataclass(frozen=True)
class Outcome:
    """What a call of `train` came to."""

    finished: bool  # False: stopped by a signal, saved, to be continued
    metrics: dict[str, Any]  # final ones, for the report


T = TypeVar("T")


def attempt(state: LoopState, what: str, measure: Callable[[], T], otherwise: T) -> T:
    """`measure()`, or `otherwise` where that fails: the log and the report say so, and training goes on. Where ranks
    meet in it, it must fail on all of them or on none (gather_records sees to that)."""
    try:
        return measure()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = " ".join(str(error).split())[:300]
        if not isinstance(error, UserError):  # a defect, of the program or of data that came from elsewhere
            why = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {why}"
        note = f"Not measured at step {state.step}, training went on: {what}: {why}"
        print0(note)
        state.failures.append(note)
        return otherwise


# ---- before the loop


def load_parent(
    stage: str, flags: ParentFlags, device: torch.device
) -> tuple[GPT, RustBPETokenizer, dict[str, Any], Policy]:
    """(model of an earlier stage, spread over ranks; its tokenizer; its meta; how it is spread)."""
    model, tokenizer, parent = checkpoint.find_model(stage, device, flags.model_tag, flags.model_step)
    inherited = {*LEARNING_RATES, "source", "max_seq_len", "device_batch_size", "total_batch_size", "use_muon"}
    if lacking := sorted(inherited - parent.get("recipe", {}).keys()):
        raise UserError(f"{stage} {parent['tag']}, step {parent['step']}: its recipe lacks {', '.join(lacking)}; train "
                        "it again, or take another")  # fmt: skip
    policy = parallelize_model(model, flags, device)
    checkpoint.fill_model(model, device, parent)
    return model.train(), tokenizer, parent, policy


def claim(
    stage: str,
    tag: str,
    settings: RunFlags,
    model: GPT,
    tokenizer: RustBPETokenizer | None,
    policy: Policy,
    optimizer: MuonAdamW,
    recipe: dict[str, Any],
    num_iterations: int,
    parent: dict[str, Any] | None = None,
    data: str | None = None,
    tokenizer_hash: str | None = None,
) -> Claim:
    """Take the folder, and see what is there already (earlier_run). recipe: what later stages inherit (source,
    max_seq_len, batch sizes, learning rates at that batch, weight_decay, use_muon); parent: what find_model says of the
    checkpoint that training starts from; data: a hash of what is trained on, where the settings do not tell;
    tokenizer_hash: where there is no tokenizer."""
    meta = {
        "stage": stage,
        "settings": {**cli.as_dict(settings), "source": recipe["source"]},
        "model_config": asdict(model.config),
        "tokenizer_hash": tokenizer_hash or (tokenizer and tokenizer.hash),
        "recipe": recipe,
        "num_iterations": num_iterations,
        "world_size": get_dist_info().world_size,
    }
    if data is not None:
        meta["data"] = data
    if parent is not None:
        meta["parent"] = {name: parent[name] for name in ("stage", "tag", "step", "identity")}
    folder = checkpoint.checkpoint_dir(stage, tag)
    earlier = earlier_run(folder, settings.resume, meta)
    return Claim(folder, settings, meta, earlier, model, optimizer, num_iterations, tokenizer, policy)


ORIGINS = ("tokenizer_hash", "parent", "data")  # what else must be the same for a run to be the same one
VISIBLE_SECONDS = 90.0  # directories of network file systems are cached for up to a minute
ENDING_SECONDS = 5.0  # that ranks which were killed may take to end, and to let go of the folder


def earlier_run(folder: Path, resume: Resume, meta_now: dict[str, Any]) -> dict[str, Any] | None:
    """meta.json of the checkpoint to resume from, {} to start anew, None where this very run is complete already. Every
    rank calls this, and gets the same.

    What a run with other settings, another tokenizer or another parent left in `folder` is set aside. Under
    resume="never" anything that is there is refused with a UserError.
    """
    # torchrun counts on each node for itself, and only where a process died
    started_again = any(gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0))
    # on a shared disk the others may see the newest checkpoint only a minute later
    meta = on_first_rank(lambda: _look(folder, resume, meta_now, started_again))
    if meta:
        _await_everywhere(checkpoint.step_dir(folder, meta["step"]) / "COMMITTED")
    return meta


def _await_everywhere(path: Path) -> None:
    """Wait until every host sees `path`. Raises UserError, on all ranks, where one does not."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = gather(None if path.exists() else socket.gethostname())
    if hosts := sorted({host for host in blind if host is not None}):
        raise UserError(
            f"{path.parent} is not there on {', '.join(hosts)}: NANOCHAT_BASE_DIR must be one folder that all share"
        )


def _take(folder: Path, tag: str) -> None:
    """From here to its end nobody but this process trains in `folder`. Raises UserError where another does: each would
    take the other's checkpoints for its own, or set the folder aside while the other writes there."""
    lock = get_base_dir() / "locks" / f"{folder.parent.name}-{folder.name}"  # beside it: the folder may not be there
    lock.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + ENDING_SECONDS
    while not hold(lock, alone=True):
        if time.monotonic() > deadline:
            raise UserError(f"{folder}: another process trains there: wait for its end, or set {tag}=NAME")
        time.sleep(0.2)


def _without_state(folder: Path, step: int) -> dict[str, Any] | None:
    """meta.json of a last checkpoint whose state somebody has deleted to save room, but whose weights are as they were
    saved; None otherwise. The state is needed only to train on: nothing is trained again because it is gone."""
    path = checkpoint.step_dir(folder, step)
    with suppress(UserError):
        if not (path / "state").exists() and (path / "model.safetensors").exists():
            checkpoint.verify(path)
            return {**checkpoint.read_meta(folder, step), "step": step}
    return None


def _look(folder: Path, resume: Resume, meta_now: dict[str, Any], started_again: bool) -> dict[str, Any] | None:
    check_writable(folder)
    tag = "--model-tag" if meta_now["stage"] == "base" else "--out-tag"
    _take(folder, tag)
    steps = checkpoint.committed_steps(folder)
    if not steps:
        return {}
    if started_again:
        resume = "auto"  # torchrun started all ranks again (--max-restarts): what is there is this run's own
    complete = checkpoint.is_complete(folder) and not started_again
    if resume == "never":
        how, auto = (", complete", "leaves it as it is") if complete else ("", "continues it")
        raise UserError(
            f"{folder} holds a run already (step {steps[-1]}{how}): {tag}=NAME writes elsewhere, --resume=auto {auto}"
        )
    trained = _without_state(folder, steps[-1]) if complete else None
    try:
        meta = trained or checkpoint.newest(folder, resume=True)
    except checkpoint.Damaged as error:
        print0(f"{error}; there is none before it: kept as {checkpoint.set_aside(folder).name}, starting anew")
        return {}
    before, now = meta["settings"], meta_now["settings"]
    changed = [key for key, value in now.items() if key not in OBSERVERS and before.get(key) != value]
    origins = {"data": meta_now.get("data"), **meta}  # of text, earlier versions kept no hash
    changed += [key.removesuffix("_hash") for key in ORIGINS if origins.get(key) != meta_now.get(key)]
    if changed:
        kept = checkpoint.set_aside(folder).name
        print0(f"the run in {folder} differs in {', '.join(changed)}: kept as {kept}, starting anew")
        return {}
    if complete and meta["step"] == steps[-1]:
        print0(f"the run in {folder} is complete: nothing to do")
        return None
    if (folder / checkpoint.COMPLETE).exists() and not checkpoint.is_complete(folder):
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)  # this or the section is damaged: both are written anew
    return meta


def resume(run: TrainingRun) -> None:
    """Put all but the loader, which is given its state when it is made, where run.earlier left it."""
    meta = run.earlier
    step, rank = meta["step"], get_dist_info().rank
    path = checkpoint.step_dir(run.folder, step) / "meta.json"
    with checkpoint.damage_reported(path, KeyError, TypeError, ValueError, RuntimeError, OverflowError):
        steps, run.state = meta["optimizer_steps"], from_json(LoopState, meta["loop"])
        if rank < len(meta["rng"]):
            checkpoint.set_rng_state(meta["rng"][rank])
    checkpoint.load_weights(run.folder, step, run.model)
    checkpoint.load_optimizer(run.folder, step, run.optimizer, steps)
    print0(f"resumed from step {step:,} in {run.folder}")


def parallelize_model(model: GPT, flags: RunFlags, device: torch.device) -> Policy:
    """Shard a model on the meta device as --parallel says. To be followed by to_empty(device)."""
    requested = parallel.requested_strategy(flags.parallel, flags.use_fsdp)
    return parallel.parallelize_model(model, requested, device)


def compiles(flag: bool | None, device: torch.device) -> bool:
    """--compile, by default on CUDA only."""
    return flag if flag is not None else device.type == "cuda"


def compiled(model: GPT, policy: Policy, flag: bool | None) -> Callable[..., Tensor]:
    """What to train with: the model, compiled where --compile says so."""
    return parallel.compile_model(model, policy) if compiles(flag, model.get_device()) else model


# Of all forward passes of a run's evaluations: with fewer FLOPs they are done before a graph for them is compiled.
COMPILING_PAYS = 3e15
DENSE_MASKS = 4096  # tokens in a row, at most, whose masks fit in memory where nothing is compiled


def evaluated_with(
    model: GPT, forward: Callable[..., Tensor], shape: tuple[int, ...], every: int, num_iterations: int
) -> Callable[..., Tensor]:
    """What to evaluate rows of this shape with, every so many steps and at the end: `forward`, or on a GPU the model
    as it is where that is sooner done."""
    tokens = math.prod(shape) * (1 + (num_iterations // every if every > 0 else 0))
    flops = tokens * model.estimate_flops() / 3 / get_dist_info().world_size
    if model.get_device().type != "cuda" or flops > COMPILING_PAYS or shape[-1] > DENSE_MASKS:
        return forward

    def run(*batch: Tensor, **options: Any) -> Tensor:
        with parallel.disable_compile(model):
            return model(*batch, **options)

    return run


def held_out_loss(
    model: GPT,
    forward: Callable[..., Tensor],
    inputs: np.ndarray,
    targets: np.ndarray,
    device_batch_size: int,
    token_bytes: Tensor | None,
    every: int,
    num_iterations: int,
) -> Evaluation:
    """Bits per byte of fixed rows (N, T), or the loss per token where nobody can say the bytes of tokens."""
    forward = evaluated_with(model, forward, targets.shape, every, num_iterations)
    device, ranks = model.get_device(), get_dist_info()

    def measure(step: int) -> dict[str, float]:
        batches = target_batches(inputs, targets, device_batch_size, device, ranks.rank, ranks.world_size)
        if token_bytes is None:
            return {VAL_LOSS: evaluate_loss(forward, batches, model.config.vocab_size, device)}
        return {VAL_BPB: evaluate_bpb(forward, batches, token_bytes)}

    return Evaluation(every, True, measure)


# ---- after the loop


def final_samples(run: TrainingRun, make: Callable[[], list[dict[str, str]]]) -> list[dict[str, str]]:
    """What the trained model says to fixed prompts, by `make` on rank 0; every rank calls this."""

    def sample() -> list[dict[str, str]]:
        return make() if get_dist_info().rank == 0 else []

    with parallel.unsharded_params(run.model.eval(), run.policy), parallel.disable_compile(run.model):
        return attempt(run.state, "samples", sample, [])


def finish(run: TrainingRun, section: str, title: str, data: Mapping[str, Any]) -> None:
    """Write the report's section and mark the run as complete (rank 0)."""
    written = write_section(section, title, {**data, "notes": [*data.get("notes", []), *run.state.failures]})
    if written is not None:
        checkpoint.mark_complete(run.folder, written)
