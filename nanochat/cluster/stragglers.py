"""Which rank holds the others up: per-rank times, gathered every so many steps.

In synchronous training a step takes equally long on all ranks, because the fast ones wait in collectives for the slow
one. Only time that a rank spends on its own, before it waits for anybody, can tell. There are three such numbers:

- data wait: host time in which this rank waited for its next batches. Shows slow storage, a slow tokenizer thread.
- host: the rest of the host time from the last synchronisation to the first collective of the step. Shows what else
  keeps Python busy on one rank. Does not show a slow launch of kernels later in the step.
- forward: time of the first micro-batch's forward pass, on a GPU by events on its stream. Shows a slow GPU or CPU
  (throttled, shared, far from its memory). Under DDP no collective falls into a forward pass; under FSDP the weights
  are gathered in it, so that a slow rank shows on all: there, compare matmul TFLOP/s (nanochat.cluster.preflight).

None of them shows a slow link: all ranks wait for it alike.
"""

import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nanochat.runtime import print0

NAMES = ("data wait", "host", "forward")
RATIOS = {name: f"Stragglers/{name.replace(' ', '_')}_max_over_median" for name in NAMES}
EVERY = 100  # steps: a mean that one pause does not make, and the wait for the device it costs is spread thin
SLOW = 1.10  # over the median: healthy cards of one model differ by some per cent in clock rate under one power limit
NOTICEABLE = 0.01  # of the step: a rank that is 10 % over a median of microseconds costs nobody anything
TICK = 1e-3  # seconds; below it the scheduler of the host decides, and ratios say nothing


class StragglerReport:
    """Collects times on each rank; `report` is collective, the rest is local and waits for nothing."""

    def __init__(self, device: torch.device, every: int = EVERY) -> None:
        """Collective. `every`: steps between two reports. `device`: where tensors for collectives live."""
        self.every, self.device = every, device
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.hosts: list[str] = [socket.gethostname()] * self.world
        if self.world > 1:
            dist.all_gather_object(self.hosts, socket.gethostname())
        self._clear()

    def _clear(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.ends: list[float] = []
        self.forwards: list[float | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Times the forward pass of the first micro-batch of a step: `with report.forward(): loss = model(...)`."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.forwards.append((start, end))
        else:
            begun = time.perf_counter()
            yield
            self.forwards.append(time.perf_counter() - begun)

    def record(self, step_seconds: float, data_seconds: float) -> None:
        """Once a step. `step_seconds`: host time from the last synchronisation to the first collective, data wait
        included; `data_seconds`: of these, the wait for batches."""
        self.times.append((data_seconds, step_seconds - data_seconds))
        self.ends.append(time.perf_counter())

    def report(self, step: int) -> dict[str, float] | None:
        """Every `every` steps: gather the means (16 bytes a rank), print worst against median, name the slowest rank.

        Collective: call it after each step on all ranks. Returns max/median of each number as metrics; None when no
        report is due, or there is nobody to compare with.
        """
        if step % self.every or len(self.times) < 2:
            return None
        mine = [*map(statistics.mean, zip(*self.times, strict=True)), self._forward_seconds(), self._step_seconds()]
        count = len(self.times)
        self._clear()
        if self.world == 1:
            return None
        local = torch.tensor(mine, device=self.device)
        gathered = [torch.empty_like(local) for _ in range(self.world)]
        dist.all_gather(gathered, local)
        *rows, steps = zip(*torch.stack(gathered).tolist(), strict=True)
        table = dict(zip(NAMES, rows, strict=True))
        medians = {name: statistics.median(row) for name, row in table.items()}
        ratios = {name: max(max(row), TICK) / max(medians[name], TICK) for name, row in table.items()}
        shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        print0(f"stragglers: {shown} (max/median of {self.world} ranks over {count} steps)")
        if line := slowest(table, statistics.median(steps), self.hosts):
            print0(line)
        return {RATIOS[name]: ratio for name, ratio in ratios.items()}

    def _forward_seconds(self) -> float:
        if not self.forwards:
            return 0.0
        return statistics.mean(
            pair if isinstance(pair, float) else _elapsed(*pair)  # waits for the device: once in `every` steps
            for pair in self.forwards
        )

    def _step_seconds(self) -> float:
        """Typical time from step to step: the median, which evaluations and checkpoints in between do not move."""
        return statistics.median(later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False))


def _elapsed(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000


def slowest(table: dict[str, tuple[float, ...]], step_seconds: float, hosts: list[str]) -> str | None:
    """One line that names the rank which costs the others the most; None where nobody stands out.

    `table`: name of a number -> seconds per step, by rank.
    """
    excess = {name: max(row) - statistics.median(row) for name, row in table.items()}
    out = [name for name, row in table.items() if max(row) > SLOW * statistics.median(row)]
    out = [name for name in out if excess[name] > NOTICEABLE * step_seconds]
    if not out:
        return None
    name = max(out, key=lambda name: excess[name])
    row = table[name]
    rank = row.index(max(row))
    share = min(excess[name] / step_seconds, 1.0)
    return (
        f"slowest: rank {rank} on {hosts[rank]}, {name} {row[rank]:.4f} s a step against a median of "
        f"{statistics.median(row):.4f} s: {100 * share:.0f} % of the step of {step_seconds:.4f} s"
    )
