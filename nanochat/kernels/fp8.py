"""Matmuls of training in 8 bits: twice the arithmetic rate of bf16 on GPUs of compute capability 8.9 and above.

y = x @ w.T takes x and w in e4m3 (3 bits of mantissa, at most 448); the gradients of y come in e5m2 (2 bits, at most
57,344), which has the range that gradients need (arXiv 2209.05433). Each tensor has one scale, its largest magnitude /
the format's maximum, found anew at every use: nothing to tune when width, batch or learning rate change, nothing
overflows, and no value goes to the host. Fixed scales would save one reading of each tensor, and are known to go wrong
when the recipe changes. Autograd keeps the 8-bit copies, one byte an element where bf16 has two; but each of the
projections of queries, keys and values keeps a copy of their common input, and each matrix one of its weights.

Only training is done in 8 bits (see Linear). On a CPU the same numbers are computed in fp32 from the 8-bit values,
which is slow, and there for tests.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.flags import Fp8
from nanochat.runtime import kernel, print0

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the hardware takes both dimensions of a weight in steps of 16
LEAST_WEIGHTS = 1280 * 5120  # of a block's matrix that is faster in 8 bits (H200: 1.23 and 1.32 times there, .7 and .8
# at 768 x 3,072): rounding and transposing take what a smaller product saves
CAPABILITY = (8, 9)  # the first with 8-bit matmuls (Ada; Hopper is 9.0)


class Scaled(NamedTuple):
    """A matrix in 8 bits; it stands for values.float() * scale."""

    values: Tensor
    """(rows, columns), e4m3 or e5m2, contiguous."""
    scale: Tensor
    """0-D, fp32, on the same device."""


# ---- the arithmetic


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale (0-D, fp32) that takes the magnitude `largest` (0-D) to the maximum of an 8-bit format. Never 0, so that a
    tensor of zeros stays one; NaN and inf pass through, so that a broken run is seen to be broken."""
    return (largest.float() / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)


def to_format(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in an 8-bit format, contiguous; what lies beyond its maximum becomes the maximum (the bare cast makes
    it NaN in e4m3 on some devices, and inf in e5m2 on all)."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype).contiguous()


def quantize(x: Tensor, dtype: torch.dtype) -> Scaled:
    """x (rows, columns), of any floating dtype, in an 8-bit format with the scale that just holds it."""
    return Scaled(*kernel(_quantize, x.is_cuda)(x, dtype))


def transposed(x: Scaled) -> Scaled:
    """x (R, C) as (C, R), laid out anew: the hardware multiplies along the rows of both factors. R is filled up to a
    multiple of 16 with zeros, which add nothing to a product along it."""
    return Scaled(kernel(_transpose, x.values.is_cuda)(x.values), x.scale)


def matmul(a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool) -> Tensor:
    """a (P, Q) @ b (R, Q).T -> (P, R) in dtype. `fast` adds up with fewer bits: fit for the forward pass only."""
    assert a.values.is_contiguous() and b.values.is_contiguous(), "both factors run along the contracted dimension"
    rows, contracted = b.values.shape
    assert rows % MULTIPLE == 0 and contracted % MULTIPLE == 0, f"{tuple(b.values.shape)}: not multiples of {MULTIPLE}"
    if a.values.is_cuda:
        return torch._scaled_mm(
            a.values, b.values.T, scale_a=a.scale, scale_b=b.scale, out_dtype=dtype, use_fast_accum=fast
        )
    return (a.values.float() @ b.values.float().T * a.scale * b.scale).to(dtype)


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = scale_of(x.abs().amax(), dtype)
    return to_format(x, scale, dtype), scale


def _transpose(values: Tensor) -> Tensor:
    as_bytes = values.view(torch.uint8)  # 0 in all formats is the byte 0, and every device can move bytes
    return F.pad(as_bytes, (0, 0, 0, -values.size(0) % MULTIPLE)).T.contiguous().view(values.dtype)


# ---- the operator


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) @ weight (M, K).T -> (..., M) in the dtype of x, in 8 bits, with gradients. K and M must be multiples
    of 16 (apply_fp8 sees to that); weight may be fp32, or bf16 as FSDP2 gathers it."""
    y, *_ = fp8_mm(x.flatten(0, -2), weight)
    return y.view(*x.shape[:-1], weight.size(0))


@torch.library.custom_op("nanochat::fp8_mm", mutates_args=())
def fp8_mm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x (N, K) @ weight (M, K).T, x in e4m3, weight in e4m3, their two scales). An operator of its own, so that the
    compiler neither looks inside nor keeps anything but the 8-bit copies for the backward pass."""
    x8, weight8 = quantize(x, E4M3), quantize(weight, E4M3)
    return matmul(x8, weight8, x.dtype, fast=True), x8.values, weight8.values, x8.scale, weight8.scale


@fp8_mm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = x.new_empty((), dtype=torch.float32)
    return (
        x.new_empty((x.size(0), weight.size(0))),
        x.new_empty(x.shape, dtype=E4M3),
        weight.new_empty(weight.shape, dtype=E4M3),
        scale,
        torch.empty_like(scale),
    )


@torch.library.custom_op("nanochat::fp8_mm_backward", mutates_args=())
def fp8_mm_backward(
    grad: Tensor, x8: Tensor, weight8: Tensor, x_scale: Tensor, weight_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(d/dx (N, K) in the dtype of grad, d/dweight (M, K) in fp32) from grad (N, M) and what fp8_mm gave."""
    grad8, x, weight = quantize(grad, E5M2), Scaled(x8, x_scale), Scaled(weight8, weight_scale)
    grad_x = matmul(grad8, transposed(weight), grad.dtype, fast=False)
    return grad_x, matmul(transposed(grad8), transposed(x), torch.float32, fast=False)


@fp8_mm_backward.register_fake
def _(grad: Tensor, x8: Tensor, weight8: Tensor, x_scale: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(x8.shape), grad.new_empty(weight8.shape, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    _, *kept = output
    ctx.save_for_backward(*kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or zeros would be made as gradients of the 8-bit copies
    ctx.weight_dtype = inputs[1].dtype


def _backward(ctx, grad: Tensor | None, *_unused: None):
    if grad is None:
        return None, None
    grad_x, grad_weight = fp8_mm_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight.to(ctx.weight_dtype)


fp8_mm.register_autograd(_backward, setup_context=_save)


# ---- who uses it


class Linear(nn.Linear):
    """Linear map without bias: (..., in) -> (..., out) in the dtype of its input, whatever that of the weight (fp32).
    With `fp8`, set by apply_fp8, in 8 bits while training, and nowhere else."""

    fp8 = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and self.training and torch.is_grad_enabled():
            return fp8_linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


def apply_fp8(model: nn.Module, which: Fp8) -> None:
    """Make a model train in 8 bits: its lm_head, or ("all") also the matrices c_* of its blocks; on a GPU those
    that are large enough to be faster so.

    Call it once the model lies on its device. Raises UserError where that has no 8-bit matmul, and names the first
    layer whose dimensions are no multiples of 16.
    """
    if which == "none":
        return
    device = next(model.parameters()).device
    require_fp8(device, which)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    chosen = [n for n in layers if n == "lm_head" or (which == "all" and n.rpartition(".")[2].startswith("c_"))]
    if device.type == "cuda":
        small = [n for n in chosen if n != "lm_head" and layers[n].weight.numel() < LEAST_WEIGHTS]
        chosen = [n for n in chosen if n not in small]
        if small:
            print0(f"--fp8={which}: {len(small)} matrices of less than {LEAST_WEIGHTS:,} weights stay in 16 bits")
    for name in sorted(chosen, key=lambda name: name != "lm_head"):
        _require_multiples(name, layers[name], which)
    for name in chosen:
        layers[name].fp8 = True


def require_fp8(device: torch.device, which: Fp8) -> None:
    """Raise UserError where this device neither has 8-bit matmuls nor is a CPU, which emulates them."""
    if device.type == "cpu":
        return
    what = f"device type {device.type}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        what = f"compute capability {capability[0]}.{capability[1]}"
    raise UserError(f"--fp8={which}: {what} has no 8-bit matmul (CUDA 8.9 and above have): use --fp8=none")


def _require_multiples(name: str, module: nn.Linear, which: Fp8) -> None:
    if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
        raise UserError(
            f"--fp8={which}: {name} is {module.out_features} x {module.in_features}, and 8-bit matmuls take multiples "
            f"of {MULTIPLE}: change the width or the vocabulary, or use --fp8=none"
        )
