"""Learning rates and momentum over the length of a run, and how they follow from batch and horizon."""

import math
from collections.abc import Callable, Iterable
from typing import Any


def lr_multiplier(step: int, num_iterations: int, warmup: float, warmdown: float, final: float) -> float:
    """Trapezoid: linear up over the first `warmup` share of the steps, 1, then linear to `final` over the last
    `warmdown` share. Never 0 on the first step; `final` is what a step after the last one would get."""
    warmup_steps, warmdown_steps = round(warmup * num_iterations), round(warmdown * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = num_iterations - step
    if left > warmdown_steps:
        return 1.0
    return final + (1 - final) * (left / warmdown_steps)  # in this form it falls whatever the rounding


def muon_momentum(step: int, start: float = 0.85, end: float = 0.95, steps: int = 300) -> float:
    """Momentum ramp: the first gradients are poor guides, so the memory is short at first."""
    return start + (end - start) * min(step / steps, 1.0)


def make_schedule(
    num_iterations: int, warmup: float, warmdown: float, final: float
) -> Callable[[int], tuple[float, float]]:
    """step -> (learning-rate multiplier, Muon momentum) of a run."""
    return lambda step: (lr_multiplier(step, num_iterations, warmup, warmdown, final), muon_momentum(step))


def set_schedule(param_groups: Iterable[dict[str, Any]], multiplier: float, momentum: float) -> None:
    """Put this step's learning-rate multiplier and Muon momentum into an optimizer's parameter groups."""
    for group in param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = momentum


def window_length(step: int, num_iterations: int, full: int, first: int = 128) -> int:
    """How far long attention windows reach at this step, in tokens: from `first` in steps of it to `full`, linear over
    the run. Short windows cost less, and what is near is learnt first."""
    grown = full * step / max(num_iterations - 1, 1)
    return min(full, max(1, math.ceil(grown / first)) * first)


def batch_lr_scale(batch_tokens: int, horizon_tokens: float, tuned_batch: int, tuned_horizon: float) -> float:
    """Factor on all learning rates that were tuned at tuned_batch over tuned_horizon (config.TUNED_AT, in tokens):
    √(batch / B*), where B* is the batch that the horizon calls for.

    In a batch of B tokens the gradient noise goes with 1/√B, and so does the step that it allows (arXiv 2205.10287).
    But noise only matters beside the gradient itself, which is larger early on: B* grows with the length of the run,
    as horizon^0.383 (arXiv 2505.13738). Scaling by the batch alone, √(B/2^19), left a d12 after 300 steps of 65,536
    tokens at 1.540 bits per byte; this rule gives the rates that reached 1.325 (docs/decisions.md).
    """
    best_batch = tuned_batch * (horizon_tokens / tuned_horizon) ** 0.383
    return math.sqrt(batch_tokens / best_batch)
