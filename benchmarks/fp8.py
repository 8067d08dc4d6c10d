"""Time of the head's matmuls and of the whole fused loss, forward and backward, in bf16 and in 8 bits.

    python -m benchmarks.fp8 --out=fp8.json

Medians by the GPU's own clock, behind other work (see benchmarks.measure); the first calls, which compile, are left
out. TFLOP/s count the three products: logits, gradient of the hidden states, gradient of the weight.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from benchmarks.measure import about, milliseconds
from benchmarks.output import Output, write_json
from nanochat import cli
from nanochat.cli import int_flag
from nanochat.errors import UserError
from nanochat.kernels.fp8 import E4M3, E5M2, MULTIPLE, fp8_linear, quantize, require_fp8, transposed
from nanochat.loss import fused_head_loss
from nanochat.runtime import compute_init

WARM_UP = 5  # calls left out
CAP = 15.0


@cli.program
class Settings(Output):
    """Measure the head in bf16 and in 8 bits."""

    tokens: Annotated[int, int_flag(gte=1)] = 65_536
    """Rows of hidden states."""
    width: Annotated[int, int_flag(gte=16)] = 768
    """Their width, a multiple of 16."""
    vocab_size: Annotated[int, int_flag(gte=16)] = 50_304
    """Vocabulary, a multiple of 16."""
    repeats: Annotated[int, int_flag(gte=1)] = 20
    """Timed calls of each."""


def measure(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds and peak GiB of `call`."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"milliseconds": milliseconds(call, device, repeats, queued=1).device, "peak_gib": peak}


def variants(settings: Settings, device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (what to time, how many of the three products it makes)."""
    torch.manual_seed(0)
    hidden = torch.randn(settings.tokens, settings.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(settings.vocab_size, settings.width, device=device)).requires_grad_()
    targets = torch.randint(settings.vocab_size, (settings.tokens,), device=device)
    weights = torch.ones(settings.tokens, device=device)
    grad = torch.randn(settings.tokens, settings.vocab_size, device=device, dtype=torch.bfloat16)
    both = [hidden, weight]

    def loss(fp8: bool) -> Any:
        return torch.autograd.grad(fused_head_loss(hidden, weight, targets, weights, CAP, 1.0, fp8), both)

    return {
        "matmuls, bf16": (lambda: torch.autograd.grad(F.linear(hidden, weight.to(hidden.dtype)), both, grad), 3),
        "matmuls, 8 bits": (lambda: torch.autograd.grad(fp8_linear(hidden, weight), both, grad), 3),
        "  of these: rounding hidden": (lambda: quantize(hidden.detach(), E4M3), 0),
        "  of these: rounding the weight": (lambda: quantize(weight.detach(), E4M3), 0),
        "  of these: rounding and transposing the gradient": (lambda: transposed(quantize(grad, E5M2)), 0),
        "fused loss, bf16": (lambda: loss(False), 3),
        "fused loss, 8 bits": (lambda: loss(True), 3),
    }


def main(settings: Settings) -> None:
    if settings.width % MULTIPLE or settings.vocab_size % MULTIPLE:
        raise UserError(f"--width={settings.width} --vocab-size={settings.vocab_size}: both must be multiples of 16")
    *_, device = compute_init("cuda")
    require_fp8(device, "head")
    report = about(settings, device)
    print(f"{report['device']}: {settings.tokens:,} tokens, {settings.width:,} -> {settings.vocab_size:,}")
    results: dict[str, dict[str, float]] = {}
    for name, (call, products) in variants(settings, device).items():
        row = results[name] = measure(call, device, settings.repeats)
        rate = ""
        if products:
            flops = 2 * products * settings.tokens * settings.width * settings.vocab_size
            row["tflops"] = flops / row["milliseconds"] / 1e9
            rate = f"{row['tflops']:8.0f} TFLOP/s"
        print(f"{name:<52} {row['milliseconds']:9.2f} ms {row['peak_gib']:7.1f} GiB {rate}")
    write_json(settings, report | {"results": results})


if __name__ == "__main__":
    cli.run(main, Settings)
