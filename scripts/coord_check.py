"""Coordinate check: the size of activations against width, before and while models learn.

    python -m scripts.coord_check --widths=128,256,512,1024 --steps=10 --seeds=5
    python -m scripts.coord_check --no-mup
    python -m scripts.coord_check --from=w256,w512,w1024

Small models on a text that can be learned (a Markov chain), in fp32; nothing begins at zero, or there would be nothing
to see. Prints the slopes of log2 mean |x| against log2 width and what is wrong with them; writes coord_check.json and
coord_check.svg. Ends with 1 where the bars are missed. --from compares what runs of base_train --coord-check left.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from nanochat import cli, mup
from nanochat.arch import ARCH_RATES, RATES, Arch, arch_config
from nanochat.cli import float_flag, int_flag
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.model_config import GPTConfig, Init, InitSpec
from nanochat.optim import MuonAdamW
from nanochat.runtime import DeviceType, compute_cleanup, compute_init, print0
from nanochat.studies import coord_check
from nanochat.studies.coord_check import Record, Slope
from nanochat.train.run_log import log_dir

VOCAB_SIZE, SEQUENCE_LEN, HEAD_DIM = 256, 64, 64
RECORDS = "coord_check.jsonl"  # what base_train --coord-check writes into its folder
SHOWN = (1, 2, 4, 8, 11)  # t


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Check that activations keep their size at every width."""

    widths: str = "128,256,512,1024"
    """Widths to compare, multiples of 64."""
    steps: Annotated[int, int_flag(gte=0)] = 10
    """Updates of each model."""
    seeds: Annotated[int, int_flag(gte=1)] = 5
    """Models of each width."""
    mup: bool = True
    """False: the standard parametrisation, the negative control: it should miss the bars."""
    base_width: Annotated[int, int_flag(gte=64)] = 128
    """Width at which muP is the standard parametrisation."""
    arch: Arch = "nanochat"
    """Architecture, as in base_train; document masks are left out."""
    depth: Annotated[int, int_flag(gte=1)] = 2
    """Transformer layers."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the hidden matrices."""
    init: Init = "uniform"
    """How hidden matrices are drawn."""
    head_std: Annotated[float, float_flag(gte=0)] = 0.02
    """Standard deviation of the head."""
    lr_scale: Annotated[float, float_flag(gte=0)] = 1.0
    """Factor on all learning rates of the architecture; higher ones show more, noise too."""
    symbols: Annotated[int, int_flag(gte=4, lte=VOCAB_SIZE)] = 32
    """Different tokens in the text; with as many as the narrowest width they are in each other's way there alone."""
    rows: Annotated[int, int_flag(gte=1)] = 8
    """Rows of 64 tokens in a step."""
    from_: Annotated[str | None, Parameter(name="--from")] = None
    """Folders with the coord_check.jsonl of runs, to compare these instead."""
    out: Path = Path("coord_check")
    """Folder that the results go to."""
    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""


def config_at(settings: Settings, width: int) -> GPTConfig:
    if width % HEAD_DIM or width < HEAD_DIM:
        raise UserError(f"--widths: {width} is no multiple of {HEAD_DIM}, the size of a head")
    return arch_config(
        settings.arch,
        n_layer=settings.depth,
        n_embd=width,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB_SIZE,
        sequence_len=SEQUENCE_LEN,
        mup_base_width=settings.base_width if settings.mup else 0,
        document_mask=False,
    )


def init_spec(settings: Settings, seed: int) -> InitSpec:
    return InitSpec(settings.init, seed, settings.head_std, zero_proj=False)


def run_checks(settings: Settings) -> list[Record]:
    """Train the models of all widths and seeds."""
    *_, device = compute_init(settings.device_type)
    torch.set_float32_matmul_precision("highest")  # TF32 has three digits, and slopes are small
    try:
        widths = sorted({int(width) for width in settings.widths.split(",")})
    except ValueError:
        raise UserError(f"--widths={settings.widths}: give whole numbers, as in 128,256,512") from None
    configs = {width: config_at(settings, width) for width in widths}
    use_muon = settings.optimizer == "muon"
    print0(mup.format_table(mup.as_records(configs[widths[-1]], use_muon, init_spec(settings, 0))))

    def maker(config: GPTConfig) -> Callable[[int], GPT]:
        def make(seed: int) -> GPT:
            model = GPT(config).to(device)
            spec = init_spec(settings, seed)
            model.init_weights(spec.init, spec.seed, spec.head_std, spec.zero_proj, spec.gain)
            return model

        return make

    def make_optimizer(model: GPT) -> MuonAdamW:
        rates = {name: ARCH_RATES[settings.arch][name] * settings.lr_scale for name in RATES}
        return model.setup_optimizer(**rates, use_muon=use_muon)

    batches = coord_check.markov_batches(
        settings.steps + 1, settings.rows, SEQUENCE_LEN, settings.symbols, device=device
    )
    models = {width: maker(config) for width, config in configs.items()}
    return coord_check.get_coord_data(models, batches, make_optimizer, settings.steps, settings.seeds)


def read_runs(folders: str) -> list[Record]:
    """What runs of base_train left: folders, or names of runs below logs/ in the store."""
    paths = []
    for name in folders.split(","):
        path = Path(name) / RECORDS
        if not path.is_file() and (log_dir(name) / RECORDS).is_file():
            path = log_dir(name) / RECORDS
        paths.append(path)
        if not path.is_file():
            raise UserError(f"--from: there is no {path}; train with --coord-check")
    return coord_check.read_records(paths)


def slope_table(found: list[Slope]) -> str:
    """Modules down, t across."""
    times = sorted({slope.t for slope in found})
    shown = [t for t in times if t in SHOWN or t == times[-1]] if len(times) > len(SHOWN) else times
    cells = {(slope.module, slope.t): f"{slope.slope:+.3f} ± {slope.stderr:.3f}" for slope in found}
    lines = [f"{'slope of mean |x|':<18}" + "".join(f"{f't = {t}':>17}" for t in shown)]
    for module in dict.fromkeys(slope.module for slope in found):
        lines.append(f"{module:<18}" + "".join(f"{cells.get((module, t), '-'):>17}" for t in shown))
    return "\n".join(lines)


def verdict(found: list[Slope], is_mup: bool) -> list[str]:
    """What is wrong: slopes beyond the bars under muP; a negative control that shows nothing."""
    if is_mup:
        return coord_check.judge(found)
    worst = coord_check.steepest(found)
    if abs(worst.slope) >= coord_check.SP_AT_LEAST:
        return []
    return [f"the standard parametrisation shows no slope beyond {worst.slope:+.3f} ({worst.module}): too weak a check"]


def main(settings: Settings) -> None:
    records = read_runs(settings.from_) if settings.from_ else run_checks(settings)
    try:
        found = coord_check.slopes(records)
    except ValueError as error:
        raise UserError(str(error)) from error
    print0(slope_table(found))
    wrong = verdict(found, settings.mup)
    hidden, logits = coord_check.steepest(found), coord_check.steepest(found, logits=True)
    for name, slope in (("besides the logits", hidden), ("of the logits", logits)):
        print0(f"steepest {name}: {slope.slope:+.3f} ± {slope.stderr:.3f} ({slope.module}, t = {slope.t})")
    for line in wrong:
        print0(f"missed: {line}")
    print0("coordinate check: " + ("failed" if wrong else "passed"))
    settings.out.mkdir(parents=True, exist_ok=True)
    result = {
        "settings": {name: str(value) for name, value in cli.as_dict(settings).items()},
        "slopes": [slope._asdict() for slope in found],
        "missed": wrong,
        "records": records,
    }
    (settings.out / "coord_check.json").write_text(json.dumps(result, indent=1))
    coord_check.plot_coord_data(records, save_to=settings.out / "coord_check.svg")
    print0(f"wrote {settings.out / 'coord_check.json'} and {settings.out / 'coord_check.svg'}")
    compute_cleanup()
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Settings)
