"""The CORE metric: few-shot tasks in the published bundle layout, scored in large batches.

A GPT reads what rows share once (nanochat.eval.tree). Any other callable `idx (B, T) int64 -> logits (B, T, V)` can be
graded too, and gets rows in full. Every rank must hold the full model: ranks score different items and meet only in one
gather at the end of each task.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from nanochat.eval.bundle import Bundle, Task
from nanochat.eval.scores import (
    COLUMNS,
    Composite,
    Record,
    TaskScore,
    gather_records,
    write_scores,
)
from nanochat.eval.tree import Model, Row, common_length, score
from nanochat.gpt import GPT
from nanochat.runtime import rank_and_world
from nanochat.tokenizer import repaired

_CHUNK_ITEMS = 512  # items rendered and encoded at a time: bounds memory on the tasks with 10,000 items
_MOST_REMEMBERED = 64  # tasks whose rows are kept for the next evaluation, some 3 MB each


class Tokenizer(Protocol):
    """What is asked of a tokenizer: ids of texts, each behind a token. With `hash`, rows are remembered by it."""

    def encode(self, text: list[str], prepend: int) -> list[list[int]]: ...
    def get_bos_token_id(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreScore(TaskScore):
    """Score of one task. A record has `line` in the JSONL file, `correct`, `loss` (mean over the right answer, nats a
    token) and, but for language modelling, the option `chosen`."""

    kind: str
    num_fewshot: int
    outcome: ClassVar[str] = "correct"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreResult(Composite):
    """The CORE metric or its like over a bundle; `kind` and `source` are those of the bundle."""

    tasks: list[CoreScore]
    kind: str
    source: str


# ---- prompts


def render_prompts(task: Task, item: dict[str, Any], shots: Sequence[dict[str, Any]]) -> list[str]:
    """The prompts of one item: one an option; for language modelling [without, with] the continuation."""
    joint = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{shot['query']}{joint}{shot['choices'][shot['gold']]}\n\n" for shot in shots)
        return [f"{before}{item['query']}{joint}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        before = "".join(f"{shot['context_options'][shot['gold']]}{joint}{shot['continuation']}\n\n" for shot in shots)
        return [f"{before}{option}{joint}{item['continuation']}" for option in item["context_options"]]
    before = "".join(f"{shot['context'].strip()}{joint}{shot['continuation']}\n\n" for shot in shots)
    without = f"{before}{item['context'].strip()}{joint}"
    # a trailing space would merge with the next word into one token, and `without` would be no prefix of the other
    return [without.rstrip(), f"{without}{item['continuation']}"]


def pick_shots(task: Task, items: Sequence[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """The few-shot examples of item `index`: never the item itself, the same for every model and rank.

    Fewer where a truncated task has too few other items.
    """
    others = len(items) - 1
    found = random.Random(1234 + index).sample(range(others), min(task.num_fewshot, others))
    return [items[i + (i >= index)] for i in found]


def make_rows(kind: str, tokens: Sequence[Sequence[int] | np.ndarray], max_tokens: int) -> list[Row]:
    """Encoded prompts of one item -> rows to score, the last `max_tokens` tokens of each."""
    if kind == "language_modeling":
        without, full = tokens
        # the common prefix is all of `without`, unless the tokenizer merged across the border
        starts, tokens = [common_length([without, full])], [full]
    elif kind == "multiple_choice":
        # where one option begins another, the shorter would have no answer left to score: it keeps its last token
        starts = [min(common_length(tokens), min(map(len, tokens)) - 1)] * len(tokens)
    else:
        suffix = common_length([row[::-1] for row in tokens])
        starts = [len(row) - suffix for row in tokens]
    return [_fit(row, start, max_tokens) for row, start in zip(tokens, starts, strict=True)]


def _fit(tokens: Sequence[int] | np.ndarray, start: int, max_tokens: int) -> Row:
    """The last `max_tokens` tokens, of which one at least is before the answer and one in it (identical options)."""
    cut = max(0, len(tokens) - max_tokens)
    end = len(tokens) - cut
    return Row(tokens[cut:], min(max(start - cut, 1), end - 1), end)


_remembered: dict[str, list[list[Row]]] = {}


def prepare(
    task: Task,
    tokenizer: Tokenizer,
    items: Sequence[dict[str, Any]],
    chosen: Sequence[int],
    max_tokens: int,
) -> list[list[Row]]:
    """The rows of each chosen item. They are remembered by hashes of items and tokenizer, so that the evaluations of a
    training run encode their prompts once."""

    def make() -> list[list[Row]]:
        prompts = [render_prompts(task, items[i], pick_shots(task, items, i)) for i in chosen]
        flat = [repaired(prompt) for prompt in itertools.chain.from_iterable(prompts)]  # JSON spells any code point
        encoded = iter(tokenizer.encode(flat, prepend=tokenizer.get_bos_token_id()))
        return [
            make_rows(task.kind, [np.array(next(encoded), dtype=np.int32) for _ in texts], max_tokens)
            for texts in prompts
        ]

    name = getattr(tokenizer, "hash", None)
    if name is None or len(items) > _CHUNK_ITEMS:
        return make()
    parts = [name, task.kind, task.delimiter, task.num_fewshot, items, list(chosen), max_tokens]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if key not in _remembered:
        if len(_remembered) >= _MOST_REMEMBERED:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = make()
    return _remembered[key]


# ---- scoring


def evaluate_task(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    device: torch.device,
    *,
    sequence_len: int,
    device_batch_size: int = 16,
    max_per_task: int = -1,
) -> CoreScore:
    """Score one task over all ranks. `max_per_task` items, -1 for all; of prompts the last `sequence_len` tokens, or as
    many as the model has positions for."""
    lines = list(range(len(task.items)))
    random.Random(1337).shuffle(lines)
    lines = lines[:max_per_task] if max_per_task > 0 else lines
    items = [task.items[line] for line in lines]
    budget = device_batch_size * sequence_len
    # half of the table: what is padded behind a row still has a place in it
    limit = max(2, min(sequence_len, model.cos.size(1) // 2) if isinstance(model, GPT) else sequence_len)

    def measure() -> dict[int, Record]:
        rank, world = rank_and_world()
        local = range(rank, len(items), world)
        records: dict[int, Record] = {}
        for chunk in (local[i : i + _CHUNK_ITEMS] for i in range(0, len(local), _CHUNK_ITEMS)):
            rows = prepare(task, tokenizer, items, chunk, limit)
            means, exact = score(model, rows, device, tokenizer.get_bos_token_id(), limit, budget)
            first = 0
            for i, item_rows in zip(chunk, rows, strict=True):
                outcome = _grade(task.kind, items[i], means[first : first + len(item_rows)], bool(exact[first]))
                records[i] = {"line": lines[i], **outcome}
                first += len(item_rows)
        return records

    return CoreScore(
        name=task.label,
        baseline=0.01 * task.baseline,
        records=gather_records(measure),
        guess=task.guess,
        kind=task.kind,
        num_fewshot=min(task.num_fewshot, len(items) - 1),
    )


def _grade(kind: str, item: dict[str, Any], means: np.ndarray, exact: bool) -> Record:
    """The outcome of one item from the mean losses of its options and whether the first one is exactly right."""
    if kind == "language_modeling":
        return {"correct": exact, "loss": float(means[0])}
    chosen, gold = int(means.argmin()), item["gold"]
    return {"correct": chosen == gold, "loss": float(means[gold]), "chosen": chosen}


def evaluate_core(
    model: Model,
    tokenizer: Tokenizer,
    bundle: Bundle,
    device: torch.device,
    *,
    log: Callable[[str], object] = lambda line: None,
    **limits: int,
) -> CoreResult:
    """Score every task of `bundle`; the same result on every rank. `log` gets one line a task; limits: sequence_len,
    device_batch_size and max_per_task of evaluate_task."""
    results = []
    for task in bundle.tasks:
        results.append(evaluate_task(model, tokenizer, task, device, **limits))
        log(f"{task.label} ({task.num_fewshot}-shot {task.kind}): {results[-1]}")
    return CoreResult(name=bundle.name, kind=bundle.kind, source=bundle.source, tasks=results)


# ---- results


def write_results(result: CoreResult, folder: Path, name: str) -> Path:
    """Write <name>.csv (a row a task, and one for the mean) and <name>.jsonl (a line an item). Returns the CSV."""
    table: list[list[object]] = [["Task", "Accuracy", "Centered", "n", "stderr", "Low", "High", "Baseline", "Guess"]]
    for task in result.tasks:
        more = [*(f"{value:.6f}" for value in (task.stderr, *task.interval, task.baseline)), task.guess]
        table.append([task.name, f"{task.accuracy:.6f}", f"{task.centered:.6f}", task.n, *more])
    values = [f"{value:.6f}" for value in (result.value, result.stderr, *result.interval)]
    table.append([result.name, "", values[0], result.n, *values[1:], "", ""])
    return write_scores(folder, name, table, result.tasks)


def report_data(result: CoreResult) -> dict[str, Any]:
    """Metrics, table and facts of the report's section."""
    rows = [[task.name, task.kind, task.num_fewshot, task.n, *task.cells] for task in result.tasks]
    table = {"title": result.name, "columns": ["Task", "Kind", "Shots", "Items", *COLUMNS], "rows": rows}
    return {
        "metrics": {result.name: result.value, f"{result.name} standard error": result.stderr},
        "tables": [table],
        "facts": {
            "kind": result.kind,
            "source": result.source,
            "interval": "{:.4f} to {:.4f}".format(*result.interval),
        },
        "synthetic": result.kind != "published",
    }
