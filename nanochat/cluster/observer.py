"""Attach what looks after many ranks to a run: `TrainingRun(..., observer=ClusterObserver())`.

Hosts are measured before a run over several of them (preflight), a stuck rank ends all (watchdog), and every 100 steps
the slowest rank is named (stragglers).
"""

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from nanochat.cluster import preflight
from nanochat.cluster.stragglers import StragglerReport
from nanochat.cluster.watchdog import Watchdog, lower_timeout
from nanochat.paths import get_base_dir
from nanochat.runtime import get_dist_info, ranks_per_node
from nanochat.train.observer import Observer


class ClusterObserver(Observer):
    """Names slow hosts, stuck ranks and stragglers. For one run."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None
        self.steps = 0

    def start(self, device: torch.device) -> None:
        self.device = device
        if get_dist_info().world_size > ranks_per_node():
            preflight.check(device, get_base_dir())  # on several hosts one slow one sets the pace: name it now
        self.watchdog = Watchdog()
        self.stragglers = StragglerReport(device)

    def mark(self, step: int, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.mark(step, phase)

    def before_collective(self, step_seconds: float, data_seconds: float) -> None:
        self.stragglers.record(step_seconds, data_seconds)

    def first_forward(self) -> AbstractContextManager[None]:
        return self.stragglers.forward()

    def after_step(self, step: int, background: dist.ProcessGroup | None) -> dict[str, float]:
        self.steps += 1
        if self.steps == 1:  # all ranks have compiled: from here on a long wait is a fault
            lower_timeout(device=self.device, leave=background)
        return self.stragglers.report(step)

    def close(self) -> None:
        if self.watchdog is not None:
            self.watchdog.close()
