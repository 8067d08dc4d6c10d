"""Coordinate check: do activations keep their size when the model gets wider, at first and while it learns?

Models of several widths take the same few training steps; the mean |x| of what each module puts out is fitted against
width on logarithmic axes. Under muP the slope is 0 for all modules at all times, but for the logits, which may begin as
1/√width (microsoft/mup calls this gradient checking for muP). Bars, noise floor and statistics: Tensor Programs V
(arXiv 2203.03466, appendix D), and docs/decisions.md for what was measured here.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.files import read_jsonl
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.studies.figures import line_panels
from nanochat.train.coordinates import LOGITS, measure

Record = dict[str, Any]  # width, seed, module, t, l1, l2, mean, std
Batch = tuple[Tensor, Tensor]

HIDDEN_AT_INIT, HIDDEN, LOGITS_AT_END = 0.05, 0.10, 0.25  # most that a slope may be, either way
JUDGED = 11  # up to this t: ten updates
SP_AT_LEAST = 0.2  # slope that the standard parametrisation shows somewhere, if the check sees anything at all


# ---- measuring


def get_coord_data(
    models: dict[int, Callable[[int], GPT]],
    batches: Sequence[Batch],
    make_optimizer: Callable[[GPT], MuonAdamW],
    nsteps: int = 10,
    nseeds: int = 5,
) -> list[Record]:
    """Records of nseeds runs at each width. t = 1 is before any update, t = nsteps + 1 after nsteps of them.

    models: width -> (seed -> initialised model). batches: (inputs, targets) of (B, T), taken in turn; the batch of a
    step is measured before it is learned from. make_optimizer is called once a model.
    """
    records: list[Record] = []
    for width, make_model in models.items():
        for seed in range(nseeds):
            model = make_model(seed)
            optimizer = make_optimizer(model)
            for t in range(1, nsteps + 2):
                inputs, targets = batches[(t - 1) % len(batches)]
                for module, stats in measure(model, inputs).items():
                    records.append({"width": width, "seed": seed, "module": module, "t": t, **stats})
                if t <= nsteps:
                    model(inputs, targets).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
    return records


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Records of several runs' JSONL files; runs of one width count as seeds. Of a step measured twice (a run that was
    resumed), the last."""
    found: dict[tuple[Any, ...], Record] = {}
    runs: Counter[int] = Counter()
    for path in paths:
        records = read_jsonl(path)
        for record in records:
            record["seed"] = runs[record["width"]]
            found[record["width"], record["seed"], record["module"], record["t"]] = record
        runs.update({record["width"] for record in records})
    return list(found.values())


# ---- judging


class Slope(NamedTuple):
    """Of log2 of a module's statistic against log2 of the width, after t - 1 updates."""

    module: str
    t: int
    slope: float
    """Mean over seeds."""
    stderr: float
    """Of that mean; 0 for a single seed."""


def slopes(records: Sequence[Record], statistic: str = "l1") -> list[Slope]:
    """Least squares for each module, t and seed, then the mean over seeds.

    ValueError where an activation is zero or not finite: a slope of that would be 0, and say nothing; and where there
    are fewer than two widths, or a seed lacks one.
    """
    widths = sorted({record["width"] for record in records})
    if len(widths) < 2:
        raise ValueError(f"a slope needs two widths, here are {widths}")
    series: dict[tuple[str, int], dict[int, dict[int, float]]] = {}
    for record in records:
        value, where = record[statistic], f"{record['module']} at width {record['width']}, t = {record['t']}"
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{where}: {statistic} = {value}, so nothing can be told from it; draw all weights")
        series.setdefault((record["module"], record["t"]), {}).setdefault(record["seed"], {})[record["width"]] = value
    return [Slope(module, t, *_mean_slope(module, by_seed, widths)) for (module, t), by_seed in series.items()]


def _mean_slope(module: str, by_seed: dict[int, dict[int, float]], widths: list[int]) -> tuple[float, float]:
    """(mean, standard error) over the seeds."""
    x = torch.tensor(widths, dtype=torch.float64).log2()
    x = x - x.mean()
    found = []
    for seed, values in by_seed.items():
        if sorted(values) != widths:
            raise ValueError(f"{module}: seed {seed} has widths {sorted(values)}, not {widths}")
        y = torch.tensor([values[width] for width in widths], dtype=torch.float64).log2()
        found.append((x * y).sum() / x.square().sum())
    stacked = torch.stack(found)
    stderr = stacked.std().item() / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return stacked.mean().item(), stderr


def judge(found: Sequence[Slope]) -> list[str]:
    """What is wrong with slopes that should be those of muP; nothing if they are. Logits are judged after ten updates
    (fewer, if that is all there are), because at first they may fall as 1/√width; the rest up to then."""
    times = [slope.t for slope in found if slope.t <= JUDGED]
    if not times:
        raise UserError(f"no coordinates up to t = {JUDGED}, which the bars are for: record them at every step or so")
    last = max(times)
    wrong = []
    for slope in found:
        if slope.module == LOGITS:
            bar = LOGITS_AT_END if slope.t == last else math.inf
        else:
            bar = HIDDEN_AT_INIT if slope.t == 1 else HIDDEN if slope.t <= last else math.inf
        if abs(slope.slope) > bar:
            wrong.append(f"{slope.module} at t = {slope.t}: {slope.slope:+.3f} ± {slope.stderr:.3f}, bar {bar}")
    return wrong


def steepest(found: Sequence[Slope], logits: bool = False) -> Slope:
    """The largest slope either way, of the logits or of all else."""
    return max((slope for slope in found if (slope.module == LOGITS) == logits), key=lambda slope: abs(slope.slope))


def plot_coord_data(records: Sequence[Record], y: str = "l1", save_to: Path | None = None) -> str:
    """SVG, one panel for each t: the mean over seeds of statistic `y` against width, a curve a module."""
    values: dict[int, dict[str, dict[int, list[float]]]] = {}
    for record in records:
        curve = values.setdefault(record["t"], {}).setdefault(record["module"], {})
        curve.setdefault(record["width"], []).append(record[y])
    panels = {
        f"{y}, t = {t}": [
            (module, [(width, math.fsum(many) / len(many)) for width, many in sorted(points.items())])
            for module, points in modules.items()
        ]
        for t, modules in sorted(values.items())
    }
    svg = line_panels(panels, "width", f"mean over seeds of {y}", columns=3, log_axes="xy")
    if save_to is not None:
        save_to.write_text(svg)
    return svg


# ---- something to learn


def markov_batches(
    count: int,
    rows: int = 4,
    length: int = 64,
    vocab_size: int = 256,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Batch]:
    """`count` batches of (inputs, targets), each (rows, length) int64, of a source that can be learned: each token has
    four successors, of probabilities 0.5, 0.25, 0.125, 0.125 (1.21 nats a token)."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(vocab_size, (vocab_size, 4), generator=generator)
    odds = torch.tensor([0.5, 0.25, 0.125, 0.125])
    token = torch.randint(vocab_size, (count * rows,), generator=generator)
    columns = [token]
    for _ in range(length):
        choice = torch.multinomial(odds, len(token), replacement=True, generator=generator)
        token = successors[token, choice]
        columns.append(token)
    text = torch.stack(columns, dim=1).to(device)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in text.chunk(count)]
