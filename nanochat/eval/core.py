"""The CORE metric: few-shot tasks in the published bundle layout, scored in large batches.

The model is any callable `idx (B, T) int64 -> logits (B, T, V)`, so models from elsewhere can be graded too. Every rank
must hold the whole model: ranks score different items and meet only in one all-reduce at the end of each task.
"""

import csv
import dataclasses
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.eval.bundle import Bundle, Task
from nanochat.runtime import heartbeat
from nanochat.tokenizer import repaired

_WIDTH = 64  # rows are padded to a multiple of this: few distinct shapes, little padding
_CHUNK_ITEMS = 512  # items rendered and encoded at a time: bounds memory on the tasks with 10,000 items
_CHUNK_LOGITS = 1 << 26  # logits turned to fp32 at a time: 256 MiB

Model = Callable[[torch.Tensor], torch.Tensor]


class Tokenizer(Protocol):
    """What is needed of a tokenizer: encode many texts with a token in front, and the id of that token."""

    def encode(self, text: Any, prepend: Any = None) -> Any: ...

    def get_bos_token_id(self) -> int: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Score of one task. The arrays hold one entry an item: line in the JSONL, correct, option chosen (-1 for
    language modelling), mean loss of the right answer in nats a token."""

    label: str
    kind: str
    num_fewshot: int
    baseline: float
    line: np.ndarray
    correct: np.ndarray
    chosen: np.ndarray
    loss: np.ndarray

    @property
    def n(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def stderr(self) -> float:
        """Binomial standard error of the accuracy: how much another draw of n items would move it."""
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.n)

    @property
    def centered(self) -> float:
        """0 = guessing, 1 = perfect."""
        return (self.accuracy - 0.01 * self.baseline) / (1.0 - 0.01 * self.baseline)

    @property
    def centered_stderr(self) -> float:
        return self.stderr / (1.0 - 0.01 * self.baseline)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreResult:
    """All task scores; `core` is the plain mean of the centred accuracies. `name` says which tasks it stands on."""

    name: str
    kind: str
    source: str
    tasks: list[TaskResult]

    @property
    def core(self) -> float:
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def stderr(self) -> float:
        return math.sqrt(sum(task.centered_stderr**2 for task in self.tasks)) / len(self.tasks)


class Row(NamedTuple):
    """One prompt for the model; the answer is tokens[start:end], 1 <= start < end."""

    tokens: list[int]
    start: int
    end: int


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

    Fewer than asked for where a truncated task has too few other items.
    """
    others = [i for i in range(len(items)) if i != index]
    count = min(task.num_fewshot, len(others))
    return [items[i] for i in random.Random(1234 + index).sample(others, count)]


def make_rows(kind: str, tokens: list[list[int]], max_tokens: int) -> list[Row]:
    """Encoded prompts of one item -> rows to score, cut from the left to `max_tokens`."""
    if kind == "language_modeling":
        without, full = tokens
        # the common prefix is all of `without`, unless the tokenizer merged across the border
        starts, tokens = [_common([without, full])], [full]
    elif kind == "multiple_choice":
        # where one option begins another, the shorter would have no answer left to score: it keeps its last token
        starts = [min(_common(tokens), min(map(len, tokens)) - 1)] * len(tokens)
    else:
        suffix = _common([row[::-1] for row in tokens])
        starts = [len(row) - suffix for row in tokens]
    return [_fit(row, start, max_tokens) for row, start in zip(tokens, starts, strict=True)]


def _common(sequences: list[list[int]]) -> int:
    """Length of the common prefix."""
    columns = enumerate(zip(*sequences, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, sequences)))


def _fit(tokens: list[int], start: int, max_tokens: int) -> Row:
    """Cut from the left. At least one token stays in front of the answer, and one in it (identical options)."""
    cut = max(0, len(tokens) - max_tokens)
    end = len(tokens) - cut
    return Row(tokens[cut:], min(max(start - cut, 1), end - 1), end)


# ---- scoring


def _batches(rows: Sequence[Row], tokens_per_forward: int, max_tokens: int) -> Iterator[tuple[list[int], int]]:
    """(row numbers, width) of each forward, longest first so that running out of memory shows at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True)
    while order:
        width = min(-(-len(rows[order[0]].tokens) // _WIDTH) * _WIDTH, max_tokens)
        count = max(1, tokens_per_forward // width)
        yield order[:count], width
        order = order[count:]


@torch.no_grad()
def score_rows(
    model: Model, rows: Sequence[Row], device: torch.device, *, pad: int, max_tokens: int, tokens_per_forward: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean loss of the answer in nats a token (rows,) float64, whether every answer token is the argmax (rows,))."""
    means = np.zeros(len(rows))
    exact = np.zeros(len(rows), dtype=bool)
    for numbers, width in _batches(rows, tokens_per_forward, max_tokens):
        heartbeat()
        idx = torch.full((len(numbers), width), pad, dtype=torch.long)
        for i, number in enumerate(numbers):
            idx[i, : len(rows[number].tokens)] = torch.tensor(rows[number].tokens)
        lengths = [rows[number].end - rows[number].start for number in numbers]
        where = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
        column = torch.tensor([c for number in numbers for c in range(rows[number].start, rows[number].end)])
        target = idx[where, column].to(device)
        logits = model(idx.to(device))
        losses, hits = _answer_losses(logits, where.to(device), (column - 1).to(device), target)
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        # summed on the host in float64: the GPU's scatter-add has no fixed order, and would not repeat bit for bit
        means[numbers] = np.add.reduceat(losses, first) / np.array(lengths)
        exact[numbers] = np.logical_and.reduceat(hits, first)
    return means, exact


def _answer_losses(
    logits: torch.Tensor, where: torch.Tensor, column: torch.Tensor, target: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and argmax hit at the answer positions only: (32, 2048, 65536) logits in fp32 would be 17 GB."""
    losses, hits = [], []
    step = max(1, _CHUNK_LOGITS // logits.size(-1))
    for part in zip(where.split(step), column.split(step), target.split(step), strict=True):
        picked = logits[part[0], part[1]].float()
        losses.append(F.cross_entropy(picked, part[2], reduction="none"))
        hits.append(picked.argmax(dim=-1) == part[2])
    return torch.cat(losses).cpu().numpy().astype(np.float64), torch.cat(hits).cpu().numpy()


def evaluate_task(
    model: Model,
    tokenizer: Tokenizer,
    task: Task,
    device: torch.device,
    *,
    sequence_len: int,
    device_batch_size: int = 16,
    max_per_task: int = -1,
) -> TaskResult:
    """Score one task over all ranks. `max_per_task` items, -1 for all; prompts are cut to `sequence_len` tokens."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    line = list(range(len(task.items)))
    random.Random(1337).shuffle(line)
    line = line[:max_per_task] if max_per_task > 0 else line
    items = [task.items[i] for i in line]
    outcome = torch.zeros(len(items), 3, dtype=torch.float64)  # correct, chosen, loss; zero where another rank scores
    bos = tokenizer.get_bos_token_id()
    mine = range(rank, len(items), world)
    for chunk in (mine[i : i + _CHUNK_ITEMS] for i in range(0, len(mine), _CHUNK_ITEMS)):
        prompts = [render_prompts(task, items[i], pick_shots(task, items, i)) for i in chunk]
        flat = [repaired(prompt) for prompt in itertools.chain.from_iterable(prompts)]  # JSON spells any code point
        encoded = iter(tokenizer.encode(flat, prepend=bos))
        tokens = [[list(next(encoded)) for _ in texts] for texts in prompts]
        rows = [make_rows(task.kind, item_tokens, sequence_len) for item_tokens in tokens]
        means, exact = score_rows(
            model,
            list(itertools.chain.from_iterable(rows)),
            device,
            pad=bos,
            max_tokens=sequence_len,
            tokens_per_forward=device_batch_size * sequence_len,
        )
        first = 0
        for i, item_rows in zip(chunk, rows, strict=True):
            outcome[i] = _judge(task.kind, items[i], means[first : first + len(item_rows)], bool(exact[first]))
            first += len(item_rows)
    if dist.is_initialized():
        outcome = outcome.to(device)
        dist.all_reduce(outcome)
    correct, chosen, loss = outcome.cpu().numpy().T
    return TaskResult(
        label=task.label,
        kind=task.kind,
        num_fewshot=min(task.num_fewshot, len(items) - 1),
        baseline=task.baseline,
        line=np.array(line),
        correct=correct.astype(bool),
        chosen=chosen.astype(np.int64),
        loss=loss,
    )


def _judge(kind: str, item: dict[str, Any], means: np.ndarray, exact: bool) -> torch.Tensor:
    """(correct, option chosen, loss of the right answer) of one item."""
    if kind == "language_modeling":
        return torch.tensor([float(exact), -1.0, means[0]], dtype=torch.float64)
    chosen = int(means.argmin())
    return torch.tensor([float(chosen == item["gold"]), chosen, means[item["gold"]]], dtype=torch.float64)


def evaluate_core(
    model: Model,
    tokenizer: Tokenizer,
    bundle: Bundle,
    device: torch.device,
    *,
    sequence_len: int,
    device_batch_size: int = 16,
    max_per_task: int = -1,
    log: Callable[[str], object] | None = None,
) -> CoreResult:
    """Score every task of `bundle`; the same result on every rank. `log` gets one line a task."""
    results = []
    for task in bundle.tasks:
        result = evaluate_task(
            model,
            tokenizer,
            task,
            device,
            sequence_len=sequence_len,
            device_batch_size=device_batch_size,
            max_per_task=max_per_task,
        )
        results.append(result)
        if log is not None:
            log(
                f"{task.label} ({task.num_fewshot}-shot {task.kind}): accuracy {result.accuracy:.4f} "
                f"± {result.stderr:.4f}, centered {result.centered:.4f}, {result.n} items"
            )
    return CoreResult(name=bundle.name, kind=bundle.kind, source=bundle.source, tasks=results)


# ---- results


def write_results(result: CoreResult, folder: Path, name: str) -> Path:
    """Write <name>.csv (a row a task, and one for the mean) and <name>.jsonl (a line an item). Returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    table: list[list[object]] = [["Task", "Accuracy", "Centered", "n", "stderr"]]
    for task in result.tasks:
        table.append([task.label, f"{task.accuracy:.6f}", f"{task.centered:.6f}", task.n, f"{task.stderr:.6f}"])
    table.append([result.name, "", f"{result.core:.6f}", sum(task.n for task in result.tasks), f"{result.stderr:.6f}"])
    target = folder / f"{name}.csv"
    with (folder / f"{name}.csv.tmp").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(table)
    with (folder / f"{name}.jsonl.tmp").open("w", encoding="utf-8") as stream:
        for task in result.tasks:
            for line, correct, chosen, loss in zip(task.line, task.correct, task.chosen, task.loss, strict=True):
                record = {"task": task.label, "line": int(line), "correct": bool(correct), "loss": float(loss)}
                if task.kind != "language_modeling":
                    record["chosen"] = int(chosen)
                stream.write(json.dumps(record) + "\n")
    os.replace(folder / f"{name}.jsonl.tmp", folder / f"{name}.jsonl")
    os.replace(folder / f"{name}.csv.tmp", target)
    return target
