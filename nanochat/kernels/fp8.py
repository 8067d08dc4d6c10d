"""Matmuls of training in 8 bits: twice the arithmetic rate of bf16 on GPUs of compute capability 8.9 and above.

y = x @ w.T takes x and w in e4m3 (3 bits of mantissa, at most 448); the gradients of y come in e5m2 (2 bits, at most
57,344), which has the range that gradients need (arXiv 2209.05433). Each tensor has one scale, its largest magnitude /
the format's maximum, found anew at every use (in a sample, where that is enough): nothing to tune when width, batch or
learning rate change, nothing overflows, and no value goes to the host. Fixed scales would save one reading of each
tensor, and are known to go wrong when the recipe changes. What has been rounded is written twice by one kernel, along
its rows and along its columns, for the hardware multiplies along the rows of both factors. Autograd keeps the second of
these, one byte an element where bf16 has two, beside what the norms keep in bf16; queries, keys and values share that
of their input. The squared ReLU of an MLP is computed where its result is rounded, forward and backward.

Only training is done in 8 bits (nanochat.kernels.linear). On a CPU the same numbers are computed in fp32 from the 8-bit
values, which is slow, and there for tests.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.flags import Fp8
from nanochat.kernels.linear import EIGHT_BITS, Linear
from nanochat.runtime import kernel, print0

TRITON = find_spec("triton") is not None
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the hardware takes both dimensions of a weight in steps of 16
LEAST_WIDTH = 1280  # of both sides of a block's matrix. Blocks of 1,280 run at 1.17 times the speed in 8 bits, of 1,664
# at 1.26, of 768 at .87 (H200, 32,768 tokens): rounding takes what a smaller product saves
# From so many rows (tokens) on the largest magnitude is looked for in every 16th, and twice that is provided for: this
# takes one of the 15 or more powers of two that the formats span, and what is still larger becomes the maximum.
MANY_ROWS, SAMPLED = 16_384, 16
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


# ---- the operators: opaque, so that the compiler keeps nothing but 8-bit copies for the backward pass


PLAIN, SQUARED, BEFORE_SQUARES = 0, 1, 2  # what is rounded: x, max(x, 0)², x * 2 max(h, 0)


def rounded(
    x: Tensor, gradient: bool = False, kind: int = PLAIN, h: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, C) in e4m3 (e5m2 for a gradient), the same laid out anew as `transposed` does, and their scale."""
    seen, seen_h, margin = x, h, 1.0
    if x.size(0) >= MANY_ROWS:
        seen, seen_h, margin = x[::SAMPLED], None if h is None else h[::SAMPLED], 2.0
    return to_fp8(x, margin * _wide(seen, kind, seen_h).abs().amax(-1).amax().float(), gradient, kind, h)


def _wide(x: Tensor, kind: int, h: Tensor | None) -> Tensor:
    if h is not None:
        return x.float() * 2 * h.float().relu()
    return x if kind == PLAIN else x.float().relu().square()


@torch.library.custom_op("nanochat::to_fp8", mutates_args=())
def to_fp8(x: Tensor, largest: Tensor, gradient: bool, kind: int, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `rounded` gives, for this largest magnitude."""
    dtype, padded = E5M2 if gradient else E4M3, x.size(0) + -x.size(0) % MULTIPLE
    if x.is_cuda and TRITON:
        from nanochat.kernels import fp8_device

        return fp8_device.to_fp8(x.contiguous(), largest, h, kind, dtype, padded)
    scale = scale_of(largest, dtype)
    values = to_format(_wide(x, kind, h), scale, dtype)
    return values, _transpose(values), scale


@to_fp8.register_fake
def _(x: Tensor, largest: Tensor, gradient: bool, kind: int, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (rows, width) = E5M2 if gradient else E4M3, x.shape
    columns = x.new_empty((width, rows + -rows % MULTIPLE), dtype=dtype)
    return x.new_empty((rows, width), dtype=dtype), columns, x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("nanochat::fp8_product", mutates_args=())
def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """matmul of what to_fp8 gave."""
    return matmul(Scaled(a, a_scale), Scaled(b, b_scale), dtype, fast)


@product.register_fake
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return a.new_empty((a.size(0), b.size(0)), dtype=dtype)


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) @ weight (M, K).T -> (..., M) in the dtype of x, in 8 bits, with gradients. K and M must be multiples
    of 16 (apply_fp8 sees to that); weight may be fp32, or bf16 as FSDP2 gathers it."""
    y: Tensor = Fp8Linear.apply(x.flatten(0, -2), weight)
    return y.view(*x.shape[:-1], weight.size(0))


class Fp8Linear(torch.autograd.Function):
    """x (N, K), weight (M, K) -> (N, M). Several of one x round it once: to the compiler it is one operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_columns, x_scale), (w8, w_columns, w_scale) = rounded(x), rounded(weight)
        ctx.save_for_backward(x_columns, x_scale, w_columns, w_scale)
        ctx.weight_dtype = weight.dtype
        return product(x8, w8, x_scale, w_scale, x.dtype, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, x_scale, weight, w_scale = ctx.saved_tensors
        grad8, columns, scale = rounded(grad, True)
        grad_x = product(grad8, weight, scale, w_scale, grad.dtype, False)
        return grad_x, product(columns, x, scale, x_scale, ctx.weight_dtype, False)


class Fp8MLP(torch.autograd.Function):
    """x (N, C), weights (4 C, C) and (C, 4 C) -> (N, C): the squared ReLU is part of the rounding, forward and
    backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        (x8, x_columns, x_scale), (up8, up_columns, up_scale) = rounded(x), rounded(up)
        h = product(x8, up8, x_scale, up_scale, x.dtype, True)
        (y8, y_columns, y_scale), (down8, down_columns, down_scale) = rounded(h, False, SQUARED), rounded(down)
        scales = x_scale, up_scale, y_scale, down_scale
        ctx.save_for_backward(h, x_columns, up_columns, y_columns, down_columns, *scales)
        ctx.weight_dtype = up.dtype
        return product(y8, down8, y_scale, down_scale, x.dtype, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, x, up, y, down, x_scale, up_scale, y_scale, down_scale = ctx.saved_tensors
        grad8, grad_columns, grad_scale = rounded(grad, True)
        grad_y = product(grad8, down, grad_scale, down_scale, grad.dtype, False)
        inner, inner_columns, scale = rounded(grad_y, True, BEFORE_SQUARES, h)
        grad_x = product(inner, up, scale, up_scale, grad.dtype, False)
        grad_up = product(inner_columns, x, scale, x_scale, ctx.weight_dtype, False)
        return grad_x, grad_up, product(grad_columns, y, grad_scale, y_scale, ctx.weight_dtype, False)


def fp8_head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor, cap: float, scale: float, rows: int,
    raw_gradient: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """That of nanochat.loss with its three products in 8 bits, `rows` at a time: head and hidden in e4m3, gradients of
    the logits in e5m2."""
    head = quantize(weight, E4M3)
    head_transposed = transposed(head)
    # No entry of a logit's gradient is larger than this (|p - 1| <= 1, tanh' <= 1), and the one of the target comes
    # near it: the scale is known before the gradients are, so they are written in 8 bits at once and never in 16.
    grad_scale = scale_of(loss_weights.abs().amax() * abs(scale), E5M2)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    rows = max(1, rows // MULTIPLE) * MULTIPLE
    gradient = kernel(_gradient_in_8_bits, hidden.is_cuda)
    for start in range(0, hidden.size(0), rows):
        piece = slice(start, start + rows)
        hidden8 = quantize(hidden[piece], E4M3)
        logits = matmul(hidden8, head, hidden.dtype, fast=True)
        loss, grad = gradient(raw_gradient, grad_scale, logits, targets[piece], loss_weights[piece], cap, scale)
        total += loss
        grad8 = Scaled(grad, grad_scale)
        grad_hidden[piece] = matmul(grad8, head_transposed, hidden.dtype, fast=False)
        columns = transposed(grad8), transposed(hidden8)
        grad_weight += matmul(*columns, torch.float32, fast=False)
    return total, grad_hidden, grad_weight


def _gradient_in_8_bits(
    raw_gradient: Callable[..., tuple[Tensor, Tensor]], grad_scale: Tensor, *of: Any
) -> tuple[Tensor, Tensor]:
    loss, grad = raw_gradient(*of)
    return loss, to_format(grad, grad_scale, E5M2)


def fp8_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(x (..., C) @ up (4 C, C).T)² @ down (C, 4 C).T."""
    y: Tensor = Fp8MLP.apply(x.flatten(0, -2), up, down)
    return y.view(x.shape)


EIGHT_BITS.update(linear=fp8_linear, mlp=fp8_mlp, head_loss=fp8_head_loss)


# ---- who uses it


def apply_fp8(model: nn.Module, which: Fp8, device: torch.device | None = None) -> None:
    """Make a model train in 8 bits: its lm_head, or ("all") also the matrices c_* of its blocks; on a GPU those
    that are large enough to be faster so.

    device: where it will lie, if it does not yet. Raises UserError where that has no 8-bit matmul, and names the first
    layer whose dimensions are no multiples of 16.
    """
    if which == "none":
        return
    device = device or next(model.parameters()).device
    require_fp8(device, which)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    chosen = [n for n in layers if n == "lm_head" or (which == "all" and n.rpartition(".")[2].startswith("c_"))]
    if device.type == "cuda":
        small = [n for n in chosen if n != "lm_head" and min(layers[n].weight.shape) < LEAST_WIDTH]
        chosen = [n for n in chosen if n not in small]
        if small:
            print0(f"--fp8={which}: {len(small)} matrices narrower than {LEAST_WIDTH:,} stay in 16 bits")
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
