"""Speed of the training step on one device, by attention kernel, on random tokens (no data loading).

    python -m benchmarks.train_speed --depth=12 --device-batch-size=32 --out=speed.json
    python -m benchmarks.train_speed --arch=speedrun --vocab-size=50304 --max-seq-len=49152 --device-batch-size=1
    python -m benchmarks.train_speed ... --accumulation=8      the record's step of 393,216 tokens on one GPU

One step = forward and backward of so many device batches, and the optimizer. Medians; the first steps, which compile,
are left out. MFU counts attention too; matmul_mfu leaves it out, as what is published of the speedrun does.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.measure import Step, about, speed
from benchmarks.output import Output, write_json
from nanochat import attention, cli, parallel
from nanochat.cli import int_flag
from nanochat.config import Arch, build_config, resolve
from nanochat.fp8 import Fp8, apply_fp8
from nanochat.gpt import GPT
from nanochat.runtime import compute_dtype, compute_init
from scripts.base_train import Settings as TrainSettings

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FP8: tuple[Fp8, ...] = ("none", "head", "all")
WARM_UP = 3
DOCUMENT_TOKENS = 690  # between starts of documents: the mean of FineWeb's


@dataclass(frozen=True, kw_only=True)
class Settings(Output):
    """Measure the training step."""

    depth: Annotated[int, int_flag(gte=1)] = 12
    """Layers of the model."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 32
    """Rows per step."""
    max_seq_len: Annotated[int, int_flag(gte=1)] = 2048
    """Tokens per row."""
    arch: Arch = "nanochat"
    """nanochat: each attention kernel; speedrun: FlexAttention, with the head in bf16 and in 8 bits."""
    vocab_size: Annotated[int, int_flag(gte=1)] = 32768
    """Vocabulary."""
    accumulation: Annotated[int, int_flag(gte=1)] = 1
    """Device batches per step."""
    steps: Annotated[int, int_flag(gte=1)] = 10
    """Timed steps."""
    profile: bool = False
    """Print the kernels that take the time, too."""


def measure(settings: Settings, device: torch.device, fp8: Fp8 = "none") -> dict[str, Any]:
    """One variant, with the attention kernels as they are set now."""
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    train = resolve(TrainSettings(arch=settings.arch, depth=settings.depth, max_seq_len=settings.max_seq_len))
    model = GPT(build_config(train, settings.vocab_size, document_token=0), compute_dtype(device)).to(device)
    model.init_weights()
    apply_fp8(model, fp8)
    idx = torch.randint(1, settings.vocab_size, (settings.device_batch_size, settings.max_seq_len + 1), device=device)
    idx[:, ::DOCUMENT_TOKENS] = 0
    step = Step(
        model,
        parallel.Policy("ddp", model.compute_dtype),
        model.setup_optimizer(),
        inputs=idx[:, :-1].contiguous(),
        targets=idx[:, 1:].contiguous(),
        micro_batches=settings.accumulation,
        max_norm=train.grad_clip or None,
    )
    result = speed(step, WARM_UP, settings.steps, settings.profile)
    return result | {"milliseconds_per_batch": result["milliseconds"] / settings.accumulation}


def main(settings: Settings) -> None:
    *_, device = compute_init("cuda")
    usual = attention.GPU_KERNELS
    results = {}
    if settings.arch == "nanochat":
        for name, kernel in KERNELS.items():
            attention.GPU_KERNELS = [kernel, *(other for other in usual if other is not kernel)]
            results[name] = measure(settings, device)
    else:
        results = {f"fp8={fp8}": measure(settings, device, fp8) for fp8 in FP8}
    report = about(settings, device) | {"results": results}
    print(f"{report['device']}, torch {report['torch']}")
    print(f"{'':<10} {'ms a step':>10} {'tokens/s':>10} {'MFU':>7} {'matmuls':>7} {'peak GiB':>9}")
    for name, row in results.items():
        shares = [f"{100 * row[share]:6.1f}%" if row[share] else f"{'-':>7}" for share in ("mfu", "matmul_mfu")]
        figures = f"{row['milliseconds']:10.1f} {row['tokens_per_second']:10,.0f} {' '.join(shares)}"
        print(f"{name:<10} {figures} {row['peak_gib']:9.1f}")
    write_json(settings, report)


if __name__ == "__main__":
    cli.run(main, Settings)
