"""What mid_train and chat_sft share: a model of an earlier stage, trained further on conversations.

Everything that the earlier stage decided (text source, length of a row, batch, learning rates) is taken from its
checkpoint unless a flag says otherwise.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch

from nanochat import checkpoint, cli, parallel
from nanochat.cli import float_flag, int_flag
from nanochat.config import LEARNING_RATES
from nanochat.data.chat_rows import ChatPacker, ChatRows, LossOn, Packing, evaluation_rows
from nanochat.dataloader import RowLoader, plan_batch, target_batches
from nanochat.errors import UserError
from nanochat.eval.bpb import VAL_BPB, evaluate_bpb
from nanochat.eval.samples import make_chat_samples
from nanochat.hardware import device_name
from nanochat.optim.schedule import lr_multiplier, muon_momentum
from nanochat.parallel import Parallel
from nanochat.paths import checkpoint_dir
from nanochat.runtime import IGNORE_INDEX, DeviceType, compute_cleanup, compute_init, print0
from nanochat.sections import write_section
from nanochat.tasks.common import Task, TaskMixture
from nanochat.tasks.registry import make_task, parse_spec, parse_tasks
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes
from nanochat.train.loop import Evaluation, TrainingRun, resume, train
from nanochat.train.observer import Observer
from nanochat.train.run_folder import Resume, describe_run, earlier_run
from nanochat.train.tracking import NO_WANDB, Tracker


@dataclass(frozen=True, kw_only=True)
class ChatTrainSettings:
    """Train a model further on conversations."""

    # ---- the data
    tasks: str = "SmolTalk"
    """Tasks to train on: Name[:first items][*repeats], joined by commas; a file.jsonl is a task of its own."""
    packing: Packing = "bestfit"
    """bestfit: whole conversations, rows padded; stream: one flat stream, cut anywhere."""
    loss_on: LossOn = "assistant"
    """assistant: train on what the assistant says; all: on every token."""

    # ---- the model to start from
    model_tag: str | None = None
    """Run to start from, and to write to; default: the newest run of the stage before."""
    model_step: Annotated[int | None, int_flag(gte=0)] = None
    """Step of its checkpoint; default: the last."""
    out_tag: str | None = None
    """Another name for what is written."""

    # ---- how long
    num_epochs: Annotated[float, float_flag(gte=0)] = 1.0
    """Passes over the conversations."""
    num_iterations: Annotated[int, int_flag(gte=-1)] = -1
    """Optimizer steps; -1: from num_epochs."""

    # ---- the batch; None: as in the stage before
    max_seq_len: Annotated[int | None, int_flag(gte=2)] = None
    """Tokens in a row."""
    device_batch_size: Annotated[int | None, int_flag(gte=1)] = None
    """Rows per forward pass on each device."""
    total_batch_size: Annotated[int | None, int_flag(gte=1)] = None
    """Tokens per optimizer step over all devices; learning rates follow it by its square root."""

    # ---- the optimizer; None: as in the stage before
    matrix_lr: Annotated[float | None, float_flag(gte=0)] = None
    """Muon learning rate of the matrices."""
    embedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """AdamW learning rate of the embedding at width 768."""
    unembedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """AdamW learning rate of the head at width 768."""
    weight_decay: Annotated[float | None, float_flag(gte=0)] = None
    """Cautious weight decay of the matrices, times their learning rate."""
    init_lr_frac: Annotated[float, float_flag(gte=0)] = 1.0
    """Factor on all learning rates."""
    grad_clip: Annotated[float, float_flag(gte=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    warmup_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.0
    """Share of the steps over which the learning rate rises."""
    warmdown_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.5
    """Share of the steps over which it falls at the end."""
    final_lr_frac: Annotated[float, float_flag(gte=0, lte=1)] = 0.0
    """Where it falls to, as a share of the full rate."""
    seed: Annotated[int, int_flag(gte=0)] = 42
    """Seed of the order of the data."""

    # ---- watching it
    run: str = NO_WANDB
    """Name of the run in Weights & Biases; dummy: no W&B."""
    eval_every: Annotated[int, int_flag(gte=-1)] = 150
    """Steps between measurements of bits per byte on held-out conversations; -1: only at the end."""
    eval_tokens: Annotated[int, int_flag(gte=1)] = 2_097_152
    """Positions measured, at most."""

    # ---- checkpoints
    save_every: Annotated[int, int_flag(gte=-1)] = 1000
    """Steps between checkpoints; -1: only the last."""
    keep_last: Annotated[int, int_flag(gte=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, int_flag(gte=-1)] = -1
    """Keep also the checkpoints of steps that are multiples of this; -1: none."""
    resume: Resume = "never"
    """auto: continue the run of this tag where it stopped, if its settings are the same."""

    # ---- the machines
    parallel: Parallel = "auto"
    """ddp: all weights on every GPU; fsdp: cut over all GPUs; hsdp: cut within each node; auto: by size and nodes."""
    use_fsdp: bool = False
    """The same as --parallel=fsdp."""
    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool | None = None
    """torch.compile; default: on CUDA only."""


def present(recipe: dict[str, Any]) -> list[str]:
    """The learning rates that a recipe gives; older ones lack some, for parameters which their models lack."""
    return [name for name in LEARNING_RATES if name in recipe]


def inherit(settings: ChatTrainSettings, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe of this stage: that of the stage before, with what the settings change.

    The learning rates go with the square root of the batch.
    """
    own = {name: getattr(settings, name, None) for name in recipe}
    new = {**recipe, **{name: value for name, value in own.items() if value is not None}}
    factor = math.sqrt(new["total_batch_size"] / recipe["total_batch_size"])
    for name in present(recipe):
        if own[name] is None:
            new[name] *= factor
    return new


class Horizon(Protocol):
    """The settings that say how long to train."""

    @property
    def num_epochs(self) -> float: ...

    @property
    def num_iterations(self) -> int: ...


def plan_steps(settings: Horizon, rows: int, rows_per_step: int) -> int:
    """Optimizer steps for data of so many rows (or questions). Raises UserError when there is nothing to do."""
    if settings.num_iterations > 0:
        return settings.num_iterations
    if settings.num_epochs <= 0:
        raise UserError("no horizon: give --num-iterations or --num-epochs above 0")
    return max(1, round(settings.num_epochs * rows / rows_per_step))


def held_out(spec: str, source: str | None) -> Task | None:
    """The test items of the tasks that are trained on; None where there are none (a short file of one's own)."""
    kinds = dict.fromkeys((item.name, item.count) for item in parse_spec(spec))  # repeats are no use here
    mixture = TaskMixture([make_task(name, "test", source, count) for name, count in kinds])
    return mixture if len(mixture) else None


def task_rows(tasks: list[Task]) -> list[list[Any]]:
    """[name, conversations, how often it is given, source, published] of each task."""
    times = Counter(id(task) for task in tasks)
    different = {id(task): task for task in tasks}
    return [[task.name, len(task), times[key], task.source, "yes" if task.published else "no"]
            for key, task in different.items()]  # fmt: skip


def train_on_chats(
    settings: ChatTrainSettings, stage: str, parent_stage: str, section: str, title: str, observer: Observer
) -> None:
    """Train `stage` (mid, sft) from the last checkpoint of `parent_stage`, and write the report's `section`."""
    _, rank, _, world_size, device = compute_init(settings.device_type)
    model, tokenizer, parent = checkpoint.find_model(parent_stage, device, settings.model_tag, settings.model_step)
    requested = parallel.requested_strategy(settings.parallel, settings.use_fsdp)
    policy = parallel.parallelize_model(model, requested, device)
    checkpoint.fill_model(model, device, parent)
    recipe = inherit(settings, parent["recipe"])
    length, batch = recipe["max_seq_len"], recipe["total_batch_size"]
    if length > model.config.sequence_len:
        raise UserError(f"--max-seq-len={length}: the model was trained on rows of {model.config.sequence_len}")
    plan = plan_batch(batch, recipe["device_batch_size"], length, world_size)

    # ---- the data
    tasks = parse_tasks(settings.tasks, "train", recipe["source"])
    packer = ChatPacker(tokenizer, TaskMixture(tasks), length, settings.packing, settings.loss_on, settings.seed)
    rows, trained_share, cut_share = packer.rows_per_epoch()
    num_iterations = plan_steps(settings, rows, plan.rows_per_step)
    for name, conversations, times, origin, _ in task_rows(tasks):
        print0(f"{name}: {conversations:,} conversations x {times} ({origin})")
    print0(
        f"{rows:,} rows of {length:,} tokens an epoch, {100 * trained_share:.1f} % of the positions trained on, "
        f"{100 * cut_share:.1f} % of the tokens cut off"
    )
    print0(f"{num_iterations:,} steps of {batch:,} tokens = {num_iterations * batch / length / rows:.2f} epochs")
    if plan.note:
        print0(f"note: {plan.note}")

    # ---- the optimizer
    rates = {name: recipe[name] * settings.init_lr_frac for name in present(recipe)}
    print0("learning rates: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    optimizer = model.setup_optimizer(
        **rates, weight_decay=recipe["weight_decay"], use_muon=recipe.get("use_muon", True)
    )

    def schedule(step: int) -> tuple[float, float]:
        ratios = settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac
        return lr_multiplier(step, num_iterations, *ratios), muon_momentum(step)

    # ---- where it goes, and whether some of it is there already
    compiled = settings.compile if settings.compile is not None else device.type == "cuda"
    forward = parallel.compile_model(model, policy) if compiled else model
    about = {**cli.as_dict(settings), "source": recipe["source"]}
    data = packer.fingerprint()
    meta = describe_run(stage, about, model.config, tokenizer.hash, recipe, num_iterations, parent, data)
    evaluations = held_out_bpb(settings, recipe, tokenizer, forward, device, rank, world_size)
    folder = checkpoint_dir(stage, settings.out_tag or parent["tag"])
    earlier = earlier_run(folder, settings.resume, meta) or {}
    loader = RowLoader(
        ChatRows(packer),
        rows_per_step=plan.rows_per_step,
        device_batch_size=recipe["device_batch_size"],
        device=device,
        rank=rank,
        world_size=world_size,
        state=earlier.get("loader"),
    )

    # ---- train
    run = TrainingRun(
        stage=stage,
        folder=folder,
        model=model.train(),
        forward=forward,
        optimizer=optimizer,
        loader=loader,
        num_iterations=num_iterations,
        tokens_per_step=batch,
        schedule=schedule,
        grad_clip=settings.grad_clip,
        save_every=settings.save_every,
        evaluations=evaluations,
        tracker=Tracker(stage, settings.run, meta, earlier.get("step"), earlier.get("wandb_id")),
        meta=meta,
        policy=policy,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        teaches=lambda: loader.has_gradient_signal,
        observer=observer,
        flops_per_token=model.estimate_flops(length),
    )
    if earlier:
        resume(run, earlier)
    outcome = train(run)
    run.tracker.close()
    samples = []
    if outcome.finished:  # on all ranks alike; one that was told to stop has no time for this
        with parallel.unsharded_params(model.eval(), policy), parallel.disable_compile(model):
            samples = make_chat_samples(model, tokenizer) if rank == 0 else []
    if samples:
        for sample in samples:
            print0(f"--- {sample['prompt']}\n{sample['text']}")
        figures = {
            "device": device_name(device),
            "ranks": world_size,
            "conversations": len(packer.task),
            "epochs": loader.epoch(),
            "share of positions trained on": trained_share,
            "cut share": cut_share,
            **outcome.metrics,
        }
        write_section(section, title, describe(settings, recipe, meta, tasks, figures, samples))
    if outcome.finished:
        checkpoint.mark_complete(folder)
    compute_cleanup()


def held_out_bpb(
    settings: ChatTrainSettings,
    recipe: dict[str, Any],
    tokenizer: RustBPETokenizer,
    forward: Callable[..., torch.Tensor],
    device: torch.device,
    rank: int,
    world_size: int,
) -> list[Evaluation]:
    """Bits per byte of what is trained on, in held-out conversations of the same tasks."""
    task = held_out(settings.tasks, recipe["source"])
    if task is None:
        print0("nothing is measured on the way: the tasks hold no conversation out")
        return []
    packer = ChatPacker(tokenizer, task, recipe["max_seq_len"], settings.packing, settings.loss_on)
    inputs, targets = evaluation_rows(packer, settings.eval_tokens)
    token_bytes = get_token_bytes(device)
    if not token_bytes.cpu().numpy()[targets[targets != IGNORE_INDEX]].any():
        print0("nothing is measured on the way: no held-out answer lies within a row")
        return []

    def measure(step: int) -> dict[str, float]:
        batches = target_batches(inputs, targets, recipe["device_batch_size"], device, rank, world_size)
        return {VAL_BPB: evaluate_bpb(forward, batches, token_bytes)}

    return [Evaluation(settings.eval_every, True, measure)]


def describe(
    settings: ChatTrainSettings,
    recipe: dict[str, Any],
    meta: dict[str, Any],
    tasks: list[Task],
    figures: dict[str, Any],
    samples: list[dict[str, str]],
) -> dict[str, Any]:
    """The report's section."""
    spoken = "what the assistant says" if settings.loss_on == "assistant" else "all text"
    parent = meta["parent"]
    notes = [
        f"Started from {parent['stage']}/{parent['tag']}, step {parent['step']}.",
        f"val_bpb: bits per byte of {spoken} in held-out conversations of the same tasks, special tokens left out; not "
        "comparable with the bits per byte of plain text.",
    ]
    return {
        "settings": {**meta["settings"], **recipe},
        "metrics": figures,
        "tables": [
            {
                "title": "Conversations trained on",
                "columns": ["Task", "Conversations", "Times", "Source", "Published data set"],
                "rows": task_rows(tasks),
            }
        ],
        "samples": samples,
        "notes": notes,
        "synthetic": not all(task.published for task in tasks),
    }
