"""The GPU kernel of nanochat.kernels.fp8, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _round(x, h, largest, y, columns, scale, rows, width, padded, LIMIT: tl.constexpr, KIND: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    factor = tl.maximum(tl.load(largest) / LIMIT, 1.1754943508222875e-38)
    tl.store(scale, factor)
    r, c = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.program_id(0) * TILE + tl.arange(0, TILE)
    place, mask = r.to(tl.int64)[:, None] * width + c[None, :], (r < rows)[:, None] & (c < width)[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if KIND == 1:
        value = tl.maximum(value, 0.0) * tl.maximum(value, 0.0)
    if KIND == 2:
        value = value * 2.0 * tl.maximum(tl.load(h + place, mask=mask, other=0.0).to(tl.float32), 0.0)
    value = value / factor
    inside = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    value = tl.where(tl.abs(value) < float("inf"), inside, value * 0.0).to(y.dtype.element_ty)  # NaN where not finite
    tl.store(y + place, value, mask=mask)
    place, mask = c.to(tl.int64)[:, None] * padded + r[None, :], (c < width)[:, None] & (r < padded)[None, :]
    tl.store(columns + place, tl.trans(value), mask=mask)


def to_fp8(
    x: Tensor, largest: Tensor, h: Tensor | None, kind: int, dtype: torch.dtype, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, C) in 8 bits, the same as (C, padded), and their scale, for the magnitude `largest`; KIND 1: its squared
    ReLU, 2: the gradient before the squares of h, x being that behind them."""
    (rows, width), other = x.shape, x if h is None else h
    y, columns = x.new_empty((rows, width), dtype=dtype), x.new_empty((width, padded), dtype=dtype)
    scale, tile = x.new_empty((), dtype=torch.float32), 128
    grid = triton.cdiv(width, tile), triton.cdiv(padded, tile)
    limit = torch.finfo(dtype).max
    _round[grid](x, other, largest, y, columns, scale, rows, width, padded, limit, kind, tile, num_warps=8)
    return y, columns, scale
