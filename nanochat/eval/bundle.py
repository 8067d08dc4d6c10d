"""Evaluation bundles in the published layout: what they hold, and reading one with all checks at once.

A bundle is a folder with `core.yaml` (the tasks), `eval_meta_data.csv` (random baseline of each task, in percent) and
`eval_data/<dataset_uri>` (JSONL, one item a line). Three kinds of task: `multiple_choice` (query, choices, gold),
`schema` (context_options, continuation, gold) and `language_modeling` (context, continuation).
"""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from nanochat.errors import UserError

PUBLISHED_TASKS = frozenset((
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
))  # fmt: skip
MARKER = "bundle.json"  # {"kind": "published" | "offline", "source": str, "tasks": [label]}; absent in older downloads
_FIELDS = {
    "multiple_choice": ("query", "choices"),
    "schema": ("context_options", "continuation"),
    "language_modeling": ("context", "continuation"),
}
_OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a bundle; `baseline` is the accuracy of guessing, in percent."""

    label: str
    kind: str
    num_fewshot: int
    delimiter: str
    baseline: float
    items: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle. `kind` is published, offline (generated here from held-out text) or custom."""

    kind: str
    source: str
    tasks: list[Task]

    @property
    def name(self) -> str:
        """How a score on this bundle must be called, so that no other number passes for CORE."""
        n, published = len(self.tasks), len(PUBLISHED_TASKS)
        if self.kind == "published":
            return "CORE" if n == published else f"CORE ({n} of {published} tasks)"
        return f"CORE-{self.kind} ({n} tasks)"


def load_bundle(path: Path) -> Bundle:
    """Read and check all of a bundle. Raises UserError, in one line, where something is missing or damaged."""
    hint = "make one with `python -m scripts.make_eval_bundle`"
    config, meta = path / "core.yaml", path / "eval_meta_data.csv"
    for file in (config, meta):
        if not file.is_file():
            raise UserError(f"no evaluation bundle: {file} is missing; {hint}")
    try:
        entries = yaml.safe_load(config.read_text(encoding="utf-8"))["icl_tasks"]
        with meta.open(encoding="utf-8", newline="") as stream:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(stream)}
        tasks = [_load_task(entry, baselines, path / "eval_data") for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"evaluation bundle {path} is damaged ({type(error).__name__}: {error}); {hint}") from error
    if not tasks:
        raise UserError(f"evaluation bundle {path} lists no tasks; {hint}")
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        raise UserError(f"evaluation bundle {path} lists a task twice; {hint}")
    kind, source = _read_marker(path)
    if any(label.startswith("offline_") for label in labels):
        kind = "offline"
    elif not set(labels) <= PUBLISHED_TASKS:
        kind = "custom"
    return Bundle(kind=kind, source=source, tasks=tasks)


def _read_marker(path: Path) -> tuple[str, str]:
    """(kind, source) from bundle.json; a bundle without one counts as published."""
    marker = path / MARKER
    if not marker.is_file():
        return "published", ""
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        kind, source = str(content["kind"]), str(content["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{marker} is damaged; make the bundle again with scripts.make_eval_bundle") from error
    return kind, source


def _load_task(entry: dict[str, Any], baselines: dict[str, float], data: Path) -> Task:
    shots = entry["num_fewshot"]
    label, kind = str(entry["label"]), str(entry["icl_task_type"])
    if kind not in _FIELDS:
        raise ValueError(f"task {label}: unknown icl_task_type {kind}")
    if label not in baselines:
        raise ValueError(f"task {label} has no row in eval_meta_data.csv")
    if not 0.0 <= baselines[label] < 100.0:
        raise ValueError(f"task {label}: random baseline {baselines[label]} is not in 0..100 %")
    return Task(
        label=label,
        kind=kind,
        num_fewshot=int(shots[0] if isinstance(shots, list) else shots),
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=baselines[label],
        items=_load_items(data / entry["dataset_uri"], kind),
    )


def _load_items(file: Path, kind: str) -> list[dict[str, Any]]:
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    lines = enumerate(file.read_text(encoding="utf-8").split("\n"), start=1)
    items = [_checked_item(line, kind, f"{file.name} line {number}") for number, line in lines if line.strip()]
    if not items:
        raise ValueError(f"{file.name} is empty")
    return items


def _checked_item(line: str, kind: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON") from error
    missing = [field for field in _FIELDS[kind] if field not in item]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if kind in _OPTIONS:
        options, gold = item[_OPTIONS[kind]], item.get("gold")
        if not isinstance(gold, int) or not 0 <= gold < len(options):
            raise ValueError(f"{where}: gold {gold} is not one of {len(options)} options")
    return item
