"""Pretrain a base model on packed text.

    python -m scripts.base_train --depth=12
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.base_train --depth=20 --run=d20

One dial, --depth, sizes the model; width, heads, horizon and learning rates follow from it and are printed.
"""

import os
from dataclasses import dataclass, replace
from typing import Annotated

from nanochat import cli
from nanochat.cli import alias, count_flag, float_flag, int_flag
from nanochat.config import ArchFlags, build_config, resolve
from nanochat.data.rows import plan_batch
from nanochat.data.sources import source_flag, text_hash
from nanochat.errors import UserError
from nanochat.flags import NO_WANDB, Fp8, RunFlags

MONITOR_VARIABLES = ("MONITOR_SPECTRAL_EVERY", "MONITOR_ACTIVATIONS")


@dataclass(frozen=True, kw_only=True)
class Settings(ArchFlags, RunFlags):
    """Pretrain a base model."""

    # ---- the data
    source: Annotated[str, source_flag("bin:DIR, token files, or text as fetched by nanochat.dataset")] = "fineweb-edu"

    # ---- the horizon, in this order of precedence
    num_iterations: Annotated[int, count_flag(), alias("--iterations")] = -1
    """Optimizer steps; -1: from target_flops or target_param_data_ratio."""
    target_flops: Annotated[float, float_flag(gte=-1)] = -1.0
    """FLOPs to spend; -1: from target_param_data_ratio."""
    target_param_data_ratio: Annotated[float, float_flag(gte=-1)] = 20.0
    """Training tokens per parameter."""

    # ---- the batch
    device_batch_size: Annotated[int | None, int_flag(gte=1)] = None
    """Rows per forward pass on each device, at most; default: what fits into its memory, 32 at most. The result stays
    the same."""
    activation_memory_budget: Annotated[float, float_flag(gte=0, lte=1)] = 1.0
    """Share of what a forward pass leaves for the backward pass that is kept; the rest is computed again. Compiled
    models only."""
    total_batch_size: Annotated[int, int_flag(gte=1)] = 524_288
    """Tokens per optimizer step over all devices, a multiple of max_seq_len."""

    # ---- watching it
    run: str = NO_WANDB
    """Name of the run in Weights & Biases; auto: made from architecture, time and width; dummy: no W&B."""
    eval_every: Annotated[int, int_flag(gte=-1)] = 250
    """Steps between measurements of validation bits per byte; -1: only at the end."""
    eval_tokens: Annotated[int, int_flag(gte=1)] = 10_485_760
    """Validation tokens measured, at most."""
    core_metric_every: Annotated[int, int_flag(gte=-1)] = 2000
    """Steps between CORE evaluations; -1: never. Also at the end."""
    core_metric_max_per_task: Annotated[int, count_flag()] = 500
    """Items per CORE task in these; -1: all."""
    sample_every: Annotated[int, int_flag(gte=-1)] = 2000
    """Steps between samples from fixed prompts; -1: never. Also at the end."""
    monitor_interval: str = "0"
    """Steps between looks inside (norms, spectral norms, activations): a number, production (100), research (10) or
    validation (1); 0: never."""
    coord_check: bool = False
    """Record the size of each module's output into runs/RUN_ID/coord_check.jsonl, for scripts.coord_check --from."""
    coord_check_every: Annotated[int, int_flag(gte=1)] = 10
    """Steps between these."""

    # ---- the checkpoint and the machines
    model_tag: str | None = None
    """Name of the checkpoint folder; default d<depth>."""
    fp8: Fp8 = "none"
    """Train in 8-bit floating point: none, head (the output matrix), or all (also the matrices of the blocks)."""
    warm_kernels: bool = False
    """Compile and tune before the first timed step, on random tokens; nothing else changes."""
    compile: bool | None = None
    """torch.compile; default: on CUDA only (on a CPU compiling takes longer than a small run)."""


def plan_horizon(settings: Settings, num_params: int, flops_per_token: float) -> tuple[int, str]:
    """(optimizer steps, why). Raises UserError when no horizon is given or it is shorter than one step."""
    batch = settings.total_batch_size
    if settings.num_iterations > 0:
        return settings.num_iterations, "--num-iterations"
    if settings.target_flops != -1:
        steps = round(settings.target_flops / (flops_per_token * batch))
        why = f"--target-flops={settings.target_flops:g}"
    elif settings.target_param_data_ratio > 0:
        steps = int(settings.target_param_data_ratio * num_params // batch)
        why = f"{settings.target_param_data_ratio:g} tokens per parameter"
    else:
        raise UserError("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio, one above 0")
    if steps < 1:
        raise UserError(f"{why} is less than one step of {batch:,} tokens: raise it, or lower --total-batch-size")
    return steps, why


def check(settings: Settings) -> None:
    """Raises UserError for flags that contradict each other, whatever the data."""
    settings = resolve(settings)
    if settings.monitor_interval != "0" or not os.environ.keys().isdisjoint(MONITOR_VARIABLES):
        from nanochat.train.monitor import monitor_settings  # which imports torch

        monitor_settings(settings.monitor_interval)
    plan_batch(settings.total_batch_size, settings.device_batch_size or 1, settings.max_seq_len, world_size=1)
    build_config(settings, vocab_size=65_536, document_token=0)
    plan_horizon(settings, num_params=10**15, flops_per_token=1)  # that there is one


if __name__ == "__main__":
    cli.start(Settings, check)  # before torch is imported, which takes seconds

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import torch

from nanochat import mup, parallel
from nanochat.cluster.observer import ClusterObserver
from nanochat.config import LEARNING_RATES, TUNED_AT, init_spec
from nanochat.data.rows import BatchPlan, TrainData
from nanochat.dataloader import RowLoader, open_data
from nanochat.errors import visible
from nanochat.eval.bundle import load_bundle
from nanochat.eval.core import evaluate_core
from nanochat.eval.samples import make_samples
from nanochat.gpt import GPT
from nanochat.hardware import device_name
from nanochat.kernels.fp8 import apply_fp8
from nanochat.optim import MuonAdamW
from nanochat.optim.schedule import batch_lr_scale, make_schedule, window_length
from nanochat.parallel import Policy
from nanochat.paths import eval_bundle_dir, run_dir
from nanochat.runtime import compute_cleanup, compute_dtype, compute_init, get_dist_info, interruptible, print0
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes
from nanochat.train import coordinates
from nanochat.train.console import wandb_name, wandb_project
from nanochat.train.loop import train
from nanochat.train.memory import Batch, choose_rows, keep_activations, memory_advice
from nanochat.train.monitor import Monitor, monitor_settings
from nanochat.train.observer import Observer
from nanochat.train.run import (
    Evaluation,
    TrainingRun,
    claim,
    compiled,
    compiles,
    final_samples,
    finish,
    held_out_loss,
    parallelize_model,
)
from nanochat.train.warmup import warm_kernels

# Of a row that coordinates are recorded on: attention is not compiled there, and takes T x T memory.
COORD_TOKENS = 1024
# What later stages inherit (their recipe), beside the rates.
RECIPE = ("source", "max_seq_len", "device_batch_size", "total_batch_size", "weight_decay", "use_muon")


def default_tag(settings: Settings) -> str:
    """Of the classic architecture d<depth>, as ever; of others what tells them apart."""
    if settings.arch == "nanochat" and settings.width is None and not settings.mup:
        return f"d{settings.depth}"
    width = f"_w{settings.width}" if settings.width is not None else ""
    base = f"_base{settings.base_width}" if settings.mup else ""
    return f"{settings.arch}_d{settings.depth}{width}{'_mup' if settings.mup else ''}{base}"


def samples(model: GPT, tokenizer: RustBPETokenizer | None) -> list[dict[str, str]]:
    """What the model says to fixed prompts, printed on the way (rank 0)."""
    with parallel.disable_compile(model):
        found = make_samples(model, tokenizer)
    for sample in found:
        print0(f"--- {visible(sample['text'])}")
    return found


def core(settings: Settings, model: GPT, data: TrainData) -> list[Evaluation]:
    """Measures CORE; nothing where the bundle has no task."""
    bundle = load_bundle(eval_bundle_dir())  # now, so that one that is missing shows before the end of the run
    tokenizer = data.tokenizer
    assert tokenizer is not None
    if not bundle.tasks:
        print0(bundle.notes[0])
        return []

    def measure(step: int) -> dict[str, float]:
        with parallel.disable_compile(model):  # prompts of many shapes: not to be compiled for each
            result = evaluate_core(
                model,
                tokenizer,
                bundle,
                model.get_device(),
                sequence_len=settings.max_seq_len,
                device_batch_size=max(1, settings.device_batch_size // 4),
                max_per_task=settings.core_metric_max_per_task,
            )
        return {f"Eval/{result.name}": result.value}

    return [Evaluation(settings.core_metric_every, True, measure, optional="CORE")]


def recorder(model: GPT, rows: np.ndarray, anew: bool) -> Callable[[int], dict[str, float]]:
    """Records the size of each module's output on the first validation row."""
    path = run_dir() / "coord_check.jsonl"
    if anew and get_dist_info().rank == 0:
        path.unlink(missing_ok=True)
    first = torch.from_numpy(rows[:1, :COORD_TOKENS].astype(np.int64))
    return partial(coordinates.record, model, path, first.to(model.get_device()))


def make_evaluations(
    settings: Settings, model: GPT, forward: Callable[..., torch.Tensor], data: TrainData, last: int, anew: bool
) -> list[Evaluation]:
    """What is measured on the way to step `last`."""
    tokenizer = data.tokenizer

    def sample(step: int) -> dict[str, float]:
        """An evaluation without metrics. The last samples are made after the loop: a resumed run may not come here."""
        if get_dist_info().rank == 0 and step < last:
            with interruptible():
                samples(model, tokenizer)
        return {}

    val = data.fixed_rows("val", settings.max_seq_len, max(settings.eval_tokens, settings.max_seq_len))
    token_bytes = get_token_bytes(model.get_device(), tokenizer) if tokenizer is not None else None
    size, every = settings.device_batch_size, settings.eval_every
    evaluations = [held_out_loss(model, forward, val[:, :-1], val[:, 1:], size, token_bytes, every, last)]
    if tokenizer is not None and settings.core_metric_every > 0:
        evaluations += core(settings, model, data)
    if tokenizer is not None and settings.sample_every > 0:
        evaluations.append(Evaluation(settings.sample_every, False, sample, optional="samples"))
    if settings.coord_check:
        record = recorder(model, val, anew)
        evaluations.append(Evaluation(settings.coord_check_every, True, record, optional="coordinates"))
    return evaluations


def fade_tables(optimizer: MuonAdamW, decay: float, epochs: float, num_iterations: int) -> None:
    """Let value and n-gram tables decay by e^-decay over each pass where a run makes three or more, less where it makes
    fewer, not at all in one. Adam moves a row as far for a token seen once as for any, and text that comes again would
    find in the tables what it left there: a d6 had 2.54 bits per byte after five passes, with this 1.69."""
    decay *= min(max(epochs - 1, 0) / 2, 1)
    for group in optimizer.param_groups:
        if group["label"] in ("value_embeddings", "n-gram_embeddings") and group["lr"] > 0:
            group["weight_decay"] = min(1.0, decay * epochs / num_iterations) / group["lr"]


def announce(
    settings: Settings, model: GPT, data: TrainData, plan: BatchPlan, num_iterations: int, why: str
) -> tuple[float, float]:
    """Everything that was derived from the settings, before anything is spent. Returns how often the text will be read
    and the share of tokens that packing drops, from a sample: what has been dropped so far would be forgotten when a
    run is killed."""
    horizon = num_iterations * settings.total_batch_size
    device, ranks = model.get_device(), get_dist_info().world_size
    compiling = compiles(settings.compile, device)
    how = "compiled: the first step takes a minute or more" if compiling else "not compiled"
    print0(f"{device_name(device)} x {ranks}, compute in {model.compute_dtype}, {how}")
    print0(f"{model.config}")
    print0(f"{model.num_params():,} parameters, {model.estimate_flops():.4e} FLOPs per token")
    print0(f"{num_iterations:,} steps of {settings.total_batch_size:,} tokens = {horizon:,} tokens ({why})")
    if plan.note:
        print0(f"note: {plan.note}")
    epochs, cropped = data.horizon_in_epochs(settings.max_seq_len, horizon, plan.rows_per_step)
    print0(f"data: {data.source}, {epochs:.2f} epochs, {100 * cropped:.1f} % of tokens cropped by packing")
    if epochs > 1:
        print0(f"warning: too little data: this horizon repeats it {epochs:.1f} times; get more of it, or train less")
        if settings.table_decay:
            print0(f"value and n-gram tables decay, by up to e^-{settings.table_decay:g} in each pass (--table-decay)")
        elif model.config.ngram_embeds:
            print0("warning: n-gram tables learn what is repeated by heart; --table-decay=12 lets them forget it")
    return epochs, cropped


def build_model(settings: Settings, data: TrainData, device: torch.device) -> tuple[Settings, GPT, Policy, int, str]:
    """(settings with a device batch, model, how it is spread over ranks, steps, why so many): shapes first, so that an
    impossible horizon costs no memory; memory second, values last."""
    with torch.device("meta"):
        model = GPT(build_config(settings, data.vocab_size, data.document_token), compute_dtype(device))
    num_iterations, why = plan_horizon(settings, model.num_params(lookups=False), model.estimate_flops())
    policy = parallelize_model(model, settings, device)
    apply_fp8(model, settings.fp8, device)
    if settings.device_batch_size is None:
        rows = choose_rows(model, policy, device, batch_of(settings))
        settings = replace(settings, device_batch_size=rows)
    model.to_empty(device=device)
    model.init_weights(init_spec(settings))
    return settings, model, policy, num_iterations, why


def batch_of(settings: Settings) -> Batch:
    """What the memory of a rank depends on."""
    rows = -(-settings.total_batch_size // settings.max_seq_len // get_dist_info().world_size)
    return Batch(rows, settings.max_seq_len, settings.use_muon, settings.activation_memory_budget)


def main(settings: Settings) -> None:
    settings = resolve(settings)
    _, rank, _, world_size, device = compute_init(settings.device_type)
    watched = monitor_settings(settings.monitor_interval)
    data = open_data(settings.source)
    settings = replace(settings, source=data.source)
    keep_activations(settings.activation_memory_budget)

    settings, model, policy, num_iterations, why = build_model(settings, data, device)
    plan = plan_batch(settings.total_batch_size, settings.device_batch_size, settings.max_seq_len, world_size)
    config, forward = model.config, compiled(model, policy, settings.compile)
    name = wandb_name(settings.run, settings.arch, config.n_embd, config.mup_base_width, datetime.now())
    settings = replace(settings, run=name)

    # ---- the optimizer; its rates and the batch are what later stages go on with
    horizon = num_iterations * settings.total_batch_size
    lr_scale = batch_lr_scale(settings.total_batch_size, horizon, *TUNED_AT[settings.arch])
    rates = {name: getattr(settings, name) * lr_scale for name in LEARNING_RATES}
    optimizer = model.setup_optimizer(**rates, weight_decay=settings.weight_decay, use_muon=settings.use_muon)

    def grow_windows(step: int) -> None:
        if settings.window_warmup:
            model.set_window(window_length(step, num_iterations, config.long_window))

    # ---- where it goes, and whether some of it is there already
    recipe = {**{name: getattr(settings, name) for name in RECIPE}, **rates}
    # a folder may be edited; what is fetched only grows, and that trains no finished run again
    text = text_hash(data.source) if data.source.startswith("local:") else data.fingerprint
    tag = settings.model_tag or default_tag(settings)
    tokenizer, known = data.tokenizer, {"data": text, "tokenizer_hash": data.tokenizer_hash}
    claimed = claim("base", tag, settings, model, tokenizer, policy, optimizer, recipe, num_iterations, **known)
    if claimed.earlier is None:  # this very run is complete
        compute_cleanup()
        return
    epochs, cropped = announce(settings, model, data, plan, num_iterations, why)
    fade_tables(optimizer, settings.table_decay, epochs, num_iterations)
    if settings.mup:
        claimed.meta["mup"] = mup.as_records(GPT, config, settings.use_muon, init_spec(settings))
        print0(mup.format_table(claimed.meta["mup"]))
    print0(f"learning rates x {lr_scale:.3f}, for this batch and horizon")

    # ---- train
    evaluations = make_evaluations(settings, model, forward, data, num_iterations, anew=not claimed.earlier)
    rows, state = data.rows(settings.max_seq_len, settings.seed), claimed.earlier.get("loader")
    loader = RowLoader(rows, plan.rows_per_step, plan.device_batch_size, device, rank, world_size, state)
    run = TrainingRun(
        **vars(claimed),
        forward=forward,
        loader=loader,
        tokens_per_step=settings.total_batch_size,
        schedule=make_schedule(num_iterations, settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac),
        grad_clip=settings.grad_clip,
        evaluations=evaluations,
        prepare=grow_windows,
        monitor=Monitor(model, optimizer, watched) if watched is not None else Observer(),
        observer=ClusterObserver(),
        warm_kernels=warm_kernels if settings.warm_kernels else lambda run: None,
        flops_per_token=model.estimate_flops(),
        memory_advice=memory_advice(model, policy, batch_of(settings), plan.device_batch_size),
        wandb_project=wandb_project(settings.arch, settings.mup),
    )
    outcome = train(run)
    if outcome.finished:
        wanted = tokenizer is not None and settings.sample_every > 0
        said = final_samples(run, lambda: samples(model, tokenizer)) if wanted else []
        metrics = {"cropped share": cropped, **outcome.metrics}
        finish(run, "base_train", "Base model training", describe(run, metrics, said))
    compute_cleanup()


def describe(run: TrainingRun, final: dict[str, Any], samples: list[dict[str, str]]) -> dict[str, Any]:
    """The report's section."""
    metrics = {
        "parameters": run.model.num_params(),
        "FLOPs per token": run.model.estimate_flops(),
        "epochs": run.loader.epoch(),
        **final,
    }
    tables = []
    if records := run.meta.get("mup"):
        rows = [list(record.values()) for record in records]
        tables = [{"title": "Scaling with width", "columns": list(records[0]), "rows": rows}]
    shown = {**run.meta["settings"], **run.meta["model_config"]}
    return {"settings": shown, "metrics": metrics, "tables": tables, "samples": samples}


if __name__ == "__main__":
    cli.run(main, Settings)
