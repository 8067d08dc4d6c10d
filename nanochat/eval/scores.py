"""What CORE and the chat tasks share: records of all ranks, prompts in batches, accuracy and its error, files."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from nanochat.errors import UserError
from nanochat.files import atomic_write_text
from nanochat.runtime import Stopped, gather, interruptible

_Z95 = 1.959964  # standard errors from the centre of a normal distribution that hold 95 % of it
_BOOTSTRAP_DRAWS, _BOOTSTRAP_SEED = 10_000, 1234
_WIDTH = 64  # rows are padded to a multiple of this: few distinct shapes, little padding

Record = dict[str, Any]  # the outcome of one item, JSON-able
COLUMNS = ["Guessing %", "Guess", "Accuracy", "Standard error", "95 %", "Centered"]


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Score of one task; `records` has one record an item, with the key `outcome` saying whether it was right."""

    name: str
    baseline: float
    """Accuracy of guessing, between 0 and 1."""
    records: list[Record] = field(repr=False)
    guess: str = ""
    """How that is guessed, where it was measured: nanochat/eval/shortcuts.py."""
    outcome: ClassVar[str] = "passed"

    @property
    def n(self) -> int:
        """Items scored."""
        return len(self.records)

    @property
    def accuracy(self) -> float:
        return sum(record[self.outcome] for record in self.records) / self.n

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy: how much another draw of n items would move it. See mean_stderr."""
        return mean_stderr(self.accuracy * (1.0 - self.accuracy), self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        centre = (self.accuracy + _Z95**2 / (2 * self.n)) / (1 + _Z95**2 / self.n)
        half = _Z95 * mean_stderr(self.accuracy * (1.0 - self.accuracy), self.n, _Z95)
        return max(0.0, min(centre - half, self.accuracy)), min(1.0, max(centre + half, self.accuracy))

    @property
    def cells(self) -> list[object]:
        """Under COLUMNS in a table of the report."""
        interval = "{:.3f} to {:.3f}".format(*self.interval)
        return [round(100 * self.baseline, 6), self.guess, self.accuracy, self.stderr, interval, self.centered]

    @property
    def centered(self) -> float:
        """0 = guessing, 1 = perfect; 0 too where guessing is right always, as of items that all have one answer."""
        return (self.accuracy - self.baseline) / (1.0 - self.baseline) if self.baseline < 1.0 else 0.0

    @property
    def centered_stderr(self) -> float:
        return self.stderr / (1.0 - self.baseline) if self.baseline < 1.0 else 0.0

    def __str__(self) -> str:
        guess = f" ({100 * self.baseline:.4g} % by {self.guess})" if self.guess else ""
        return f"accuracy {self.accuracy:.4f} ± {self.stderr:.4f}, centered {self.centered:.4f}{guess}, {self.n} items"


@dataclass(frozen=True, kw_only=True)
class Composite:
    """Plain mean of the centred accuracies of some tasks; the name says which."""

    name: str
    tasks: Sequence[TaskScore]

    @property
    def value(self) -> float:
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def stderr(self) -> float:
        return math.sqrt(sum(task.centered_stderr**2 for task in self.tasks)) / len(self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the value by the bootstrap: the items of each task drawn again, as many, with repeats."""
        draws, total = np.random.default_rng(_BOOTSTRAP_SEED), np.zeros(_BOOTSTRAP_DRAWS)
        for task in self.tasks:
            outcomes, counts = np.unique([float(record[task.outcome]) for record in task.records], return_counts=True)
            # how often each outcome comes up among n items that are drawn again
            accuracy = draws.multinomial(task.n, counts / task.n, size=_BOOTSTRAP_DRAWS) @ outcomes / task.n
            total += (accuracy - task.baseline) / (1.0 - task.baseline) if task.baseline < 1.0 else 0.0
        low, high = np.quantile(total / len(self.tasks), (0.025, 0.975))
        return float(low), float(high)

    @property
    def n(self) -> int:
        return sum(task.n for task in self.tasks)

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.4f} ± {self.stderr:.4f}"


def mean_stderr(variance: float, n: int, z: float = 1.0) -> float:
    """Standard error of a mean of n values between 0 and 1: half of Wilson's interval at `z` of them, by `z`.

    That of 0 right out of 100 is .005; sqrt(variance / n) would be 0. In the middle both are the same to 1 / n.
    """
    return math.sqrt(variance / n + z**2 / (4 * n**2)) / (1 + z**2 / n)


def gather_records(measure: Callable[[], dict[int, Record]]) -> list[Record]:
    """The records that `measure` gives on each rank, in the order of their keys: the same list on every rank.

    Where it fails on one rank, or a signal stops one, all ranks raise: none goes on to wait for others that have left.
    """
    failure: Exception | Stopped | None = None
    records: dict[int, Record] = {}
    try:
        with interruptible():
            records = measure()
    except (Exception, Stopped) as error:
        failure = error
    problem = failure and (isinstance(failure, Stopped), f"{type(failure).__name__}: {failure}")
    everywhere = gather((records, problem))
    if failure is not None:
        raise failure
    for rank, (_, elsewhere) in enumerate(everywhere):
        if elsewhere is not None:
            raise Stopped if elsewhere[0] else UserError(f"rank {rank} could not go on: {elsewhere[1]}")
    found = {key: record for part, _ in everywhere for key, record in part.items()}
    return [found[key] for key in sorted(found)]


def longest_first(
    lengths: Sequence[int], limit: int, tokens: int, max_rows: int | None = None
) -> Iterator[tuple[list[int], int]]:
    """(row numbers, width) of each forward of at most `tokens` tokens and `max_rows` rows, but one row at least.

    The longest come first, so that running out of memory shows at once. `limit`: the largest width.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        width = min(-(-lengths[order[0]] // _WIDTH) * _WIDTH, limit)
        count = max(1, min(max_rows or len(order), tokens // width))
        yield order[:count], width
        order = order[count:]


def pad_rows(rows: Sequence[Sequence[int]], width: int, pad: int) -> torch.Tensor:
    """(B, width) int64: the rows, filled up with `pad` on the right."""
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long)


def write_scores(folder: Path, name: str, table: Sequence[Sequence[object]], scores: Sequence[TaskScore]) -> Path:
    """Write <name>.csv with `table` and <name>.jsonl with a line an item. Returns the CSV."""
    lines = (json.dumps({"task": score.name, **record}) for score in scores for record in score.records)
    atomic_write_text(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
    text = io.StringIO(newline="")
    csv.writer(text).writerows(table)
    atomic_write_text(folder / f"{name}.csv", text.getvalue())
    return folder / f"{name}.csv"
