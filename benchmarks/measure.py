"""What the benchmarks of the model share: clocks, and what a result says of where it was measured."""

import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any, NamedTuple

import torch

from nanochat import cli
from nanochat.cluster.stragglers import marks
from nanochat.hardware import device_name
from nanochat.runtime import synchronize


def about(settings: Any, device: torch.device, without: tuple[str, ...] = ("out",)) -> dict[str, Any]:
    """Where and how a result was measured; `without`: settings that do not matter to it."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "settings": cli.as_dict(settings, without=without),
    }


class Times(NamedTuple):
    """Medians, in milliseconds a call."""

    device: float  # of the work itself
    host: float  # until the host had launched it; on a CPU the same


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
