"""The MLP of a block on Hopper GPUs: the squared ReLU is computed where the products end, forward and backward, and so
is never read or written by itself.
"""

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.linear import EIGHT_BITS, Linear
from nanochat.kernels.pointwise import TRITON, relu_squared

MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)
HOPPER = 9  # major compute capability; others have no kernel of ours that was measured to be faster


def has_fused_mlp(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this GPU has kernels of its own for mlp()."""
    return dtype == torch.bfloat16 and on_hopper(device)


def on_hopper(device: torch.device) -> bool:
    """Whether our kernels that multiply run here."""
    cuda = device.type == "cuda" and TRITON and torch.version.hip is None
    return cuda and torch.cuda.get_device_capability(device)[0] == HOPPER


def mlp(x: Tensor, c_fc: Linear, c_proj: Linear, fused: bool) -> Tensor:
    """c_proj(max(c_fc(x), 0)²) of x (B, T, C); `fused`: by kernels of our own where it is trained in 16 bits."""
    if x.is_cuda and c_fc.in_8_bits() and c_proj.in_8_bits():
        rounded: Tensor = EIGHT_BITS["mlp"](x, c_fc.weight, c_proj.weight)
        return rounded
    aligned = x.size(-1) % 8 == 0 and c_fc.out_features % 8 == 0  # rows of 16 bytes, for the copy engine
    if not (fused and aligned and torch.is_grad_enabled()) or c_fc.fp8:
        return c_proj(relu_squared(c_fc(x)))
    return FusedMLP.apply(x.flatten(0, 1), c_fc.weight.to(x.dtype), c_proj.weight.to(x.dtype)).view(x.shape)


class FusedMLP(torch.autograd.Function):
    """x (N, C), weights (4 C, C) and (C, 4 C), all of one dtype -> (N, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = relu_squared_product(x, up, None)
        ctx.save_for_backward(x, y, up, down)
        return y @ down.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, up, down = ctx.saved_tensors
        inner = relu_squared_product(grad, down.T, y)
        return inner @ up, weight_gradient(inner, x), weight_gradient(grad, y)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad (N, M).T @ x (N, K) -> (M, K), by squares where the whole would leave a part of the GPU idle: cuBLAS cuts it
    into tiles of 128 x 256, one for each multiprocessor at a time, and cuts the sum over N only where there are fewer
    tiles than these. 5,120 x 1,280 from 65,536 tokens: 200 tiles in two rounds, 1.41 ms; four squares 1.13 (H200)."""
    (M, K), tiles = (grad.size(1), x.size(1)), -(-grad.size(1) // 128) * -(-x.size(1) // 256)
    if not MULTIPROCESSORS < tiles <= 1.6 * MULTIPROCESSORS or max(M, K) % min(M, K):
        return grad.T @ x
    if M > K:
        return torch.cat([part.T @ x for part in grad.split(K, dim=1)])
    return torch.cat([grad.T @ part for part in x.split(M, dim=1)], dim=1)


@torch.library.custom_op("nanochat::relu_squared_product", mutates_args=())
def relu_squared_product(x: Tensor, weight: Tensor, squares: Tensor | None) -> Tensor:
    """max(x (N, K) @ weight (M, K).T, 0)² -> (N, M); with squares (N, M) that were so made, x being the gradient behind
    them, (x @ weight.T) * 2 sqrt(squares), the gradient before them."""
    from nanochat.kernels import device

    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return device.relu_squared_product(x.contiguous(), weight, squares, programs)


@relu_squared_product.register_fake
def _(x: Tensor, weight: Tensor, squares: Tensor | None) -> Tensor:
    return x.new_empty((x.size(0), weight.size(0)))
