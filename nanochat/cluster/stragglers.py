"""Which rank holds the others up: per-rank times, gathered every so many steps.

A step takes equally long on all ranks: the fast ones wait in collectives for the slow one. Only time that a rank spends
before it waits for anybody can tell (none of these shows a slow link):

- data wait: host time until the next batches were there. Shows slow storage, a slow tokenizer thread.
- host: the rest of the host time up to the first collective. Shows what else keeps Python busy on one rank.
- forward: the first micro-batch's forward pass, on a GPU by events on its stream. Shows a slow GPU or CPU. Under FSDP,
  which gathers weights in it, a slow rank shows on all: compare matmul TFLOP/s there (nanochat.cluster.preflight).
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist

from nanochat.runtime import gather, print0

NAMES = ("data wait", "host", "forward")
EVERY = 100  # steps: a mean that one pause does not make, and the wait for the device it costs is spread thin
SLOW = 1.10  # over the median: healthy cards of one model differ by some per cent in clock rate under one power limit
NOTICEABLE = 0.01  # of the step: a rank that is 10 % over a median of microseconds costs nobody anything
TICK = 1e-3  # seconds; below it the scheduler of the host decides, and ratios say nothing


class StragglerReport:
    """Collects times on each rank; `report` is collective, the rest is local and waits for nothing."""

    def __init__(self, device: torch.device, every: int = EVERY) -> None:
        """Collective. `every`: steps between two reports. `device`: where tensors for collectives live."""
        self.every, self.device = every, device
        self.hosts = gather(socket.gethostname())
        self.world = len(self.hosts)
        self._clear()

    def _clear(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.ends: list[float] = []
        self.forwards: list[tuple[Any, Any]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Times the forward pass of the first micro-batch of a step."""
        start, end = marks(self.device, 2)
        start.record()
        yield
        end.record()
        self.forwards.append((start, end))

    def record(self, step_seconds: float, data_seconds: float) -> None:
        """Once a step: see Observer.before_collective."""
        self.times.append((data_seconds, step_seconds - data_seconds))
        self.ends.append(time.perf_counter())

    def report(self, step: int) -> dict[str, float]:
        """Every `every` steps: gather the means (16 bytes a rank), print worst against median, name the slowest rank.

        Collective: call it after each step on all ranks. Returns max/median of each number as metrics; none when no
        report is due, or there is nobody to compare with.
        """
        if step % self.every or len(self.times) < 2:
            return {}
        steps = [later - earlier for earlier, later in zip(self.ends, self.ends[1:], strict=False)]
        if self.forwards:
            self.forwards[-1][1].synchronize()  # waits for the device: once in `every` steps
        forwards = [start.elapsed_time(end) / 1000 for start, end in self.forwards]
        local = [*map(mean, zip(*self.times, strict=True)), mean(forwards or [0.0]), median(steps)]
        self._clear()
        if self.world == 1:
            return {}
        gathered = torch.empty(self.world * len(local), device=self.device)
        dist.all_gather_into_tensor(gathered, torch.tensor(local, device=self.device))
        *rows, step_seconds = gathered.view(self.world, -1).T.tolist()
        table = dict(zip(NAMES, rows, strict=True))
        ratios = {name: max(max(row), TICK) / max(median(row), TICK) for name, row in table.items()}
        shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        print0(f"stragglers: {shown} (max/median of {self.world} ranks over {len(steps) + 1} steps)")
        # The median step, which evaluations and checkpoints in between do not move
        if line := slowest(table, median(step_seconds), self.hosts):
            print0(line)
        return {f"Stragglers/{name.replace(' ', '_')}_max_over_median": ratio for name, ratio in ratios.items()}


class HostMark:
    """A torch.cuda.Event where there is only the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: "HostMark") -> float:
        return 1000 * (later.at - self.at)


def marks(device: torch.device, count: int) -> list[Any]:
    """To be recorded on the device's stream; the time between two is in milliseconds."""
    return [torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostMark() for _ in range(count)]


def slowest(table: dict[str, list[float]], step_seconds: float, hosts: list[str]) -> str | None:
    """One line that names the rank which costs the others the most; None where nobody stands out.

    `table`: name of a number -> seconds per step, by rank.
    """
    excess = {
        name: max(row) - median(row)
        for name, row in table.items()
        if max(row) > SLOW * median(row) and max(row) - median(row) > NOTICEABLE * step_seconds
    }
    if not excess:
        return None
    name = max(excess, key=lambda name: excess[name])
    row = table[name]
    rank = row.index(max(row))
    return (
        f"slowest: rank {rank} on {hosts[rank]}, {name} {row[rank]:.4f} s a step against a median of {median(row):.4f} "
        f"s: {100 * min(excess[name] / step_seconds, 1.0):.0f} % of the step of {step_seconds:.4f} s"
    )
