"""Evaluation bundles in the published layout: what they hold, and reading one with all checks at once.

A bundle is a folder with `core.yaml` (the tasks), `eval_meta_data.csv` (random baseline of each task, in percent) and
`eval_data/<dataset_uri>` (JSONL, one item a line). Three kinds of task: `multiple_choice` (query, choices, gold),
`schema` (context_options, continuation, gold) and `language_modeling` (context, continuation).
"""

import csv
import dataclasses
import io
import itertools
import os
from pathlib import Path
from typing import Any

import yaml

from nanochat.errors import UserError
from nanochat.files import fields, inside, parse_json

PUBLISHED_TASKS = frozenset((
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa",
    "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages",
    "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa",
    "boolq", "bigbench_language_identification",
))  # fmt: skip
TABLES = ("core.yaml", "eval_meta_data.csv")
MARKER = "bundle.json"  # {"kind": "published" | "offline", "source", "tasks": [label], "left_out": [str]}
_FIELDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"query": str, "choices": list[str], "gold": int},
    "schema": {"context_options": list[str], "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}
_KINDS = ("published", "offline", "custom")
_MOST_SHOTS = 1000
_MOST_YAML = 2**18  # the published core.yaml has 5 KB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a bundle; `baseline` is the accuracy of guessing, in percent; `uri` names the file in eval_data/."""

    label: str
    kind: str
    num_fewshot: int
    delimiter: str
    baseline: float
    items: list[dict[str, Any]]
    uri: str = ""
    guess: str = ""
    """How that is guessed, where it was measured: nanochat/eval/shortcuts.py."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle. `kind` is published, offline (generated here from held-out text) or custom."""

    kind: str
    source: str
    tasks: list[Task]
    left_out: list[str] = dataclasses.field(default_factory=list)
    """`task: why`, of those that the text has too little for. A bundle made from text may have no other ones."""

    @property
    def notes(self) -> list[str]:
        """What the log and the report say of tasks that are left out."""
        none = [] if self.tasks else ["No CORE task could be made from this text; everything else goes on."]
        return none + [f"Left out: {reason}" for reason in self.left_out]

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
    for file in (path / name for name in TABLES):
        if not file.is_file():
            raise UserError(f"no evaluation bundle: {file} is missing; {hint}")
    try:
        (entries,) = fields(_yaml(_text(path, TABLES[0])), icl_tasks=list)
        rows = csv.DictReader(io.StringIO(_text(path, TABLES[1]), newline=""))
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
        tasks = [_load_task(entry, baselines, inside(path, "eval_data")) for entry in entries]
    except (UserError, yaml.YAMLError, csv.Error, LookupError, TypeError, AttributeError, ValueError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        raise UserError(f"evaluation bundle {path} is damaged ({reason}); {hint}") from None
    except RecursionError:
        raise UserError(f"evaluation bundle {path} is damaged ({TABLES[0]} is nested too deeply); {hint}") from None
    kind, source, left_out = _read_marker(path)
    if not tasks and not left_out:
        raise UserError(f"evaluation bundle {path} lists no tasks; {hint}")
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        raise UserError(f"evaluation bundle {path} lists a task twice; {hint}")
    if any(label.startswith("offline_") for label in labels):
        kind = "offline"
    elif tasks and not set(labels) <= PUBLISHED_TASKS:
        kind = "custom"
    return Bundle(kind=kind, source=source, tasks=tasks, left_out=left_out)


def _text(path: Path, name: str) -> str:
    try:
        return inside(path, name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: {error}") from None


def _yaml(text: str) -> Any:
    """The value of a YAML text. Raises UserError where it, or what its aliases and merge keys stand for, is larger than
    any bundle's: 30 lists of the one before twice would take minutes and all memory."""
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node() if len(text) <= _MOST_YAML else None
    if len(text) > _MOST_YAML or _written_out(node, {}) > _MOST_YAML:
        raise UserError(f"{TABLES[0]} has more than {_MOST_YAML:,} characters, or values once aliases are written out")
    return loader.construct_document(node) if node is not None else None


def _written_out(node: Any, known: dict[Any, int]) -> int:
    """Values in `node`, those behind an alias counted each time."""
    if node not in known:
        known[node] = 1
        pairs = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else ()
        children = node.value if isinstance(node, yaml.SequenceNode) else pairs
        known[node] = 1 + sum(_written_out(child, known) for child in children)
    return known[node]


def _read_marker(path: Path) -> tuple[str, str, list[str]]:
    """(kind, source, what is left out and why) from bundle.json; a bundle without one counts as published."""
    marker = path / MARKER
    if not marker.is_file():
        return "published", "", []
    try:
        content = parse_json(marker.read_bytes())
        kind, source = fields(content, kind=str, source=str)
        (left_out,) = fields({"left_out": [], **content}, left_out=list[str])
    except (ValueError, UserError) as error:
        raise UserError(f"{marker} is damaged ({error}); make the bundle again with scripts.make_eval_bundle") from None
    if kind not in _KINDS:
        raise UserError(f"{marker} is damaged: kind {kind!r}, expected {', '.join(_KINDS)}")
    return kind, source, left_out


def _load_task(entry: Any, baselines: dict[str, float], data: Path) -> Task:
    label, kind, uri = fields(entry, label=str, icl_task_type=str, dataset_uri=str)
    if not label.isprintable():  # it goes to the terminal
        raise UserError(f"task {label!r}: its label is not printable")
    if kind not in _FIELDS:
        raise UserError(f"task {label}: unknown icl_task_type {kind!r}, expected {', '.join(_FIELDS)}")
    if label not in baselines:
        raise UserError(f"task {label} has no row in eval_meta_data.csv")
    if not 0.0 <= baselines[label] < 100.0:
        raise UserError(f"task {label}: random baseline {baselines[label]} is not in 0..100 %")
    try:
        # where the key stands with nothing behind it, YAML says null, which would be "None" in every prompt
        (delimiter,) = fields({"continuation_delimiter": " ", **entry}, continuation_delimiter=str)
        shots = entry.get("num_fewshot")
        (count,) = fields({"num_fewshot": shots[0] if shots and isinstance(shots, list) else shots}, num_fewshot=int)
    except UserError as error:
        raise UserError(f"task {label}: {error}") from None
    if not 0 <= count <= _MOST_SHOTS:
        raise UserError(f"task {label}: num_fewshot is {count}, expected 0 to {_MOST_SHOTS}")
    return Task(
        label=label,
        kind=kind,
        num_fewshot=count,
        delimiter=delimiter,
        baseline=baselines[label],
        items=_load_items(inside(data, uri), kind),
        uri=uri,
    )


def _load_items(file: Path, kind: str) -> list[dict[str, Any]]:
    if not os.path.isfile(file):  # a name can be too long to ask
        raise UserError(f"{file.name[:100]} is missing")
    lines = enumerate(file.read_bytes().split(b"\n"), start=1)
    items = [_checked_item(line, kind, f"{file.name} line {number}") for number, line in lines if line.strip()]
    if not items:
        raise UserError(f"{file.name} is empty")
    return items


def _checked_item(line: bytes, kind: str, where: str) -> dict[str, Any]:
    """The item of one line. Raises UserError where it could not be scored, or only in a way that says nothing."""
    try:
        item: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    try:
        fields(item, **_FIELDS[kind])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if kind in OPTIONS:
        options = item[OPTIONS[kind]]
        if not 0 <= item["gold"] < len(options) or len(options) < 2:
            raise UserError(f"{where}: gold {item['gold']} is not one of {len(options)} options, of which it takes two")
    answers = item["choices"] if kind == "multiple_choice" else [item["continuation"].strip()]
    if not (all(answers) or (kind == "multiple_choice" and item["query"])):
        raise UserError(f"{where}: the text to score is empty")
    return item
