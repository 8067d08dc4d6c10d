"""What the benchmarks of the model share: clocks, a training step, and what a result says of where it was made."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat import cli, parallel
from nanochat.gpt import GPT
from nanochat.hardware import device_name, peak_flops, peak_memory_bytes
from nanochat.optim import MuonAdamW
from nanochat.runtime import print0, synchronize


def about(settings: Any, device: torch.device, without: tuple[str, ...] = ("out",)) -> dict[str, Any]:
    """Where and how a result was measured; `without`: settings that do not matter to it."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "settings": cli.as_dict(settings, without=without),
    }


# ---- single calls


class Times(NamedTuple):
    """Medians, in milliseconds a call."""

    device: float
    """Of the work itself."""
    host: float
    """Until the host had launched it; on a CPU the same."""


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int, queued: int = 10) -> Times:
    """What a call among `queued` in a row takes; the first of them all is not counted. On a GPU by its own clock and
    behind other work, as in training, where the device never waits for the host."""
    function()
    found = []
    for _ in range(repeats):
        keep_busy(device)
        begin, end = marks(device, 2)
        begin.record()
        start = time.perf_counter()
        for _ in range(queued):
            function()
        host = 1000 * (time.perf_counter() - start)
        end.record()
        end.synchronize()
        found.append((begin.elapsed_time(end) / queued, host / queued))
    return Times(*(statistics.median(times) for times in zip(*found, strict=True)))


def keep_busy(device: torch.device) -> None:
    """Gives a GPU some 60 ms of work on an H100, more than the host needs to launch what is timed behind it."""
    if device.type == "cuda":
        synchronize(device)
        square = torch.ones((8192, 8192), device=device, dtype=torch.bfloat16)
        for _ in range(40):
            torch.mm(square, square)


class HostMark:
    """A torch.cuda.Event where there is only the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: "HostMark") -> float:
        return 1000 * (later.at - self.at)


def marks(device: torch.device, count: int) -> list[Any]:
    return [torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostMark() for _ in range(count)]


# ---- training steps


@dataclass
class Step:
    """A compiled model and its optimizer on the same tokens (B, T) again and again."""

    model: GPT
    policy: parallel.Policy
    optimizer: MuonAdamW
    inputs: Tensor
    targets: Tensor
    micro_batches: int
    world: int = 1
    max_norm: float | None = 1.0

    def __post_init__(self) -> None:
        self.forward = parallel.compile_model(self.model, self.policy)
        self.tokens = self.micro_batches * self.inputs.numel() * self.world

    def __call__(self) -> tuple[float, float]:
        """One step; (seconds, those of the optimizer) on this rank."""
        device = self.inputs.device
        synchronize(device)
        start = time.perf_counter()
        for index in range(self.micro_batches):
            parallel.before_micro_batch(self.model, self.policy, last=index == self.micro_batches - 1)
            loss = self.forward(self.inputs, self.targets, loss_reduction="sum")
            (loss * (self.world / self.tokens)).backward()
        synchronize(device)  # so that the optimizer is timed alone; costs a step far less than a percent
        middle = time.perf_counter()
        self.optimizer.step(max_norm=self.max_norm)
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        end = time.perf_counter()
        return end - start, end - middle


def speed(step: Step, warm_up: int, steps: int, profile: bool) -> dict[str, Any]:
    """Medians over `steps` steps, the first `warm_up` left out: they compile. profile: print the kernels that take the
    time. MFU is over the bf16 peak of all ranks; None for a card that nanochat.hardware does not know."""
    device = step.inputs.device
    started = time.perf_counter()
    for _ in range(warm_up):
        step()
    warm_up_seconds = time.perf_counter() - started
    times = [step() for _ in range(steps)]
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
        print0(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=70))
    seconds = statistics.median(total for total, _ in times)
    rate, peak = step.tokens / seconds, peak_flops(device)
    return {
        "milliseconds": 1000 * seconds,
        "optimizer_milliseconds": 1000 * statistics.median(optimizer for _, optimizer in times),
        "tokens_per_second": rate,
        "mfu": step.model.estimate_flops() * rate / (peak * step.world) if peak else None,
        "matmul_mfu": step.model.estimate_flops(row_len=0) * rate / (peak * step.world) if peak else None,
        "peak_gib": peak_memory_bytes(device) / 2**30,
        "warm_up_seconds": warm_up_seconds,
    }
