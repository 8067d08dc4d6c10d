"""Pretrain a base model on packed text.

    python -m scripts.base_train --depth=12
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth=20 --run=d20

One dial, --depth, sizes the model; width, heads, horizon and learning rates follow from it and are printed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from nanochat import checkpoint, cli, mup, parallel
from nanochat.cli import alias, float_flag, int_flag
from nanochat.cluster.observer import ClusterObserver
from nanochat.config import LEARNING_RATES, TUNED_AT, ArchFlags, build_config, init_spec, resolve
from nanochat.dataloader import BatchPlan, RowLoader, TrainData, open_data, plan_batch, row_batches
from nanochat.dataset import source_flag
from nanochat.errors import UserError
from nanochat.eval.bpb import VAL_BPB, VAL_LOSS, evaluate_bpb, evaluate_loss
from nanochat.eval.bundle import load_bundle
from nanochat.eval.core import evaluate_core
from nanochat.eval.samples import make_samples
from nanochat.fp8 import Fp8, apply_fp8
from nanochat.gpt import GPT
from nanochat.hardware import device_name
from nanochat.optim.schedule import batch_lr_scale, lr_multiplier, muon_momentum, window_length
from nanochat.parallel import Parallel
from nanochat.paths import checkpoint_dir, eval_bundle_dir
from nanochat.runtime import DeviceType, compute_cleanup, compute_dtype, compute_init, print0
from nanochat.sections import write_section
from nanochat.tokenizer import get_token_bytes
from nanochat.train.coordinates import CoordRecorder
from nanochat.train.loop import Evaluation, Outcome, TrainingRun, resume, train
from nanochat.train.monitor import Monitor, monitor_settings
from nanochat.train.run_folder import Resume, describe_run, earlier_run
from nanochat.train.run_log import RunLog, free_name, run_name
from nanochat.train.tracking import AUTO, NO_WANDB, Tracker, wandb_project


@dataclass(frozen=True, kw_only=True)
class Settings(ArchFlags):
    """Pretrain a base model."""

    # ---- the data
    source: Annotated[str, source_flag("bin:DIR, token files, or text as fetched by nanochat.dataset")] = "fineweb-edu"

    # ---- the horizon, in this order of precedence
    num_iterations: Annotated[int, int_flag(gte=-1), alias("--iterations")] = -1
    """Optimizer steps; -1: from target_flops or target_param_data_ratio."""
    target_flops: Annotated[float, float_flag(gte=-1)] = -1.0
    """FLOPs to spend; -1: from target_param_data_ratio."""
    target_param_data_ratio: Annotated[float, float_flag(gte=-1)] = 20.0
    """Training tokens per parameter."""

    # ---- the batch
    device_batch_size: Annotated[int, int_flag(gte=1)] = 32
    """Rows per forward pass on each device, at most; lower it when memory runs out, the result stays the same."""
    total_batch_size: Annotated[int, int_flag(gte=1)] = 524_288
    """Tokens per optimizer step over all devices, a multiple of max_seq_len."""

    # ---- watching it
    run: str = NO_WANDB
    """Name of the run in Weights & Biases and under logs/; auto: made from architecture, time and width; dummy: such a
    name too, but no W&B."""
    eval_every: Annotated[int, int_flag(gte=-1)] = 250
    """Steps between measurements of validation bits per byte; -1: only at the end."""
    eval_tokens: Annotated[int, int_flag(gte=1)] = 10_485_760
    """Validation tokens measured, at most."""
    core_metric_every: Annotated[int, int_flag(gte=-1)] = 2000
    """Steps between CORE evaluations; -1: never. Also at the end."""
    core_metric_max_per_task: Annotated[int, int_flag(gte=-1)] = 500
    """Items per CORE task in these; -1: all."""
    sample_every: Annotated[int, int_flag(gte=-1)] = 2000
    """Steps between samples from fixed prompts; -1: never. Also at the end."""

    monitor_interval: str = "0"
    """Steps between looks inside (norms, spectral norms, activations): a number, production (100), research (10) or
    validation (1); 0: never."""
    coord_check: bool = False
    """Record the size of each module's output into logs/<run>/coord_check.jsonl, for scripts.coord_check --from."""
    coord_check_every: Annotated[int, int_flag(gte=1)] = 10
    """Steps between these."""

    # ---- checkpoints
    save_every: Annotated[int, int_flag(gte=-1)] = 1000
    """Steps between checkpoints; -1: only the last."""
    resume: Resume = "never"
    """auto: continue the run of this tag where it stopped, if its settings are the same."""
    keep_last: Annotated[int, int_flag(gte=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, int_flag(gte=-1)] = -1
    """Keep also the checkpoints of steps that are multiples of this; -1: none."""
    model_tag: str | None = None
    """Name of the checkpoint folder; default d<depth>."""

    # ---- the machines
    parallel: Parallel = "auto"
    """ddp: all weights on every GPU; fsdp: cut over all GPUs; hsdp: cut within each node; auto: by size and nodes."""
    use_fsdp: bool = False
    """The same as --parallel=fsdp."""
    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""
    fp8: Fp8 = "none"
    """Train in 8-bit floating point: none, head (the output matrix), or all (also the matrices of the blocks)."""
    warm_kernels: bool = False
    """Compile and tune before the first timed step, on made-up tokens; nothing else changes."""
    compile: bool | None = None
    """torch.compile; default: on CUDA only (on a CPU compiling takes longer than a small run)."""


# Of a row that coordinates are recorded on: attention is not compiled there, and takes T x T memory.
COORD_TOKENS = 1024
# What later stages go on with, beside the rates.
INHERITED = ("source", "max_seq_len", "device_batch_size", "total_batch_size", "weight_decay", "use_muon")


def default_tag(settings: Settings) -> str:
    """Of the classic architecture d<depth>, as ever; of others what tells them apart."""
    if settings.arch == "nanochat" and settings.width is None and not settings.mup:
        return f"d{settings.depth}"
    width = f"_w{settings.width}" if settings.width is not None else ""
    base = f"_base{settings.base_width}" if settings.mup else ""
    return f"{settings.arch}_d{settings.depth}{width}{'_mup' if settings.mup else ''}{base}"


def plan_horizon(settings: Settings, num_params: int, flops_per_token: float) -> tuple[int, str]:
    """(optimizer steps, why). Raises UserError when no horizon is given or it is shorter than one step."""
    batch = settings.total_batch_size
    if settings.num_iterations > 0:
        return settings.num_iterations, "--num-iterations"
    if settings.target_flops > 0:
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


def make_evaluations(
    settings: Settings,
    model: GPT,
    forward: Callable[..., torch.Tensor],
    data: TrainData,
    rank: int,
    world_size: int,
    samples: list[dict[str, str]],
    coordinates: Path,
) -> list[Evaluation]:
    """What is measured on the way: bits per byte (loss per token, where the data's tokenizer is not at hand), CORE,
    samples, which are left in `samples`, and coordinates, into a file."""
    device, length = model.get_device(), settings.max_seq_len
    token_bytes = get_token_bytes(device) if data.tokenizer is not None else None
    val = data.fixed_rows("val", length, max(settings.eval_tokens, length))
    tokenizer, speaks = data.tokenizer, data.tokenizer is not None
    core_every, sample_every = (n if speaks else -1 for n in (settings.core_metric_every, settings.sample_every))
    # read here, so that a bundle that is missing shows now and not at the end of the run
    bundle = load_bundle(eval_bundle_dir()) if core_every > 0 else None
    few = torch.from_numpy(val[:1, :COORD_TOKENS].astype(np.int64)).to(device)
    recorder = CoordRecorder(model, coordinates, few)

    def val_loss(step: int) -> dict[str, float]:
        batches = row_batches(val, settings.device_batch_size, device, rank, world_size)
        if token_bytes is None:
            return {VAL_LOSS: evaluate_loss(forward, batches, data.vocab_size, device)}
        return {VAL_BPB: evaluate_bpb(forward, batches, token_bytes)}

    def core(step: int) -> dict[str, float]:
        assert bundle is not None and tokenizer is not None, "never due without an interval"
        with parallel.disable_compile(model):  # prompts of many shapes: not to be compiled for each
            result = evaluate_core(
                model,
                tokenizer,
                bundle,
                device,
                sequence_len=length,
                device_batch_size=max(1, settings.device_batch_size // 4),
                max_per_task=settings.core_metric_max_per_task,
            )
        return {f"Eval/{result.name}": result.value}

    def show_samples(step: int) -> dict[str, float]:
        if rank == 0 and tokenizer is not None:
            with parallel.disable_compile(model):
                samples[:] = make_samples(model, tokenizer)
            for sample in samples:
                print0(f"--- {sample['text']}")
        return {}

    return [
        Evaluation(settings.eval_every, True, val_loss),
        Evaluation(core_every, core_every > 0, core),
        Evaluation(sample_every, sample_every > 0, show_samples),
        Evaluation(settings.coord_check_every if settings.coord_check else -1, settings.coord_check, recorder.record),
    ]


def announce(
    settings: Settings,
    model: GPT,
    data: TrainData,
    world_size: int,
    plan: BatchPlan,
    num_iterations: int,
    why: str,
    compiled: bool,
    records: list[dict[str, Any]] | None,
) -> None:
    """Everything that was derived from the settings, before anything is spent."""
    horizon = num_iterations * settings.total_batch_size
    compiling = "compiled: the first step takes a minute or more" if compiled else "not compiled"
    print0(f"{device_name(model.get_device())} x {world_size}, compute in {model.compute_dtype}, {compiling}")
    print0(f"{model.config}")
    print0(f"{model.num_params():,} parameters, {model.estimate_flops():.4e} FLOPs per token")
    print0(f"{num_iterations:,} steps of {settings.total_batch_size:,} tokens = {horizon:,} tokens ({why})")
    if plan.note:
        print0(f"note: {plan.note}")
    epochs, cropped = data.horizon_in_epochs(settings.max_seq_len, horizon, plan.rows_per_step)
    print0(f"data: {data.source}, {epochs:.2f} epochs, {100 * cropped:.1f} % of tokens cropped by packing")
    if epochs > 1:
        print0(f"warning: too little data: this horizon repeats it {epochs:.1f} times; get more of it, or train less")
    if records:
        print0(mup.format_table(records))


def main(settings: Settings) -> None:
    settings = resolve(settings)
    _, rank, _, world_size, device = compute_init(settings.device_type)
    watched = monitor_settings(settings.monitor_interval)
    data = open_data(settings.source)
    settings = cli.replace(settings, source=data.source)
    plan = plan_batch(settings.total_batch_size, settings.device_batch_size, settings.max_seq_len, world_size)

    # ---- the model: shapes first (an impossible horizon costs no memory), memory second, values last
    config = build_config(settings, data.vocab_size, data.document_token)
    with torch.device("meta"):
        model = GPT(config, compute_dtype(device))
    num_iterations, why = plan_horizon(settings, model.num_params(), model.estimate_flops())
    requested = parallel.requested_strategy(settings.parallel, settings.use_fsdp)
    policy = parallel.parallelize_model(model, requested, device)
    model.to_empty(device=device)
    model.init_weights(init_spec(settings))
    apply_fp8(model, settings.fp8)
    compiled = settings.compile if settings.compile is not None else device.type == "cuda"
    forward = parallel.compile_model(model, policy) if compiled else model

    # ---- the optimizer; its rates and the batch are what later stages go on with
    horizon = num_iterations * settings.total_batch_size
    lr_scale = batch_lr_scale(settings.total_batch_size, horizon, *TUNED_AT[settings.arch])
    rates = {name: getattr(settings, name) * lr_scale for name in LEARNING_RATES}
    optimizer = model.setup_optimizer(**rates, weight_decay=settings.weight_decay, use_muon=settings.use_muon)

    def schedule(step: int) -> tuple[float, float]:
        ratios = settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac
        return lr_multiplier(step, num_iterations, *ratios), muon_momentum(step)

    def grow_windows(step: int) -> None:
        if settings.window_warmup:
            model.set_window(window_length(step, num_iterations, config.long_window))

    # ---- where it goes, and whether some of it is there already
    recipe = {**{name: getattr(settings, name) for name in INHERITED}, **rates}
    about = cli.as_dict(settings)
    meta = describe_run("base", about, config, data.tokenizer_hash, recipe, num_iterations, data=data.fingerprint)
    folder = checkpoint_dir("base", settings.model_tag or default_tag(settings))
    usual = cli.as_dict(resolve(Settings()))  # flags that runs of older versions did not have yet
    earlier = earlier_run(folder, settings.resume, meta, usual) or {}
    given = settings.run not in (NO_WANDB, AUTO)
    automatic = run_name(settings.arch, config.n_embd, config.mup_base_width, datetime.now())
    if settings.mup:
        meta["mup"] = mup.as_records(GPT, config, settings.use_muon, init_spec(settings))
    meta["run_name"] = name = earlier.get("run_name") or free_name(settings.run if given else automatic)
    with RunLog(name, meta, earlier.get("step")) as log:
        print0(f"run {name}: {log.folder}")
        announce(settings, model, data, world_size, plan, num_iterations, why, compiled, meta.get("mup"))
        print0(f"learning rates x {lr_scale:.3f}, for this batch and horizon")
        rows, state = data.rows(settings.max_seq_len, settings.seed), earlier.get("loader")
        loader = RowLoader(rows, plan.rows_per_step, plan.device_batch_size, device, rank, world_size, state)
        tracker = Tracker(
            "base",
            name if settings.run == AUTO else settings.run,
            meta,
            earlier.get("step"),
            earlier.get("wandb_id"),
            project=wandb_project(settings.arch, settings.mup),
            log=log,
        )

        # ---- train
        samples: list[dict[str, str]] = []
        run = TrainingRun(
            stage="base",
            folder=folder,
            model=model,
            forward=forward,
            optimizer=optimizer,
            loader=loader,
            num_iterations=num_iterations,
            tokens_per_step=settings.total_batch_size,
            schedule=schedule,
            prepare=grow_windows,
            grad_clip=settings.grad_clip,
            save_every=settings.save_every,
            evaluations=make_evaluations(
                settings, model, forward, data, rank, world_size, samples, log.folder / "coord_check.jsonl"
            ),
            tracker=tracker,
            meta=meta,
            policy=policy,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            flops_per_token=model.estimate_flops(),
            monitor=Monitor(model, optimizer, watched) if watched is not None else None,
            warm_kernels=settings.warm_kernels,
            observer=ClusterObserver(),
        )
        if earlier:
            resume(run, earlier)
        outcome = train(run)
        run.tracker.close()
        if outcome.finished:
            write_report(run, outcome, samples, rows.cropped_share())
            checkpoint.mark_complete(folder)
    compute_cleanup()


def write_report(run: TrainingRun, outcome: Outcome, samples: list[dict[str, str]], cropped: float) -> None:
    """The section of this stage."""
    figures = {
        "parameters": run.model.num_params(),
        "FLOPs per token": run.model.estimate_flops(),
        "device": device_name(run.model.get_device()),
        "ranks": run.meta["world_size"],
        "epochs": run.loader.epoch(),
        "cropped share": cropped,
        **outcome.metrics,
    }
    notes = [
        "FLOPs per token = 6 x matmul parameters (head counted, embedding not) + 12 x heads x head_dim x attention "
        "span per layer, causal attention not halved; MFU is over the card's dense bf16 peak."
    ]
    shown = {**run.meta["settings"], **run.meta["model_config"]}
    section: dict[str, Any] = {"settings": shown, "metrics": figures, "samples": samples, "notes": notes}
    if records := run.meta.get("mup"):
        rows = [list(record.values()) for record in records]
        section["tables"] = [{"title": "Scaling with width", "columns": list(records[0]), "rows": rows}]
    write_section("base_train", "Base model training", section)


if __name__ == "__main__":
    cli.run(main, Settings)
