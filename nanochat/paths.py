"""Every path of the artifact store, in one place.

The store is `$NANOCHAT_BASE_DIR` (default `~/.cache/nanochat`); each stage reads and writes only below it.
"""

import os
import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent  # this program's own folder


def get_base_dir() -> Path:
    """Root of the artifact store, created on first use."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR", "~/.cache/nanochat")).expanduser()
    base.mkdir(parents=True, exist_ok=True)
    return base


def slug(name: str) -> str:
    """`name` as a safe folder name: `local:/data/x` -> `local-data-x`."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-")


def data_dir(source: str) -> Path:
    """Parquet shards of one text source."""
    return get_base_dir() / "base_data" / slug(source)


def tokenizer_dir() -> Path:
    return get_base_dir() / "tokenizer"


def eval_bundle_dir() -> Path:
    """CORE data in the published layout: core.yaml, eval_meta_data.csv, eval_data/."""
    return get_base_dir() / "eval_bundle"


def checkpoint_dir(stage: str, tag: str) -> Path:
    """Checkpoints of one run of one training stage (base, mid, sft, rl); steps are folders below."""
    return get_base_dir() / "checkpoints" / stage / slug(tag)


def run_id() -> str:
    """Name of the current run: set by the pipeline in NANOCHAT_RUN_ID; `adhoc` for a script started by hand."""
    return slug(os.environ.get("NANOCHAT_RUN_ID", "adhoc"))


def run_dir(run: str | None = None) -> Path:
    """Ledger, metrics, logs and report sections of one run."""
    return get_base_dir() / "runs" / (slug(run) if run else run_id())


def report_dir() -> Path:
    """The finished report of the current run."""
    return get_base_dir() / "report"


def task_data_dir() -> Path:
    """Items of chat tasks: hub/ as downloaded, and a folder for each text source that tasks were made from."""
    return get_base_dir() / "task_data"
