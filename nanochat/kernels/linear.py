"""Linear maps whose weights are kept in fp32, and where training in 8 bits is attached to them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EIGHT_BITS: dict[str, Any] = {}  # linear, mlp and head_loss of nanochat.kernels.fp8, once that is imported


class Linear(nn.Linear):
    """Linear map without bias: (..., in) -> (..., out) in the dtype of its input, whatever that of the weight (fp32).
    With `fp8`, set by apply_fp8, in 8 bits while training, and nowhere else."""

    fp8 = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def in_8_bits(self) -> bool:
        return self.fp8 and self.training and torch.is_grad_enabled()

    def forward(self, x: Tensor) -> Tensor:
        if self.in_8_bits():
            y: Tensor = EIGHT_BITS["linear"](x, self.weight)
            return y
        return F.linear(x, self.weight.to(x.dtype))
