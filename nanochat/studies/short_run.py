"""A short training run on rows that lie on the device: what sweeps, ablations and benchmarks of training share. It
takes the steps of nanochat.train.loop, and writes no checkpoint."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import parallel
from nanochat.config import GPTConfig
from nanochat.flags import Parallel, RunFlags
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.parallel import Policy
from nanochat.runtime import compute_dtype
from nanochat.train.run import Loader, TrainingRun


def build_model(
    config: GPTConfig, device: torch.device, strategy: Parallel = "ddp"
) -> tuple[GPT, Callable[..., Tensor], Policy]:
    """(a model on its device that init_weights has still to fill; what to train with, compiled on CUDA; how it is
    spread over the ranks)."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype(device))
    policy = parallel.parallelize_model(model, strategy, device)
    model.to_empty(device=device)
    return model, parallel.compile_model(model, policy) if device.type == "cuda" else model, policy


class ResidentLoader(Loader):
    """Micro-batches of a whole run, from rows that are on the device already."""

    def __init__(self, rows: Tensor, rows_per_step: int, device_batch_size: int) -> None:
        """rows (steps x rows_per_step, T + 1) int32; when all have been given, the first come again."""
        self.device_batch_size = device_batch_size
        self.batches_per_step = math.ceil(rows_per_step / device_batch_size)
        parts = (part for step in rows.split(rows_per_step) for part in step.split(device_batch_size))
        self._parts = itertools.cycle(parts)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        part = next(self._parts).long()
        # contiguous, as in training: a model is compiled for each layout
        return part[:, :-1].contiguous(), part[:, 1:].contiguous()


def short_run(
    model: GPT,
    forward: Callable[..., Tensor],
    optimizer: MuonAdamW,
    loader: ResidentLoader,
    steps: int,
    tokens_per_step: int,
    schedule: Callable[[int], tuple[float, float]],
    **others: Any,
) -> TrainingRun:
    """To be given to train_step; `others`: further fields of TrainingRun."""
    rest = {"grad_clip": 0.0, **others}
    return TrainingRun(
        folder=Path(),
        settings=RunFlags(),
        meta={},
        earlier={},
        model=model,
        forward=forward,
        optimizer=optimizer,
        loader=loader,
        num_iterations=steps,
        tokens_per_step=tokens_per_step,
        schedule=schedule,
        evaluations=[],
        **rest,
    )
