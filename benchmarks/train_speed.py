"""Speed of the training step on one device, by attention kernel, on random tokens (no data loading).

    python -m benchmarks.train_speed --depth=12 --device-batch-size=32 --out=speed.json
    python -m benchmarks.train_speed --arch=speedrun --vocab-size=50304 --max-seq-len=49152 --device-batch-size=1
    python -m benchmarks.train_speed ... --accumulation=8      the record's step of 393,216 tokens on one GPU

One step = forward and backward of so many device batches, and the optimizer. Medians; the first steps, which compile,
are left out. MFU counts attention too; matmul_mfu leaves it out, as what is published of the speedrun does.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.nn.attention import SDPBackend

from nanochat import attention, cli, parallel
from nanochat.cli import int_flag
from nanochat.config import Arch, build_config, resolve
from nanochat.fp8 import Fp8, apply_fp8
from nanochat.gpt import GPT
from nanochat.hardware import device_name, peak_flops, peak_memory_bytes
from nanochat.runtime import compute_dtype, compute_init, synchronize
from scripts.base_train import Settings as TrainSettings

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


FP8: tuple[Fp8, ...] = ("none", "head", "all")
DOCUMENT_TOKENS = 690  # between starts of documents: the mean of FineWeb's


@dataclass(frozen=True, kw_only=True)
class Settings:
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
    out: str | None = None
    """File for the results as JSON."""


def measure(settings: Settings, device: torch.device, fp8: Fp8 = "none") -> dict[str, Any]:
    """Seconds a step, tokens/s, MFU and memory of one variant, with the kernels as they are set now."""
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    train = resolve(TrainSettings(arch=settings.arch, depth=settings.depth, max_seq_len=settings.max_seq_len))
    model = GPT(build_config(train, settings.vocab_size, document_token=0), compute_dtype(device)).to(device)
    model.init_weights()
    apply_fp8(model, fp8)
    forward = parallel.compile_model(model, parallel.Policy("ddp", model.compute_dtype))
    optimizer = model.setup_optimizer()
    idx = torch.randint(1, settings.vocab_size, (settings.device_batch_size, settings.max_seq_len + 1), device=device)
    idx[:, ::DOCUMENT_TOKENS] = 0

    inputs, targets = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    clip = train.grad_clip or None

    def step() -> None:
        for _ in range(settings.accumulation):
            (forward(inputs, targets) / settings.accumulation).backward()
        optimizer.step(max_norm=clip)
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    times = []
    for _ in range(settings.steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    if settings.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            synchronize(device)
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70))
    seconds = statistics.median(times)
    rate = settings.accumulation * settings.device_batch_size * settings.max_seq_len / seconds
    peak = peak_flops(device)
    return {
        "milliseconds": 1000 * seconds,
        "milliseconds_per_batch": 1000 * seconds / settings.accumulation,
        "tokens_per_second": rate,
        "mfu": model.estimate_flops() * rate / peak if peak else None,
        "matmul_mfu": model.estimate_flops(row_len=0) * rate / peak if peak else None,
        "peak_gib": peak_memory_bytes(device) / 2**30,
    }


def main(settings: Settings) -> None:
    *_, device = compute_init("cuda")
    usual = attention.GPU_KERNELS
    results = {}
    if settings.arch == "nanochat":
        for name, kernel in KERNELS.items():
            attention.GPU_KERNELS = [kernel, *(k for k in usual if k is not kernel)]
            results[name] = measure(settings, device)
            print(name, results[name], flush=True)
    else:
        for fp8 in FP8:
            results[f"fp8={fp8}"] = measure(settings, device, fp8)
            print(f"fp8={fp8}", results[f"fp8={fp8}"], flush=True)
    report = {
        "device": device_name(device),
        "torch": torch.__version__,
        "settings": cli.as_dict(settings, without=["out"]),
        "results": results,
    }
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, Settings)
