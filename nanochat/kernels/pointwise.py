"""Chains of small operations between the matrix products of a block, with gradients that read and keep little.

On a GPU these chains move memory and compute next to nothing. Their derivatives can all be had from what they give
out, which the next product or attention keeps anyway for its own backward pass. So nothing that goes in is kept, and
the backward pass reads no more than that output and the gradient. torch.compile makes one kernel of each. On CPUs,
but for norms in bf16, and where nothing is learnt, plain operations compute the same up to rounding.
"""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 2.0**-23  # of fp32, as F.rms_norm has it
TRITON = find_spec("triton") is not None


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, no parameters, fp32 machine epsilon."""
    if _learns_in_bf16_on_cpu(x):
        return CpuNorm.apply(x, None, None)
    if not _learns_on_gpu(x):
        return F.rms_norm(x, (x.size(-1),))
    return Norm.apply(x, None, None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D): pairs (i, i + D/2) turned by -angle (the sense published weights use)."""
    return _turn(x.float(), cos, sin).to(x.dtype)


def rotate_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """norm(rotate(x)); on a GPU, and in bf16 on a CPU, rounded once instead of twice."""
    half = x.size(-1) // 2
    if _learns_in_bf16_on_cpu(x):
        return CpuNorm.apply(x, cos, sin)
    if not _learns_on_gpu(x):
        return norm(rotate(x, cos, sin))
    if TRITON and half & (half - 1) == 0:
        return rotated_norm(x, cos[0, :, 0], sin[0, :, 0])[0]
    return Norm.apply(x, cos, sin)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    if not _learns_on_gpu(x):
        return F.relu(x).square()
    return ReluSquared.apply(x)


def _learns_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and torch.is_grad_enabled()


def _learns_in_bf16_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled()


def _wide(x: Tensor) -> Tensor:
    """x in the precision that is computed in: fp32, or fp64 where x is."""
    return _as(torch.promote_types(x.dtype, torch.float32), x)


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x in `dtype`. Where it is so already nothing is called: torch 2.11, compiling a Function whose output went
    through a `.to` that does nothing, gives its input the gradient 0."""
    return x if x.dtype == dtype else x.to(dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


class Norm(torch.autograd.Function):
    """RMSNorm of x (..., D), which is turned first where there are tables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        wide = _wide(x)
        factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
        if cos is not None and sin is not None:  # turning leaves the norm as it is
            wide = _turn(wide, cos, sin)
        y = _as(x.dtype, wide * factor)
        ctx.save_for_backward(y, factor, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, factor, cos, sin = ctx.saved_tensors
        wide, grad = _wide(y), _wide(grad)
        grad_x = (grad - wide * (grad * wide).mean(-1, keepdim=True)) * factor
        if cos is not None:
            grad_x = _turn(grad_x, cos, -sin)
        return _as(y.dtype, grad_x), None, None


class CpuNorm(torch.autograd.Function):
    """Norm by few passes, for each is an operation of its own here. Forward and backward of 4,096 x 128 take 1.5 ms for
    2.7 of plain operations, 3.9 for 5.6 where heads of 64 are turned (bf16, one core)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        factor = length.square_().div_(x.size(-1)).add_(EPSILON).rsqrt_()
        if cos is not None and sin is not None:
            wide = _turn_by_few(wide, cos, sin)
        y = (wide * factor).to(x.dtype)
        ctx.save_for_backward(y, factor, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, factor, cos, sin = ctx.saved_tensors
        wide, grad = y.float(), grad.float()
        grad = torch.addcmul(grad, wide, (grad * wide).mean(-1, keepdim=True), value=-1).mul_(factor)
        if cos is not None:
            grad = _turn_by_few(grad, cos, -sin)
        return grad.to(y.dtype), None, None


def _turn_by_few(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """_turn over whole rows: loops over half of one are short."""
    half_turned = x.roll(x.size(-1) // 2, -1)
    return torch.addcmul(x * torch.cat([cos, cos], -1), half_turned, torch.cat([sin, -sin], -1))


class ReluSquared(torch.autograd.Function):
    """Its gradient 2·max(x, 0) is taken from the root of the output: what goes in, the largest tensor of a block, is
    not kept beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _as(x.dtype, _wide(x).relu().square())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return _as(y.dtype, _wide(grad) * (2 * _wide(y).sqrt()))


# The same by kernels of our own. The compiler's took 0.80 ms for the backward pass of queries and keys of 65,536 tokens
# of 1,280 channels (H200), where the memory needs 0.24: it reads every half of a row as often as it is used.


@torch.library.custom_op("nanochat::rotate_norm", mutates_args=())
def rotated_norm(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(x (B, T, H, D) turned by cos and sin (T, D/2) and normed, the factors of its rows (B, T, H))."""
    from nanochat.kernels import device

    return device.rotate_norm(x.contiguous(), cos.contiguous(), sin.contiguous(), EPSILON)


@rotated_norm.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("nanochat::rotate_norm_grad", mutates_args=())
def rotated_norm_grad(grad: Tensor, y: Tensor, factor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from nanochat.kernels import device

    return device.rotate_norm_grad(grad.contiguous(), y, factor, cos.contiguous(), sin.contiguous())


@rotated_norm_grad.register_fake
def _(grad: Tensor, y: Tensor, factor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(y)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output, *inputs[1:])
    ctx.mark_non_differentiable(output[1])


def _grad(ctx: Any, grad: Tensor, _unused: Any) -> tuple[Tensor, None, None]:
    return rotated_norm_grad(grad, *ctx.saved_tensors), None, None


rotated_norm.register_autograd(_grad, setup_context=_keep)
