"""Tensors of which a rank holds all, or only some rows (DTensors, as FSDP2 makes of parameters).

FSDP2 cuts along the first dimension as torch.chunk does: ceil(rows / ranks) rows a rank, fewer or none on the last.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor (looked up by its method: importing the class takes 2.5 s)."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The part of `tensor` that this rank holds; the tensor itself where it is whole. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_range(tensor: Any) -> tuple[int, int]:
    """(first row, end) of `tensor` that this rank holds; empty shards give (rows, rows)."""
    rows = tensor.size(0)
    if not is_sharded(tensor):
        return 0, rows
    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    if not cut:
        return 0, rows
    assert len(cut) == 1 and placements[cut[0]].dim == 0, f"cut along the rows, once: {placements}"
    per_rank = -(-rows // mesh.size(cut[0]))
    first = min(per_rank * mesh.get_local_rank(cut[0]), rows)
    return first, min(first + per_rank, rows)


def fill_rows(param: Any, fill: Callable[[Tensor], object]) -> None:
    """Have `fill` write the full values of `param`, and keep the rows that this rank holds."""
    if not is_sharded(param):
        fill(param)
        return
    full = torch.empty(param.shape, dtype=param.dtype, device=local(param).device)
    fill(full)
    local(param).copy_(full[slice(*row_range(param))])


def replicas_of(tensor: Any) -> int:
    """Ranks that hold the same part of a sharded tensor."""
    return math.prod(tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if not p.is_shard())
