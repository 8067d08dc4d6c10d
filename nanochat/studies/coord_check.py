"""Coordinate check: do activations keep their size when the model gets wider, at first and while it learns?

The mean |x| of each module's output is fitted against width on logarithmic axes. Under muP the slope is 0 for all
modules at all times, except for the logits, which may begin as 1/√width. Bars and statistics: Tensor Programs V (arXiv
2203.03466, appendix D), and docs/decisions.md for what was measured here.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat import cli, mup
from nanochat.config import LEARNING_RATES, ArchFlags, GPTConfig, InitSpec, build_config, resolve
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, read_jsonl
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.paths import run_dir
from nanochat.runtime import compute_cleanup, compute_init, print0
from nanochat.studies.figures import line_panels
from nanochat.studies.flags import SYMBOLS
from nanochat.studies.flags import CoordCheckSettings as Settings
from nanochat.studies.transfer import estimate
from nanochat.train.coordinates import LOGITS, measure

Record = dict[str, Any]  # width, seed, module, t, l1, l2, mean, std
Batch = tuple[Tensor, Tensor]

HIDDEN_AT_INIT, HIDDEN, LOGITS_AT_END = 0.05, 0.10, 0.25  # largest absolute slopes allowed
JUDGED = 11  # up to this t: ten updates
SP_AT_LEAST = 0.2  # slope that the standard parametrisation shows somewhere, if the check sees anything at all

VOCAB_SIZE, ROWS, SEQUENCE_LEN, HEAD_DIM = SYMBOLS, 8, 64, 64
HEAD_STD = 0.02  # the head must not begin at zero, where there is nothing to measure
RECORDS = "coord_check.jsonl"  # what base_train --coord-check writes into the folder of its run
SHOWN = (1, 2, 4, 8, 11)  # values of t in the table


# ---- measuring


def run_checks(settings: Settings) -> list[Record]:
    """Train the models of all widths and seeds."""
    *_, device = compute_init(settings.device_type)
    torch.set_float32_matmul_precision("highest")  # TF32 has three digits, and slopes are small
    try:
        widths = sorted({int(width) for width in settings.widths.split(",")})
    except ValueError:
        raise UserError(f"--widths={settings.widths}: give whole numbers, as in 128,256,512") from None
    configs = {width: _config(settings, width) for width in widths}
    spec = InitSpec(settings.init, 0, HEAD_STD, zero_proj=False)
    flags = resolve(ArchFlags(arch=settings.arch))
    options: Any = {name: getattr(flags, name) for name in LEARNING_RATES} | {"use_muon": settings.optimizer == "muon"}

    def make_model(width: int, seed: int) -> GPT:
        model = GPT(configs[width]).to(device)
        model.init_weights(spec, seed=seed)
        return model

    print0(mup.format_table(mup.as_records(GPT, configs[widths[-1]], options["use_muon"], spec)))
    batches = markov_batches(settings.steps + 1, ROWS, SEQUENCE_LEN, settings.symbols, device=device)
    models = {width: partial(make_model, width) for width in widths}
    return get_coord_data(
        models, batches, lambda model: model.setup_optimizer(**options), settings.steps, settings.seeds
    )


def _config(settings: Settings, width: int) -> GPTConfig:
    if width % HEAD_DIM or width < HEAD_DIM:
        raise UserError(f"--widths: {width} is no multiple of {HEAD_DIM}, the size of a head")
    flags = ArchFlags(
        arch=settings.arch,
        depth=settings.depth,
        width=width,
        head_dim=HEAD_DIM,
        max_seq_len=SEQUENCE_LEN,
        mup=settings.mup,
        base_width=settings.base_width if settings.mup else None,
        document_mask=False,
    )
    return build_config(resolve(flags), VOCAB_SIZE)


def get_coord_data(
    models: Mapping[int, Callable[[int], GPT]],
    batches: Sequence[Batch],
    make_optimizer: Callable[[GPT], MuonAdamW],
    nsteps: int = 10,
    nseeds: int = 5,
) -> list[Record]:
    """Records of nseeds runs at each width. t = 1 is before any update, t = nsteps + 1 after nsteps of them.

    models: width -> (seed -> initialised model). batches: (inputs, targets), each (B, T) int64, taken in turn; the
    batch of a step is measured before it is learned from. make_optimizer is called once a model.
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


def read_runs(folders: str) -> list[Record]:
    """What runs of base_train recorded: folders or run ids, with commas between them."""
    paths = []
    for name in folders.split(","):
        found = [path for path in (Path(name) / RECORDS, run_dir(name) / RECORDS) if path.is_file()]
        if not found:
            raise UserError(f"--from: there is no {Path(name) / RECORDS}, and no run {name} with one: --coord-check")
        paths.append(found[0])
    return read_records(paths)


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Records of several runs' JSONL files; runs of one width count as seeds. Where a resumed run measured a step
    twice, the last record counts."""
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
    slope: float  # mean over seeds
    stderr: float  # of that mean; 0 for a single seed


def slopes(records: Sequence[Record], statistic: str = "l1") -> list[Slope]:
    """Least squares for each module, t and seed, then the mean over seeds. ValueError where an activation is zero or
    not finite, where there are fewer than two widths, or where a seed lacks one."""
    widths = sorted({record["width"] for record in records})
    if len(widths) < 2:
        raise ValueError(f"a slope needs two widths, here are {widths}")
    series: defaultdict[tuple[str, int], dict[int, dict[int, float]]] = defaultdict(dict)
    for record in records:
        value, where = record[statistic], f"{record['module']} at width {record['width']}, t = {record['t']}"
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{where}: {statistic} = {value}, so nothing can be told from it; draw all weights")
        series[record["module"], record["t"]].setdefault(record["seed"], {})[record["width"]] = math.log2(value)
    found, places = [], [math.log2(width) for width in widths]
    for (module, t), by_seed in series.items():
        for seed, logs in by_seed.items():
            if sorted(logs) != widths:
                raise ValueError(f"{module}: seed {seed} has widths {sorted(logs)}, not {widths}")
        fits = [linear_regression(places, [logs[width] for width in widths]).slope for logs in by_seed.values()]
        found.append(Slope(module, t, fmean(fits), estimate(fits).stderr if len(fits) > 1 else 0.0))
    return found


def judge(found: Sequence[Slope]) -> list[str]:
    """What is wrong with slopes that should be those of muP; empty if nothing is. Logits are judged after ten updates
    (or the last recorded ones before that), because at first they may fall as 1/√width; the rest up to then."""
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


def judge_control(worst: Slope) -> list[str]:
    """What is wrong with the steepest slope of the standard parametrisation: that it is not steep."""
    if abs(worst.slope) >= SP_AT_LEAST:
        return []
    return [f"the standard parametrisation shows no slope beyond {worst.slope:+.3f} ({worst.module}): too weak a check"]


def steepest(found: Sequence[Slope], logits: bool = False) -> Slope:
    """The largest slope either way, of the logits or of all else."""
    return max((slope for slope in found if (slope.module == LOGITS) == logits), key=lambda slope: abs(slope.slope))


# ---- showing


def slope_table(found: Sequence[Slope]) -> str:
    """Modules down, t across."""
    times = sorted({slope.t for slope in found})
    shown = [t for t in times if t in SHOWN or t == times[-1]] if len(times) > len(SHOWN) else times
    cells = {(slope.module, slope.t): f"{slope.slope:+.3f} ± {slope.stderr:.3f}" for slope in found}
    lines = [f"{'slope of mean |x|':<18}" + "".join(f"{f't = {t}':>17}" for t in shown)]
    for module in dict.fromkeys(slope.module for slope in found):
        lines.append(f"{module:<18}" + "".join(f"{cells.get((module, t), '-'):>17}" for t in shown))
    return "\n".join(lines)


def plot_coord_data(records: Sequence[Record], y: str = "l1") -> str:
    """SVG, one panel for each t (of more than 12, evenly chosen ones): the mean over seeds of statistic `y` against
    width, a curve a module."""
    values: defaultdict[tuple[int, str, int], list[float]] = defaultdict(list)
    for record in records:
        values[record["t"], record["module"], record["width"]].append(record[y])
    times, modules, widths = (list(dict.fromkeys(parts)) for parts in zip(*values, strict=True))
    panels = {
        f"{y}, t = {t}": [
            (m, [(w, fmean(values[t, m, w])) for w in sorted(widths) if values[t, m, w]]) for m in modules
        ]
        for t in sorted(times)[:: math.ceil(len(times) / 12)]
    }
    return line_panels(panels, "width", f"mean over seeds of {y}", columns=3, log_axes="xy")


def main(settings: Settings) -> None:
    records = read_runs(settings.from_) if settings.from_ else run_checks(settings)
    try:
        found = slopes(records)
    except ValueError as error:
        raise UserError(str(error)) from error
    print0(slope_table(found))
    wrong = judge(found) if settings.mup else judge_control(steepest(found))
    for name, slope in (("besides the logits", steepest(found)), ("of the logits", steepest(found, logits=True))):
        print0(f"steepest {name}: {slope.slope:+.3f} ± {slope.stderr:.3f} ({slope.module}, t = {slope.t})")
    for line in wrong:
        print0(f"missed: {line}")
    print0("coordinate check: " + ("failed" if wrong else "passed"))
    result = {
        "settings": {name: str(value) for name, value in cli.as_dict(settings).items()},
        "slopes": [slope._asdict() for slope in found],
        "missed": wrong,
        "records": records,
    }
    files = {settings.out / "coord_check.json": json.dumps(result, indent=1)}
    files[settings.out / "coord_check.svg"] = plot_coord_data(records)
    for path, text in files.items():
        atomic_write_text(path, text)
    print0("wrote " + " and ".join(map(str, files)))
    compute_cleanup()
    if wrong:
        sys.exit(1)
