"""Names of metrics: `Group/name`, or `Group/name/part` where one figure is taken of many parts.

A metric is declared where it is taken, `metric("Loss/train_loss", "mean cross-entropy of a step", "nats")`; what a
group is about is said here, and a name outside these groups is refused rather than filed by guess.
"""

from collections.abc import Iterable
from dataclasses import dataclass

GROUPS = {
    "Time": "How long things take, and tokens per second.",
    "Loss": "Losses, of training and held out; smaller is better.",
    "Optimization": "Learning rates, and norms of gradients.",
    "Model": "Norms of weights and of their updates.",
    "Hardware": "Memory, and how much of the arithmetic is used.",
    "Activations": "What layers put out.",
    "Eval": "Tasks that are solved or not.",
    "RL": "Rewards and what is sampled.",
    "Stragglers": "Slowest rank against the median.",
}


@dataclass(frozen=True)
class Metric:
    """What a figure means."""

    name: str
    """Group/name; each `Group/name/part` is a figure of this kind too."""
    meaning: str
    """One line."""
    unit: str
    """Empty for ratios and counts."""


_declared: dict[str, Metric] = {}


def metric(name: str, meaning: str, unit: str = "") -> str:
    """Declare a metric; returns its name. Raises ValueError for an unknown group, or two meanings of one name."""
    check([name])
    found = _declared.setdefault(name, Metric(name, meaning, unit))
    if found != Metric(name, meaning, unit):
        raise ValueError(f"metric {name} is declared twice: {found.meaning!r} and {meaning!r}")
    return name


def declared() -> dict[str, Metric]:
    """All that the modules imported so far have declared, by name."""
    return dict(_declared)


def check(names: Iterable[str]) -> None:
    """Raises ValueError, a developer's mistake, where a name is not `Group/name` with a group that is known."""
    for name in names:
        group, slash, rest = name.partition("/")
        if group not in GROUPS or not slash or not rest:
            raise ValueError(f"metric {name!r}: expected Group/name with a group of {', '.join(GROUPS)}")
