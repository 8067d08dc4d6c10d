"""What ran: one JSON line for every start and end of a stage, in runs/<run id>/stages.jsonl.

Also what decides whether a stage must run again: fingerprints of files, and of the code that a stage runs.
"""

import ast
import glob
import hashlib
import itertools
import os
import pkgutil
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import paths
from nanochat.files import append_jsonl, content_hash, read_jsonl, walk
from nanochat.paths import REPO


class Stage(NamedTuple):
    """What is known of a stage beside its command, which is in dev/stages.sh."""

    needs: tuple[str, ...] = ()  # what it builds on: once one of these, or what those build on, ran again, it is stale
    column: str | None = None  # of the report's summary that its numbers are shown in
    optional: bool = False  # only large sources have it; where it did not run, nothing is pending
    results: str = ""  # glob of what it writes where it finds something to measure; {run}: name of the run


# Every stage in the order in which it runs and in which the report shows it.
STAGES = {
    "dataset": Stage(),
    "tok_train": Stage(("dataset",)),
    "tok_eval": Stage(("tok_train",)),
    "dataset_rest": Stage(optional=True),
    "eval_bundle": Stage(("dataset", "dataset_rest")),
    "base_train": Stage(("dataset_rest", "tok_train"), "BASE"),
    "base_loss": Stage(("base_train",), "BASE", results="base_loss/{run}_[0-9]*"),
    "base_eval": Stage(("base_train", "eval_bundle"), "BASE", results="base_eval/{run}_[0-9]*"),
    "chat_data": Stage(("dataset", "dataset_rest")),
    "mid_train": Stage(("base_train", "chat_data"), "MID"),
    "chat_eval_mid": Stage(("mid_train",), "MID", results="chat_eval/mid_{run}_[0-9]*"),
    "chat_sft": Stage(("mid_train",), "SFT"),
    "chat_eval_sft": Stage(("chat_sft",), "SFT", results="chat_eval/sft_{run}_[0-9]*"),
    "chat_rl": Stage(("chat_sft",), "RL"),
    "chat_eval_rl": Stage(("chat_rl",), "RL", results="chat_eval/rl_{run}_[0-9]*"),
}

# These describe a run and cannot change what a stage writes: editing the report must not retrain a model.
DESCRIBING_MODULES = frozenset(f"nanochat.{name}" for name in ("hardware", "ledger", "pipeline", "report", "sections"))

Record = dict[str, Any]
Fingerprint = dict[str, str]  # path as a reader would write it -> size and content hash
TEXT_HASH = "nanochat.data.local:text_hash"
STATUSES = frozenset({"started", "finished", "failed", "unfinished", "interrupted", "skipped"})


def ledger_path(run_dir: Path) -> Path:
    return run_dir / "stages.jsonl"


def append(run_dir: Path, record: Record) -> None:
    """Add one record and its time, and bring it to the disk."""
    append_jsonl(ledger_path(run_dir), {"time": time.time(), **record}, sync=True)


def read(run_dir: Path) -> list[Record]:
    """All records, oldest first. A line that a kill cut short, or that is no record at all, is passed over."""
    return [record for record in read_jsonl(ledger_path(run_dir)) if _is_record(record)]


def _is_record(record: Record) -> bool:
    stage, status, *numbers = (record.get(name) for name in ("stage", "status", "time"))
    numbers.append(record.get("seconds", 0))
    are_numbers = all(isinstance(number, int | float) and 0 <= number < 1e11 for number in numbers)  # nor NaN
    return are_numbers and isinstance(stage, str) and str(status) in STATUSES


def last_run(records: Sequence[Record], stage: str) -> Record | None:
    """The newest record of `stage` that does not just say that it was skipped."""
    own = (record for record in reversed(records) if record["stage"] == stage and isinstance(record.get("key"), str))
    return next((record for record in own if record["status"] != "skipped"), None)


def status_of(records: Sequence[Record], stage: str) -> str:
    """The status of `stage` as `summarize` gives it."""
    return next((str(row["status"]) for row in summarize(records) if row["stage"] == stage), "pending")


def summarize(records: Sequence[Record]) -> list[Record]:
    """One row a stage in the order of STAGES (unknown ones after them): its last record, with `seconds` over all
    attempts that belong to the same piece of work. The status is `pending` for stages that have not been reached, and
    `stale` for finished ones where something that they build on ran again later."""
    stale = _stale(records)
    names = [*STAGES, *sorted({record["stage"] for record in records} - STAGES.keys())]
    rows = []
    for name in names:
        own = [record for record in records if record["stage"] == name]
        if not own:
            if not STAGES[name].optional:
                rows.append({"stage": name, "status": "pending"})
            continue
        row = dict(own[-1])
        if row["status"] == "finished" and name in stale:
            row["status"] = "stale"
        work = [r for r in own if "seconds" in r and r.get("key") == row.get("key") and not r.get("copy")]
        if work:
            row["seconds"] = sum(record["seconds"] for record in work)
        rows.append(row)
    return rows


def _stale(records: Sequence[Record]) -> set[str]:
    """Stages whose last finish lies before the last work on something that they build on.

    A copy (the runner looked and found a stage done) renews the finish and is no work.
    """
    worked: dict[str, int] = {}  # stage -> place of the last work on it or on what it builds on; -1: none
    stale = set()
    for stage, (needs, *_) in STAGES.items():
        own = [(place, record) for place, record in enumerate(records) if record["stage"] == stage]
        below = max((worked[need] for need in needs), default=-1)
        finished = max((place for place, record in own if record["status"] == "finished"), default=-1)
        if finished < below:
            stale.add(stage)
        at_work = (place for place, record in own if record["status"] != "skipped" and not record.get("copy"))
        worked[stage] = max(below, max(at_work, default=-1))
    return stale


def span_seconds(records: Sequence[Record]) -> float:
    """Wall clock from the start of the first stage to the end of the last, pauses between calls included."""
    times = [record["time"] for record in records]
    return float(max(times) - min(times)) if times else 0.0


def fingerprint(patterns: Iterable[str]) -> Fingerprint:
    """Fingerprint of all files below `patterns`: files, folders or globs, relative to the store or absolute.

    A source of text, local:DIR, is one entry: its documents may be a million files.
    A pattern that matches nothing adds nothing; `missing` finds those.
    """
    base, patterns = paths.get_base_dir(), list(patterns)
    texts = {name: pkgutil.resolve_name(TEXT_HASH)(name) for name in patterns if name.startswith("local:")}
    files = sorted({file for pattern in patterns if pattern not in texts for file in _files(pattern)})
    names = [str(file.relative_to(base) if file.is_relative_to(base) else file) for file in files]
    with ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
        return texts | dict(zip(names, pool.map(_fingerprint_file, files), strict=True))


def missing(patterns: Iterable[str]) -> list[str]:
    """Those of `patterns` that match no file."""
    return [pattern for pattern in patterns if not pattern.startswith("local:") and not _files(pattern)]


def results(stage: str, run: str) -> str:
    """Glob of the results that this stage of a run has written besides its outputs; empty: none."""
    return STAGES.get(stage, Stage()).results.format(run=run)


def unchanged(outputs: object) -> bool:
    """True when every file of `outputs` is there as it was; what was added beside it does not matter."""
    base = paths.get_base_dir()
    marks = outputs.items() if isinstance(outputs, dict) else [("", "")]  # a damaged record: run again
    return all(os.path.isfile(base / name) and _fingerprint_file(base / name) == mark for name, mark in marks)


def _files(pattern: str) -> list[Path]:
    """Every file that `pattern` matches; files that are being written (.tmp) do not count."""
    path = Path(pattern).expanduser()
    root = Path("/") if path.is_absolute() else paths.artifact(path.parts[0]).parent
    path = path.relative_to(root) if path.is_absolute() else path
    tops = [root / name for name in ([path] if (root / path).exists() else glob.glob(str(path), root_dir=root))]
    below = [file for top in tops for file in (walk(top) if top.is_dir() else [top])]
    return sorted(file for file in below if file.is_file() and file.suffix != ".tmp")


def _fingerprint_file(path: Path) -> str:
    return f"{path.stat().st_size} {content_hash(path)[:16]}"


def stage_module(command: Sequence[str], root: Path = REPO) -> str | None:
    """The module of ours that `command` runs: the word after the first `-m` that names one, and not the launcher."""
    words = (word for flag, word in itertools.pairwise(command) if flag == "-m" and word != "nanochat.launch")
    return next((word for word in words if _module_file(word, root) is not None), None)


def code_version(module: str, root: Path = REPO) -> str:
    """Hash of all code that `module` runs, comments and layout left out: itself, what it imports from nanochat/ and
    scripts/ however deep, a .jsonl file of a module's name beside it, and the crate's sources where it is used."""
    parts: dict[str, bytes] = {}  # name of a module or file -> what of it counts
    queue = [module]
    while queue:
        name = queue.pop()
        file = _module_file(name, root)
        if name == "rustbpe":
            parts |= {str(source): source.read_bytes() for source in (root / "rustbpe" / "src").rglob("*.rs")}
        if file is None or name in parts or (name in DESCRIBING_MODULES and name != module):
            continue
        tree = ast.parse(file.read_bytes(), filename=str(file))
        data = file.with_suffix(".jsonl")
        parts[name] = ast.dump(tree).encode() + (data.read_bytes() if data.is_file() else b"")
        queue += _imports(tree, name)
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.removeprefix(str(root)).encode() + b"\n" + parts[name] + b"\n")
    return digest.hexdigest()[:16]


def _module_file(name: str, root: Path) -> Path | None:
    if name.split(".")[0] not in ("nanochat", "scripts"):
        return None
    path = root.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(tree: ast.AST, module: str) -> Iterable[str]:
    """Every module that `tree` may import, with the packages above it; relative imports are resolved. A string that
    names a module, as in the table of tasks, counts as an import of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            targets = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"nanochat(\.\w+)+(:\w+)?", str(node.value)):
            targets = [str(node.value).partition(":")[0]]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))
