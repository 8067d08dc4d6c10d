"""Flags of the width studies, without torch (see nanochat.flags)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from nanochat.cli import float_flag, int_flag
from nanochat.config import Arch, Init
from nanochat.data.sources import source_flag
from nanochat.flags import DeviceFlags

Sweep = Literal["all", "matrix", "embedding", "head"]
SYMBOLS = 256  # of the text that coord_check makes, at most


@dataclass(frozen=True, kw_only=True)
class CoordCheckSettings(DeviceFlags):
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
    symbols: Annotated[int, int_flag(gte=4, lte=SYMBOLS)] = 32
    """Different tokens in the text; when there are as many as the narrowest width, they disturb each other there."""
    from_: Annotated[str | None, Parameter(name="--from")] = None
    """Compare these runs of base_train --coord-check instead: folders with a coord_check.jsonl, or run ids."""
    out: Path = Path("coord_check")
    """Folder for the results."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What runs must have in common to be compared."""

    # ---- what is swept
    base_width: Annotated[int, int_flag(gte=1)] = 128
    """Width whose best rate is carried over to the others; one of them."""
    sweep: Sweep = "all"
    """Which rates the factors go to: all, or those of the matrices, the embeddings or the head alone."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Of the matrices."""

    # ---- each run
    arch: Arch = "nanochat"
    """Architecture, as --arch of base_train."""
    depth: Annotated[int, int_flag(gte=1, lte=128)] = 6
    """Transformer layers."""
    head_dim: Annotated[int, int_flag(gte=2)] = 64
    """Width of one attention head."""
    max_seq_len: Annotated[int, int_flag(gte=1)] = 512
    """Tokens in a row."""
    steps: Annotated[int, int_flag(gte=1)] = 500
    """Optimizer steps."""
    total_batch_size: Annotated[int, int_flag(gte=1)] = 32_768
    """Tokens per step, a multiple of max_seq_len."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 64
    """Rows per forward pass, at most."""
    eval_tokens: Annotated[int, int_flag(gte=1)] = 524_288
    """Validation tokens that the loss is measured on."""
    source: Annotated[str, source_flag("bin:DIR, token files, or text as fetched by nanochat.dataset")] = "fineweb-edu"


@dataclass(frozen=True, kw_only=True)
class TransferSettings(SweepSettings, DeviceFlags):
    """Sweep learning rates over widths and judge whether the optimum stays where it is."""

    # ---- the sweep
    widths: str = "128,256,512,1024"
    """Widths to train, multiples of head_dim."""
    multipliers: str = "0.125,0.25,0.5,1,2,4,8"
    """Factors on the rates of --arch (scaled to batch and horizon as in base_train)."""
    seeds: Annotated[int, int_flag(gte=1)] = 3
    """Runs of each, which differ in their first weights and their text."""
    control: bool = False
    """Train the standard parametrisation as well, with the base width's rates at every width."""

    # ---- the session
    out: str | None = None
    """Folder of runs, tables and plots; default: transfer/ of the current run."""
    report_only: bool = False
    """Train nothing; show what is there of --widths, --multipliers and --control. The rest is as the runs had it."""
    time_budget_minutes: Annotated[float, float_flag(gte=0)] = 0.0
    """Start no run that would end after so many minutes; 0: no limit."""
    compare_runs: str = ""
    """Instead of a sweep: tags of finished runs of base_train, one for each of --widths; is wider better?"""
