"""Functions of tensors as single kernels on GPUs."""

import functools
from typing import Any

import torch

VARIANTS = 64


def allow_variants() -> None:
    """Let torch compile one function for up to 64 combinations of shapes, dtypes and flags: it gives up after 8, for
    good. Seen: 15 of a block, with short and long windows, value embeddings, statistics and evaluation; 15 of
    update_rules.nesterov (hsdp on 3 nodes); some 20 of the 8-bit kernels."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)


@functools.cache
def kernel(function: Any, on_gpu: bool) -> Any:
    """`function` compiled for GPUs, where a chain of small operations would read and write memory at each link; as it
    is on a CPU, where compiling would take longer than a small run."""
    if not on_gpu:
        return function
    allow_variants()
    return torch.compile(function, dynamic=False, fullgraph=True)
