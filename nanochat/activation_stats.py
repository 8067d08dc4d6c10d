"""Statistics of one activation tensor, in one pass and without a word to the host."""

import torch
from torch import Tensor

STATISTICS = ("mean", "std", "max", "min", "l2", "l1")  # in this order; l2 = root mean square, l1 = mean of |x|


def summarize(x: Tensor) -> Tensor:
    """(6,) fp32 STATISTICS over all entries of x, without a gradient."""
    x = x.detach().float()
    # Row by row first: the compiler does that beside what it does with each row anyway (the next norm), so that the
    # tensor is not read again; what is left to add up is a width-th of it.
    sums = torch.stack([x.sum(-1).sum(), x.square().sum(-1).sum(), x.abs().sum(-1).sum()]) / x.numel()
    mean, square, size = sums.unbind(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    return torch.stack([mean, std, x.amax(-1).amax(), x.amin(-1).amin(), square.sqrt(), size])
