"""Flags that several programs share. Nothing here imports torch: see cli.program."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat.cli import alias, count_flag, float_flag, int_flag, seed_flag

DeviceType = Literal["auto", "cpu", "cuda", "mps"]
Fp8 = Literal["none", "head", "all"]
LossOn = Literal["assistant", "all"]
Packing = Literal["bestfit", "stream"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]
Resume = Literal["never", "auto"]
Stage = Literal["base", "mid", "sft", "rl"]  # whose checkpoints there are
NO_WANDB = "dummy"


@dataclass(frozen=True, kw_only=True)
class DeviceFlags:
    """What every script that computes is asked."""

    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""


@dataclass(frozen=True, kw_only=True)
class CodeFlags:
    """Of scripts that may run code which a model wrote."""

    unsafe_exec: bool = False
    """Run code that the model wrote even where the kernel cannot keep it from your files or network; the same as
    NANOCHAT_ALLOW_UNSAFE_CODE=1."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which checkpoint is read."""

    stage: Annotated[Stage, alias("-i")] = "sft"
    """Training stage of the checkpoint."""
    model_tag: Annotated[str | None, alias("-g")] = None
    """Name of the run among the stage's checkpoints; default: the newest."""
    model_step: Annotated[int | None, int_flag(gte=0), alias("-s")] = None
    """Optimizer step of the checkpoint; default: the last."""


@dataclass(frozen=True, kw_only=True)
class RunFlags(DeviceFlags):
    """Flags of every training run."""

    run: str = NO_WANDB
    """Name of the run in Weights & Biases; dummy: no W&B."""
    save_every: Annotated[int, int_flag(gte=-1)] = 1000
    """Steps between checkpoints; -1: only the last."""
    keep_last: Annotated[int, int_flag(gte=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, int_flag(gte=-1)] = -1
    """Keep also the checkpoints of steps that are multiples of this; -1: none."""
    resume: Resume = "never"
    """auto: continue the run of this tag where it stopped, if its settings are the same."""
    parallel: Parallel = "auto"
    """ddp: all weights on every GPU; fsdp: sharded over all GPUs; hsdp: sharded within each node; auto: by size and
    nodes."""
    use_fsdp: bool = False
    """The same as --parallel=fsdp."""


@dataclass(frozen=True, kw_only=True)
class ParentFlags(RunFlags):
    """Flags of runs that start from the model of an earlier stage."""

    model_tag: str | None = None
    """Run to start from, and to write to; default: the newest run of the stage before."""
    model_step: Annotated[int | None, int_flag(gte=0)] = None
    """Step of its checkpoint; default: the last."""
    out_tag: str | None = None
    """Another name for what is written."""
    num_epochs: Annotated[float, float_flag(gte=0)] = 1.0
    """Passes over the conversations or questions."""
    num_iterations: Annotated[int, count_flag()] = -1
    """Optimizer steps; -1: from num_epochs."""
    init_lr_frac: Annotated[float, float_flag(gte=0)] = 1.0
    """Factor on all learning rates."""
    grad_clip: Annotated[float, float_flag(gte=0)] = 1.0
    """Largest global gradient norm; 0: no clipping."""
    warmdown_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.5
    """Share of the steps over which the learning rates fall at the end."""
    seed: Annotated[int, seed_flag()] = 42
    """Seed of the order of the data, and of answers that are sampled."""


@dataclass(frozen=True, kw_only=True)
class ChatTrainSettings(ParentFlags):
    """Train a model further on conversations."""

    # ---- the data
    tasks: str = "SmolTalk"
    """Tasks to train on: Name[:first items][*repeats], joined by commas; a file.jsonl is a task of its own."""
    packing: Packing = "bestfit"
    """bestfit: whole conversations, rows padded; stream: one flat stream, cut anywhere."""
    loss_on: LossOn = "assistant"
    """assistant: train on what the assistant says; all: on every token."""

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
    warmup_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.0
    """Share of the steps over which the learning rates rise at the start."""
    final_lr_frac: Annotated[float, float_flag(gte=0, lte=1)] = 0.0
    """What the learning rates fall to, as a share of the full ones."""

    # ---- watching it
    eval_every: Annotated[int, int_flag(gte=-1)] = 150
    """Steps between measurements of bits per byte on held-out conversations; -1: only at the end."""
    eval_tokens: Annotated[int, int_flag(gte=1)] = 2_097_152
    """Positions measured, at most."""
    compile: bool | None = None
    """torch.compile; default: on CUDA only."""
