"""What watches a run without changing it. The loop calls Observers; this one does nothing but say that it lives.

`TrainingRun(..., observer=nanochat.cluster.observer.ClusterObserver())` names slow and stuck ranks,
`TrainingRun(..., monitor=nanochat.train.monitor.Monitor(...))` looks inside the model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from nanochat.runtime import heartbeat


class Observer:
    """All methods are called on every rank; `start`, `after_update` and `after_step` may be collective."""

    def start(self, device: torch.device) -> None:
        """Before the first step, and before kernels are warmed up."""

    def mark(self, step: int, phase: str) -> None:
        """The loop has come to `phase` (data, forward, update, evaluate, save) of `step`; forward: each micro-batch."""
        heartbeat()

    def before_collective(self, step_seconds: float, data_seconds: float) -> None:
        """Once a step. `step_seconds`: host time from the start of the step to its first collective, the wait for data
        included; `data_seconds`: of these, the wait for batches."""

    def before_forward(self, step: int) -> None:
        """The forward passes of the step that will be number `step` follow."""

    def first_forward(self) -> AbstractContextManager[None]:
        """Held around the forward pass of the first micro-batch of each step."""
        return nullcontext()

    def before_update(self) -> None:
        """The gradients are there, the weights still the old ones."""

    def after_update(self) -> Callable[[], dict[str, float]] | None:
        """The optimizer has stepped. Must not wait for the device: what is returned does, and gives metrics."""
        return None

    def after_step(self, step: int, background: dist.ProcessGroup | None) -> dict[str, float]:
        """`step` optimizer steps are done. Returns metrics. `background`: the group that checkpoints are written by."""
        return {}

    def close(self) -> None:
        """Training has ended, in whatever way; called also where `start` was not."""
