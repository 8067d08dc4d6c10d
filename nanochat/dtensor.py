"""Tensors of which a rank holds all, or only some rows (DTensors, as FSDP2 makes of parameters).

FSDP2 shards along the first dimension as torch.chunk does: ceil(rows / ranks) rows a rank, fewer or none on the last.
The class DTensor is imported where one is made: that takes 2.5 s.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """The part of `tensor` that this rank holds; the tensor itself where it is unsharded. Shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_range(tensor: Any) -> tuple[int, int]:
    """(first row, end) of `tensor` that this rank holds; empty shards give (rows, rows)."""
    rows = tensor.size(0)
    if not is_sharded(tensor):
        return 0, rows
    mesh, placements = tensor.device_mesh, tensor.placements
    shard_dims = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    if not shard_dims:
        return 0, rows
    assert len(shard_dims) == 1 and placements[shard_dims[0]].dim == 0, f"sharded by rows, once: {placements}"
    per_rank = -(-rows // mesh.size(shard_dims[0]))
    first = min(per_rank * mesh.get_local_rank(shard_dims[0]), rows)
    return first, min(first + per_rank, rows)


def replicas_of(tensor: Any) -> int:
    """Ranks that hold the same part of a sharded tensor."""
    return math.prod(tensor.device_mesh.size(i) for i, p in enumerate(tensor.placements) if not p.is_shard())


def fill_rows(param: Any, fill: Callable[[Tensor], object]) -> None:
    """Have `fill` write the full values of `param`, and keep the rows that this rank holds."""
    if not is_sharded(param):
        fill(param)
        return
    full = torch.empty(param.shape, dtype=param.dtype, device=local(param).device)
    fill(full)
    local(param).copy_(full[slice(*row_range(param))])


def dtensor_like(param: Any, part: Tensor) -> Tensor:
    """This rank's `part` as a DTensor laid out like `param`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def dtensor_of_rows(part: Tensor, mesh: Any) -> Tensor:
    """This rank's `part` as a DTensor, sharded by rows over a mesh of one dimension, as many rows on each rank."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
