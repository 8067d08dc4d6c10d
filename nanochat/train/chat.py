"""What mid_train and chat_sft share: a model of an earlier stage, trained further on conversations.

Everything that the earlier stage decided (its recipe: text source, length of a row, batch, learning rates) is taken
from its checkpoint unless a flag says otherwise.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from nanochat.config import LEARNING_RATES
from nanochat.data.chat_rows import ChatPacker, ChatRows, evaluation_rows
from nanochat.data.rows import plan_batch
from nanochat.dataloader import RowLoader
from nanochat.errors import TooLittleText, UserError, visible
from nanochat.eval.samples import make_chat_samples
from nanochat.flags import ChatTrainSettings, ParentFlags
from nanochat.gpt import GPT
from nanochat.optim.schedule import make_schedule
from nanochat.runtime import IGNORE_INDEX, compute_cleanup, compute_init, print0
from nanochat.tasks.common import LeftOut, Task, TaskMixture
from nanochat.tasks.registry import make_task, parse_spec, parse_tasks
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes
from nanochat.train.loop import train
from nanochat.train.observer import Observer
from nanochat.train.run import (
    Evaluation,
    TrainingRun,
    claim,
    compiled,
    final_samples,
    finish,
    held_out_loss,
    load_parent,
)


def inherit(settings: ChatTrainSettings, parent: dict[str, Any]) -> dict[str, Any]:
    """The recipe of this stage: that of the parent, with what the settings change.

    The learning rates go with the square root of the batch.
    """
    own = {name: getattr(settings, name, None) for name in parent}
    recipe = {**parent, **{name: value for name, value in own.items() if value is not None}}
    factor = math.sqrt(recipe["total_batch_size"] / parent["total_batch_size"])
    for name in LEARNING_RATES:
        if own[name] is None:
            recipe[name] *= factor
    return recipe


def plan_steps(flags: ParentFlags, rows: int, rows_per_step: int) -> int:
    """Optimizer steps for data of so many rows (or questions). Raises UserError when there is nothing to do."""
    if flags.num_iterations > 0:
        return flags.num_iterations
    if flags.num_epochs <= 0:
        raise UserError("no horizon: give --num-iterations or --num-epochs above 0")
    return max(1, round(flags.num_epochs * rows / rows_per_step))


def held_out(spec: str, source: str | None) -> Task | None:
    """The test items of the tasks that are trained on; None where there are none (a short file of one's own)."""
    kinds = dict.fromkeys((item.name, item.count) for item in parse_spec(spec))  # repeats are no use here
    tasks = []
    for name, count in kinds:
        with contextlib.suppress(TooLittleText):  # of test items; chat_data and chat_eval say so
            tasks.append(make_task(name, "test", source, count))
    mixture = TaskMixture(tasks)
    return mixture if len(mixture) else None


def task_rows(tasks: list[Task]) -> list[list[Any]]:
    """[name, conversations, how often it is given, source, published] of each task."""
    times = Counter(id(task) for task in tasks)
    different = {id(task): task for task in tasks}
    return [[task.name, len(task), times[key], task.source, "yes" if task.published else "no"]
            for key, task in different.items()]  # fmt: skip


SECTIONS = {"mid": ("mid_train", "Mid-training"), "sft": ("chat_sft", "Supervised fine-tuning")}  # of the report


def train_on_chats(settings: ChatTrainSettings, stage: str, parent_stage: str, observer: Observer) -> None:
    """Train `stage` (mid, sft) from the last checkpoint of `parent_stage`, and write its section of the report."""
    _, rank, _, world_size, device = compute_init(settings.device_type)
    model, tokenizer, parent, policy = load_parent(parent_stage, settings, device)
    recipe = inherit(settings, parent["recipe"])
    length, batch = recipe["max_seq_len"], recipe["total_batch_size"]
    if length > model.config.sequence_len:
        raise UserError(f"--max-seq-len={length}: the model was trained on rows of {model.config.sequence_len}")
    plan = plan_batch(batch, recipe["device_batch_size"], length, world_size)

    # ---- the data
    tasks = parse_tasks(settings.tasks, "train", recipe["source"])
    if all(isinstance(task, LeftOut) for task in tasks):
        why = "; ".join(f"{task.name}: {task.source}" for task in tasks)
        raise UserError(f"--tasks={settings.tasks}: nothing to train on; {why}; add a task such as Arithmetic")
    packer = ChatPacker(tokenizer, TaskMixture(tasks), length, settings.packing, settings.loss_on, settings.seed)
    epoch = packer.rows_per_epoch()
    rows = epoch.rows
    num_iterations = plan_steps(settings, rows, plan.rows_per_step)
    for name, conversations, times, origin, _ in task_rows(tasks):
        print0(f"{name}: {conversations:,} conversations x {times} ({origin})")
    print0(f"{rows:,} rows of {length:,} tokens an epoch, {100 * epoch.trained:.1f} % of the positions trained on, "
           f"{100 * epoch.cut:.1f} % of the tokens cut off")  # fmt: skip
    if epoch.exact and not epoch.trained:
        raise UserError(f"--max-seq-len={length}: no answer lies within a row, nothing would be trained on; raise it")
    if epoch.shortened:
        print0(f"note: {epoch.shortened:.1%} of the conversations are longer than a row of {length:,} tokens and end "
               f"with it; nothing is left to train on of {epoch.emptied:.1%}; --max-seq-len sets the row")  # fmt: skip
    print0(f"{num_iterations:,} steps of {batch:,} tokens = {num_iterations * batch / length / rows:.2f} epochs")
    if plan.note:
        print0(f"note: {plan.note}")

    # ---- the optimizer
    rates = {name: recipe[name] * settings.init_lr_frac for name in LEARNING_RATES}
    print0("learning rates: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    optimizer = model.setup_optimizer(**rates, weight_decay=recipe["weight_decay"], use_muon=recipe["use_muon"])
    forward = compiled(model, policy, settings.compile)
    evaluations = held_out_bpb(settings, recipe, tokenizer, model, forward, num_iterations)

    # ---- where it goes, and whether some of it is there already
    tag, data = settings.out_tag or parent["tag"], packer.fingerprint()
    claimed = claim(stage, tag, settings, model, tokenizer, policy, optimizer, recipe, num_iterations, parent, data)
    if claimed.earlier is None:  # this very run is complete
        compute_cleanup()
        return
    size, state = recipe["device_batch_size"], claimed.earlier.get("loader")
    loader = RowLoader(ChatRows(packer), plan.rows_per_step, size, device, rank, world_size, state)

    # ---- train
    run = TrainingRun(
        **vars(claimed),
        forward=forward,
        loader=loader,
        tokens_per_step=batch,
        schedule=make_schedule(num_iterations, settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac),
        grad_clip=settings.grad_clip,
        evaluations=evaluations,
        observer=observer,
        flops_per_token=model.estimate_flops(length),
    )
    outcome = train(run)
    if outcome.finished:  # on all ranks alike; one that was told to stop has no time for samples
        samples = final_samples(run, lambda: make_chat_samples(model, tokenizer))
        for sample in samples:
            print0(visible(f"--- {sample['prompt']}\n{sample['text']}"))
        metrics = {
            "conversations": len(packer.task),
            "epochs": loader.epoch(),
            "share of positions trained on": epoch.trained,
            "cut share": epoch.cut,
            "share of conversations longer than a row": epoch.shortened,
            "share of conversations without a target in their row": epoch.emptied,
            **outcome.metrics,
        }
        finish(run, *SECTIONS[stage], describe(settings, run.meta, tasks, metrics, samples))
    compute_cleanup()


def held_out_bpb(
    settings: ChatTrainSettings,
    recipe: dict[str, Any],
    tokenizer: RustBPETokenizer,
    model: GPT,
    forward: Callable[..., torch.Tensor],
    num_iterations: int,
) -> list[Evaluation]:
    """Bits per byte of what is trained on, in held-out conversations of the same tasks."""
    task = held_out(settings.tasks, recipe["source"])
    if task is None:
        print0("nothing is measured on the way: the tasks hold no conversation out")
        return []
    packer = ChatPacker(tokenizer, task, recipe["max_seq_len"], settings.packing, settings.loss_on)
    inputs, targets = evaluation_rows(packer, settings.eval_tokens)
    token_bytes = get_token_bytes(model.get_device(), tokenizer)
    if not token_bytes.cpu().numpy()[targets[targets != IGNORE_INDEX]].any():
        print0("nothing is measured on the way: no held-out answer lies within a row")
        return []
    size, every = recipe["device_batch_size"], settings.eval_every
    return [held_out_loss(model, forward, inputs, targets, size, token_bytes, every, num_iterations)]


def describe(
    settings: ChatTrainSettings,
    meta: dict[str, Any],
    tasks: list[Task],
    metrics: dict[str, Any],
    samples: list[dict[str, str]],
) -> dict[str, Any]:
    """The report's section."""
    table = {
        "title": "Conversations trained on",
        "columns": ["Task", "Conversations", "Times", "Source", "Published data set"],
        "rows": task_rows(tasks),
    }
    return {
        "settings": {**meta["settings"], **meta["recipe"]},
        "metrics": metrics,
        "tables": [table],
        "samples": samples,
        "facts": {"parent": meta["parent"], "loss_on": settings.loss_on},
        "synthetic": not all(task.published for task in tasks if len(task)),
    }
