"""Pretrain a base model on packed text.

    python -m scripts.base_train --depth=12
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth=20 --run=d20

One dial, --depth, sizes the model; width, heads, horizon and learning rates follow from it and are printed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch

from nanochat import checkpoint, parallel
from nanochat import settings as settings_module
from nanochat.batching import BatchPlan, plan_batch
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TrainLoader, fixed_rows, horizon_in_epochs, row_batches
from nanochat.dataset import canonical
from nanochat.errors import UserError
from nanochat.eval_bundle import load_bundle
from nanochat.gpt import GPT, GPTConfig, Init
from nanochat.loss_eval import evaluate_bpb
from nanochat.parallel import Parallel
from nanochat.paths import checkpoint_dir, eval_bundle_dir
from nanochat.report import write_section
from nanochat.run_folder import Resume, describe_run, earlier_run
from nanochat.runtime import (
    DeviceType,
    compute_cleanup,
    compute_dtype,
    compute_init,
    device_name,
    print0,
)
from nanochat.samples import make_samples
from nanochat.schedule import batch_lr_scale, lr_multiplier, muon_momentum
from nanochat.settings import real, whole
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer
from nanochat.tracking import NO_WANDB, Tracker
from nanochat.trainer import Evaluation, Outcome, TrainingRun, resume, train


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Pretrain a base model."""

    # ---- the model
    depth: Annotated[int, whole(gte=1, lte=128)] = 20
    """Transformer layers; the one dial."""
    aspect_ratio: Annotated[int, whole(gte=1)] = 64
    """Width per layer: n_embd = depth x aspect_ratio, rounded up to a multiple of head_dim."""
    head_dim: Annotated[int, whole(gte=2)] = 128
    """Width of one attention head."""
    max_seq_len: Annotated[int, whole(gte=1)] = 2048
    """Tokens in a training row."""
    window_pattern: str = "L"
    """Attention window of each layer, tiled: L = all of the past, S = a quarter of the row (SSSL, for example)."""
    init: Init = "uniform"
    """How matrices are drawn: uniform, or spectral = 1/sqrt(fan_in) x min(1, sqrt(fan_out/fan_in))."""
    seed: Annotated[int, whole(gte=0)] = 42
    """Seed of the initial weights and the order of the data."""

    # ---- the data
    source: str = "fineweb-edu"
    """Text: fineweb-edu, climbmix, pydocs or local:DIR, as fetched by nanochat.dataset."""

    # ---- the horizon, in this order of precedence
    num_iterations: Annotated[int, whole(gte=-1)] = -1
    """Optimizer steps; -1: from target_flops or target_param_data_ratio."""
    target_flops: Annotated[float, real(gte=-1)] = -1.0
    """FLOPs to spend; -1: from target_param_data_ratio."""
    target_param_data_ratio: Annotated[float, real(gte=-1)] = 20.0
    """Training tokens per parameter."""

    # ---- the batch
    device_batch_size: Annotated[int, whole(gte=1)] = 32
    """Rows per forward pass on each device, at most; lower it when memory runs out, the result stays the same."""
    total_batch_size: Annotated[int, whole(gte=1)] = 524_288
    """Tokens per optimizer step over all devices, a multiple of max_seq_len."""

    # ---- the optimizer
    matrix_lr: Annotated[float, real(gte=0)] = 0.02
    """Muon learning rate of the matrices, for the classic d20 run; all rates follow batch and horizon from there."""
    embedding_lr: Annotated[float, real(gte=0)] = 0.2
    """AdamW learning rate of the embedding at width 768; goes with width^-0.5."""
    unembedding_lr: Annotated[float, real(gte=0)] = 0.004
    """AdamW learning rate of the head at width 768; goes with width^-0.5."""
    use_muon: bool = True
    """False: AdamW for the matrices too, at matrix_lr x 0.05 x 768/width."""
    weight_decay: Annotated[float, real(gte=0)] = 0.0
    """Cautious weight decay of the matrices, times their learning rate."""
    grad_clip: Annotated[float, real(gte=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    warmup_ratio: Annotated[float, real(gte=0, lte=1)] = 0.0
    """Share of the steps over which the learning rate rises."""
    warmdown_ratio: Annotated[float, real(gte=0, lte=1)] = 0.2
    """Share of the steps over which it falls at the end."""
    final_lr_frac: Annotated[float, real(gte=0, lte=1)] = 0.0
    """Where it falls to, as a share of the full rate."""

    # ---- watching it
    run: str = NO_WANDB
    """Name of the run in Weights & Biases; dummy: no W&B."""
    eval_every: Annotated[int, whole(gte=-1)] = 250
    """Steps between measurements of validation bits per byte; -1: only at the end."""
    eval_tokens: Annotated[int, whole(gte=1)] = 10_485_760
    """Validation tokens measured, at most."""
    core_metric_every: Annotated[int, whole(gte=-1)] = 2000
    """Steps between CORE evaluations; -1: never. Also at the end."""
    core_metric_max_per_task: Annotated[int, whole(gte=-1)] = 500
    """Items per CORE task in these; -1: all."""
    sample_every: Annotated[int, whole(gte=-1)] = 2000
    """Steps between samples from fixed prompts; -1: never. Also at the end."""

    # ---- checkpoints
    save_every: Annotated[int, whole(gte=-1)] = 1000
    """Steps between checkpoints; -1: only the last."""
    resume: Resume = "never"
    """auto: continue the run of this tag where it stopped, if its settings are the same."""
    keep_last: Annotated[int, whole(gte=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, whole(gte=-1)] = -1
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
    compile: bool | None = None
    """torch.compile; default: on CUDA only (on a CPU compiling takes longer than a small run)."""


INHERITED = ("source", "max_seq_len", "device_batch_size", "total_batch_size")  # by later stages, beside the rates


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    """Everything that follows from the depth."""
    heads = -(-settings.depth * settings.aspect_ratio // settings.head_dim)
    return GPTConfig(
        sequence_len=settings.max_seq_len,
        vocab_size=vocab_size,
        n_layer=settings.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * settings.head_dim,
        window_pattern=settings.window_pattern,
    )


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
    tokenizer: RustBPETokenizer,
    rank: int,
    world_size: int,
    samples: list[dict[str, str]],
) -> list[Evaluation]:
    """What is measured on the way: bits per byte, CORE, and samples, which are left in `samples`."""
    device, length = model.get_device(), settings.max_seq_len
    token_bytes = get_token_bytes(device)
    val = fixed_rows(tokenizer, settings.source, "val", length, max(settings.eval_tokens, length))
    # read here, so that a bundle that is missing shows now and not at the end of the run
    bundle = load_bundle(eval_bundle_dir()) if settings.core_metric_every > 0 else None

    def val_bpb(step: int) -> dict[str, float]:
        batches = row_batches(val, settings.device_batch_size, device, rank, world_size)
        return {"Loss/val_bpb": evaluate_bpb(forward, batches, token_bytes)}

    def core(step: int) -> dict[str, float]:
        assert bundle is not None, "never due without an interval"
        with torch.compiler.set_stance("force_eager"):  # prompts of many shapes: not to be compiled for each
            result = evaluate_core(
                model,
                tokenizer,
                bundle,
                device,
                sequence_len=length,
                device_batch_size=max(1, settings.device_batch_size // 4),
                max_per_task=settings.core_metric_max_per_task,
            )
        return {f"Eval/{result.name}": result.core}

    def show_samples(step: int) -> dict[str, float]:
        if rank == 0:
            with torch.compiler.set_stance("force_eager"):
                samples[:] = make_samples(model, tokenizer)
            for sample in samples:
                print0(f"--- {sample['text']}")
        return {}

    return [
        Evaluation(settings.eval_every, True, val_bpb),
        Evaluation(settings.core_metric_every, settings.core_metric_every > 0, core),
        Evaluation(settings.sample_every, settings.sample_every > 0, show_samples),
    ]


def announce(
    settings: Settings,
    model: GPT,
    tokenizer: RustBPETokenizer,
    world_size: int,
    plan: BatchPlan,
    num_iterations: int,
    why: str,
    compiled: bool,
) -> None:
    """Everything that was derived from the settings, before anything is spent."""
    horizon = num_iterations * settings.total_batch_size
    print0(f"{device_name(model.get_device())} x {world_size}, compute in {model.compute_dtype}, compiled: {compiled}")
    print0(f"{model.config}")
    print0(f"{model.num_params():,} parameters, {model.estimate_flops():.4e} FLOPs per token")
    print0(f"{num_iterations:,} steps of {settings.total_batch_size:,} tokens = {horizon:,} tokens ({why})")
    if plan.note:
        print0(f"note: {plan.note}")
    epochs, cropped = horizon_in_epochs(tokenizer, settings.source, settings.max_seq_len, horizon, plan.rows_per_step)
    print0(f"data: {settings.source}, {epochs:.2f} epochs, {100 * cropped:.1f} % of tokens cropped by packing")
    if epochs > 1:
        print0(f"warning: too little data: this horizon repeats it {epochs:.1f} times; get more of it, or train less")


def main(settings: Settings) -> None:
    settings = settings_module.replace(settings, source=canonical(settings.source))
    _, rank, _, world_size, device = compute_init(settings.device_type)
    tokenizer = get_tokenizer()
    plan = plan_batch(settings.total_batch_size, settings.device_batch_size, settings.max_seq_len, world_size)

    # ---- the model: shapes first (an impossible horizon costs no memory), memory second, values last
    config = model_config(settings, tokenizer.get_vocab_size())
    with torch.device("meta"):
        model = GPT(config, compute_dtype(device))
    num_iterations, why = plan_horizon(settings, model.num_params(), model.estimate_flops())
    policy = parallel.spread(model, parallel.asked(settings.parallel, settings.use_fsdp), device)
    model.to_empty(device=device)
    parallel.init_weights(model, settings.init, settings.seed)
    compiled = settings.compile if settings.compile is not None else device.type == "cuda"
    forward = parallel.compile_model(model, policy) if compiled else model
    announce(settings, model, tokenizer, world_size, plan, num_iterations, why, compiled)

    # ---- the optimizer; its rates and the batch are what later stages go on with
    lr_scale = batch_lr_scale(settings.total_batch_size, num_iterations * settings.total_batch_size)
    print0(f"learning rates x {lr_scale:.3f}, for this batch and horizon")
    rates = {
        "matrix_lr": settings.matrix_lr * lr_scale,
        "embedding_lr": settings.embedding_lr * lr_scale,
        "unembedding_lr": settings.unembedding_lr * lr_scale,
        "weight_decay": settings.weight_decay,
    }
    optimizer = model.setup_optimizer(**rates, use_muon=settings.use_muon)

    def schedule(step: int) -> tuple[float, float]:
        ratios = settings.warmup_ratio, settings.warmdown_ratio, settings.final_lr_frac
        return lr_multiplier(step, num_iterations, *ratios), muon_momentum(step)

    # ---- where it goes, and whether some of it is there already
    recipe = {**{name: getattr(settings, name) for name in INHERITED}, **rates}
    meta = describe_run("base", settings_module.as_dict(settings), config, tokenizer.hash, recipe, num_iterations)
    folder = checkpoint_dir("base", settings.model_tag or f"d{settings.depth}")
    earlier = earlier_run(folder, settings.resume, meta) or {}
    loader = TrainLoader(
        tokenizer,
        settings.source,
        rows_per_step=plan.rows_per_step,
        sequence_len=settings.max_seq_len,
        device_batch_size=settings.device_batch_size,
        device=device,
        rank=rank,
        world_size=world_size,
        seed=settings.seed,
        state=earlier.get("loader"),
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
        grad_clip=settings.grad_clip,
        save_every=settings.save_every,
        evaluations=make_evaluations(settings, model, forward, tokenizer, rank, world_size, samples),
        tracker=Tracker("base", settings.run, meta, earlier.get("step"), earlier.get("wandb_id")),
        meta=meta,
        policy=policy,
        keep_last=settings.keep_last,
        keep_every=settings.keep_every,
        flops_per_token=model.estimate_flops(),
    )
    if earlier:
        resume(run, earlier)
    outcome = train(run)
    run.tracker.close()
    if outcome.finished:
        write_report(run, outcome, samples, loader)
        checkpoint.mark_complete(folder)
    compute_cleanup()


def write_report(run: TrainingRun, outcome: Outcome, samples: list[dict[str, str]], loader: TrainLoader) -> None:
    """The section of this stage."""
    figures = {
        "parameters": run.model.num_params(),
        "FLOPs per token": run.model.estimate_flops(),
        "device": device_name(run.model.get_device()),
        "ranks": run.meta["world_size"],
        "epochs": loader.epoch(),
        "cropped share": loader.packer.cropped_share(),
        **outcome.metrics,
    }
    notes = [
        "FLOPs per token = 6 x matmul parameters (head counted, embedding not) + 12 x heads x head_dim x attention "
        "span per layer, causal attention not halved; MFU is over the card's dense bf16 peak."
    ]
    settings = {**run.meta["settings"], **run.meta["model_config"]}
    section = {"settings": settings, "metrics": figures, "samples": samples, "notes": notes}
    write_section("base_train", "Base model training", section)


if __name__ == "__main__":
    settings_module.run(main, Settings)
