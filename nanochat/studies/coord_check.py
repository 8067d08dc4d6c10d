"""Coordinate check: do activations keep their size when the model gets wider, at first and while it learns?

Models of several widths take the same few training steps; the mean |x| of what each module puts out is fitted against
width on logarithmic axes. Under muP the slope is 0 for all modules at all times, but for the logits, which may begin as
1/√width (microsoft/mup calls this gradient checking for muP). Bars, noise floor and statistics: Tensor Programs V
(arXiv 2203.03466, appendix D), and docs/decisions.md for what was measured here.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.parallel import disable_compile
from nanochat.studies.plot import LinePanel, Series, render_lines

Record = dict[str, Any]  # width, seed, module, t, l1, l2, mean, std
Batch = tuple[Tensor, Tensor]

COORD = "Activations/coord_l1"  # mean |x| of what a module puts out, on fixed rows
LOGITS = "lm_head"
WATCHED = ("attn", "attn.c_q", "attn.c_k", "attn.c_v", "mlp.c_fc", "mlp", "")  # within each block; "": what it puts out
HIDDEN_AT_INIT, HIDDEN, LOGITS_AT_END = 0.05, 0.10, 0.25  # most that a slope may be, either way
JUDGED = 11  # up to this t: ten updates
SP_AT_LEAST = 0.2  # slope that the standard parametrisation shows somewhere, if the check sees anything at all


# ---- measuring


def watched_modules(model: GPT) -> dict[str, nn.Module]:
    """What is measured, by the name that records give it: `wte`, `h.0.attn` (what attention adds to the stream),
    `h.0.mlp`, `h.0` (the stream behind block 0), queries, keys, values, MLP hidden units, and `lm_head`."""
    found: dict[str, nn.Module] = {"wte": model.transformer["wte"]}
    blocks: Any = model.transformer["h"]
    for index, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for part in WATCHED:
            if part in modules:
                found[".".join(filter(None, (f"h.{index}", part)))] = modules[part]
    return found | {LOGITS: model.lm_head}


@contextmanager
def watching(model: GPT) -> Iterator[dict[str, dict[str, float]]]:
    """Module -> statistics of what it puts out in the forward pass made meanwhile; hooks are gone afterwards.

    lm_head's output is taken times the model's logit multiplier, which lies outside the module. What is called a second
    time in the pass is `name#2`.
    """
    seen: dict[str, dict[str, float]] = {}
    calls: Counter[str] = Counter()

    def hook(name: str, factor: float) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"{name} puts out a {type(output).__name__}: the coordinate check reads tensors only")
            calls[name] += 1
            label = name if calls[name] == 1 else f"{name}#{calls[name]}"
            seen[label] = statistics(output.detach() * factor)

        return note

    handles = []
    try:
        for name, module in watched_modules(model).items():
            factor = model.config.logit_multiplier if name == LOGITS else 1.0
            handles.append(module.register_forward_hook(hook(name, factor)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def statistics(x: Tensor) -> dict[str, float]:
    """Over all coordinates: l1 = mean |x|, l2 = root mean square, mean and std."""
    x = x.float()
    stacked = torch.stack([x.abs().mean(), x.square().mean().sqrt(), x.mean(), x.std()])
    return dict(zip(("l1", "l2", "mean", "std"), stacked.tolist(), strict=True))


def measure(model: GPT, rows: Tensor) -> dict[str, dict[str, float]]:
    """Statistics of each watched module on rows (B, T), eagerly: compiled code would not call new hooks."""
    with torch.no_grad(), disable_compile(model), watching(model) as seen:
        model(rows)
    return seen


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


class CoordRecorder:
    """Coordinates during a real run: appends records to a JSONL file, which `scripts.coord_check --from` compares with
    those of runs at other widths."""

    def __init__(self, model: GPT, path: Path, rows: Tensor) -> None:
        """rows (B, T): the same at every step and width."""
        self.model, self.path, self.rows = model, path, rows

    def record(self, step: int) -> dict[str, float]:
        """Measure after `step` updates; returns mean |x| as metrics. Every rank must call it; the first one writes."""
        width = self.model.config.n_embd
        seen = measure(self.model, self.rows)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                for module, stats in seen.items():
                    file.write(json.dumps({"width": width, "seed": 0, "module": module, "t": step + 1, **stats}) + "\n")
        return {f"{COORD}/{module}": stats["l1"] for module, stats in seen.items()}


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Records of several runs' JSONL files; runs of one width count as seeds. Of a step measured twice (a run that was
    resumed), the last."""
    found: dict[tuple[Any, ...], Record] = {}
    runs: Counter[int] = Counter()
    for path in paths:
        records = [json.loads(line) for line in path.read_text().splitlines()]
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
    panels = []
    for t, modules in sorted(values.items()):
        curves = [
            Series(module, [(width, math.fsum(many) / len(many)) for width, many in sorted(points.items())])
            for module, points in modules.items()
        ]
        panels.append(LinePanel(f"{y}, t = {t}", "width", curves, log_x=True, log_y=True))
    svg = render_lines(panels, share_y=True)
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
