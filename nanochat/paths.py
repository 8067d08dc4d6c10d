"""Every path of the artifact store, in one place.

The store is `$NANOCHAT_BASE_DIR` (default `~/.cache/nanochat`); each stage reads and writes only below it.
"""

import contextlib
import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from nanochat.errors import UserError

LONGEST_NAME = 200  # bytes of a folder name: file systems take 255, and `.1` or a step may come behind it
REPO = Path(__file__).resolve().parent.parent  # this program's own folder


# What another run may replace while this one reads it: each run of the pipeline has its own copy (nanochat.pipeline
# makes it), and the store has the newest, for commands typed by hand.
OWN = ("tokenizer", "eval_bundle", "task_data")


def get_base_dir() -> Path:
    """Root of the artifact store, created on first use. Raises UserError where that cannot be."""
    name = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    try:
        base = Path(name).expanduser()
        base.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where HOME is
        reason = (
            "is no folder" if isinstance(error, FileExistsError | NotADirectoryError) else f"cannot be made: {error}"
        )
        raise UserError(f"NANOCHAT_BASE_DIR={name} {reason}; set it to a folder that you can write") from None
    return base


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in the one where it would be made."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def check_writable(folder: Path) -> None:
    """Raises UserError where nothing can be written into `folder`: before the work, rather than after it."""
    if not is_writable(folder):
        raise UserError(f"{folder} cannot be written: set NANOCHAT_BASE_DIR to a folder that you can write")


def check_folders(names: Iterable[str]) -> None:
    """Raises UserError where a file of the store is in the place of one of these folders: before the work, too."""
    for path in (get_base_dir() / name for name in sorted(names)):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, in the place of a folder: move it, or set NANOCHAT_BASE_DIR elsewhere")


def slug(name: str) -> str:
    """`name` as the name of one folder, which no other name has: letters and digits of any script, `.`, `_` and `-` are
    kept. Where anything else was replaced, or the name is empty, hidden or too long, a hash of it comes behind."""
    name = unicodedata.normalize("NFC", name)
    kept = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in name)
    kept = re.sub(" +", "-", kept.strip(" ")).lstrip(".-")
    if kept == name != "" and len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept.encode()[: LONGEST_NAME - 9].decode('utf-8', 'ignore')}-{digest}".lstrip("-")


@functools.cache
def _own(folder: Path) -> Path:
    """`folder`. Raises UserError where it is another's, whose name differs in case only, on a file system that takes
    the two for one (of macOS and Windows, SMB, memory cards)."""
    with contextlib.suppress(OSError):  # this one may not be listed
        names = {unicodedata.normalize("NFC", name) for name in os.listdir(folder.parent)}
        if folder.exists() and folder.name not in names:
            other = next((name for name in names if name.casefold() == folder.name.casefold()), "another name")
            raise UserError(
                f"{folder} is the folder of {other}: this file system takes them for one; choose another name"
            )
    return folder


def data_dir(source: str) -> Path:
    """Parquet shards of one text source."""
    return _own(get_base_dir() / "base_data" / slug(source))


def artifact(name: str) -> Path:
    """A folder of the store; of those in OWN the copy of the run that NANOCHAT_RUN_ID names, once it has one."""
    own = run_dir() / name
    is_own = name in OWN and os.environ.get("NANOCHAT_RUN_ID") and own.is_dir()
    return own if is_own else get_base_dir() / name


def tokenizer_dir() -> Path:
    return artifact("tokenizer")


def eval_bundle_dir() -> Path:
    """CORE data in the published layout: core.yaml, eval_meta_data.csv, eval_data/."""
    return artifact("eval_bundle")


def checkpoint_dir(stage: str, tag: str) -> Path:
    """Checkpoints of one run of one training stage (base, mid, sft, rl); steps are folders below."""
    return _own(get_base_dir() / "checkpoints" / stage / slug(tag))


def run_id() -> str:
    """Name of the current run: set by the pipeline in NANOCHAT_RUN_ID; `adhoc` for a script started by hand."""
    return slug(os.environ.get("NANOCHAT_RUN_ID") or "adhoc")


def run_dir(run: str | None = None) -> Path:
    """Ledger, metrics, logs and report sections of one run."""
    return _own(get_base_dir() / "runs" / (slug(run) if run else run_id()))


def report_dir() -> Path:
    """The finished report of the current run."""
    return get_base_dir() / "report"


def task_data_dir() -> Path:
    """Items of chat tasks: hub/ as downloaded, and a folder for each text source that tasks were made from."""
    return artifact("task_data")
