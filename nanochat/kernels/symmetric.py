"""Products of stacked matrices that are known to be symmetric: on a Hopper GPU only half of each is computed."""

import torch
from torch import Tensor

from nanochat.kernels.mlp import on_hopper

TILE = 128  # what our kernel takes sizes in multiples of


@torch.library.custom_op("nanochat::symmetric_product", mutates_args=())
def symmetric_product(
    a: Tensor, b: Tensor, extra: Tensor | None = None, times: float = 1.0, plus: float = 0.0, diagonal: float = 0.0,
    tall: bool = False,
) -> Tensor:  # fmt: skip
    """times * a @ b.mT of a and b (K, s, d), or, of `tall` ones (K, d, s), times * a.mT @ b; with `extra` (K, s, s),
    + plus * extra + diagonal * 1. On an H100 .34 ms for .49 of all of it, 80 squares of 1,280."""
    if on_hopper(a.device) and a.dtype.itemsize == 2 and all(size % TILE == 0 for size in a.shape[1:]):
        from nanochat.kernels import device

        return device.symmetric_product(a.contiguous(), b.contiguous(), extra, times, plus, diagonal, tall)
    product = times * (a.mT @ b if tall else a @ b.mT)
    if extra is not None:
        product += plus * extra
        product.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return product


@symmetric_product.register_fake
def _(a: Tensor, *given: object) -> Tensor:
    side = a.size(-1) if given[-1] is True else a.size(-2)
    return a.new_empty((a.size(0), side, side))
