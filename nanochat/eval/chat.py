"""Scores of a chat model: multiple choice by the logits of the letters, open questions by generating answers.

Every rank must hold the whole model: ranks answer different items and meet only in one gather at the end of each task.
Which items are taken, and what is sampled for each, depends neither on the batch size nor on the number of ranks.
"""

import csv
import json
import math
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.tasks.common import Conversation, Task
from nanochat.tasks.registry import CHATCORE_TASKS

_WIDTH = 64  # rows are padded to a multiple of this: few distinct shapes, little padding
_FORWARD_TOKENS = 1 << 14  # tokens of one forward: the logits of 16,384 positions and 65,536 entries take 4 GiB in fp32
_GRADERS = 8  # answers graded at a time, some by running code for seconds

Record = dict[str, Any]  # the outcome of one item, JSON-able; always with `index` (in the task) and `passed`


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    @property
    def hash(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def get_bos_token_id(self) -> int: ...

    def render_for_completion(self, conversation: Conversation) -> list[int]: ...


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Score of one task. An item passes when the letter chosen is right, or when any of its samples is."""

    name: str
    eval_type: str
    baseline: float
    """Accuracy of guessing, between 0 and 1."""
    published: bool
    source: str
    num_samples: int = 1
    records: list[Record] = field(repr=False)
    """One an item, by index. Categorical: `chosen` and `expected` letter. Generative: `completions` and whether each
    is right (`samples_passed`), both empty, with a reason in `error`, where the prompt left no room for an answer."""

    @property
    def n(self) -> int:
        """Items scored."""
        return len(self.records)

    @property
    def accuracy(self) -> float:
        return sum(record["passed"] for record in self.records) / self.n

    @property
    def stderr(self) -> float:
        """Binomial standard error of the accuracy: how much another draw of n items would move it."""
        return math.sqrt(self.accuracy * (1.0 - self.accuracy) / self.n)

    @property
    def centered(self) -> float:
        """0 = guessing, 1 = perfect."""
        return (self.accuracy - self.baseline) / (1.0 - self.baseline)

    @property
    def centered_stderr(self) -> float:
        return self.stderr / (1.0 - self.baseline)

    @property
    def pass_at(self) -> dict[int, float]:
        """Chance that at least one of j samples is right, for j = 1 to num_samples; empty for categorical tasks."""
        if self.eval_type != "generative":
            return {}
        return {j: sum(self._chances(j)) / self.n for j in range(1, self.num_samples + 1)}

    def pass_at_stderr(self, j: int) -> float:
        """Standard error of pass_at[j] over the items."""
        return statistics.pstdev(self._chances(j)) / math.sqrt(self.n)

    def _chances(self, j: int) -> list[float]:
        return [pass_at_k(self.num_samples, sum(record["samples_passed"]), j) for record in self.records]


@dataclass(frozen=True, kw_only=True)
class Composite:
    """Plain mean of the centred accuracies of some tasks; the name says which."""

    name: str
    tasks: list[TaskScore]

    @property
    def value(self) -> float:
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def stderr(self) -> float:
        return math.sqrt(sum(task.centered_stderr**2 for task in self.tasks)) / len(self.tasks)

    @property
    def baselines(self) -> dict[str, float]:
        """The tasks it stands on, and what guessing scores on each."""
        return {task.name: task.baseline for task in self.tasks}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k samples drawn without replacement from n, of which c are right, hold a right one (0 < k <= n)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def chat_core(scores: Sequence[TaskScore]) -> list[Composite]:
    """ChatCORE over the published tasks measured and ChatCORE-offline over the others; a group without tasks is absent.

    Two values are comparable only when their tasks are the same: `baselines` lists them.
    """
    published = [score for score in scores if score.published and score.name in CHATCORE_TASKS]
    offline = [score for score in scores if not score.published]
    total = len(CHATCORE_TASKS)
    name = "ChatCORE" if len(published) == total else f"ChatCORE ({len(published)} of {total} tasks)"
    groups = {name: published, "ChatCORE-offline": offline}
    return [Composite(name=name, tasks=tasks) for name, tasks in groups.items() if tasks]


# ---- multiple choice


@torch.no_grad()
def evaluate_categorical(
    model: Any, tokenizer: Tokenizer, task: Task, device: torch.device, *, batch_size: int, max_problems: int = -1
) -> TaskScore:
    """Let the model choose among `conversation["letters"]`: the letter with the largest logit after the prompt.

    `model` maps idx (B, T) int64 to logits (B, T, V) and has `config.sequence_len`; longer prompts lose tokens after
    <|bos|>. A forward takes `batch_size` prompts, fewer where they are long. Raises UserError where a letter is not
    one token.
    """
    rank, world = _rank_and_world()
    mine = chosen_items(task, max_problems)[rank::world]
    conversations = [task[index] for index in mine]
    bos = tokenizer.get_bos_token_id()
    limit = model.config.sequence_len
    prompts = [_cut(tokenizer.render_for_completion(each), limit) for each in conversations]
    letter_ids = [_letter_ids(tokenizer, each["letters"]) for each in conversations]
    chosen = [""] * len(mine)
    for numbers, width in _forwards([len(prompt) for prompt in prompts], batch_size, limit):
        idx = torch.full((len(numbers), width), bos, dtype=torch.long)
        for row, number in enumerate(numbers):
            idx[row, : len(prompts[number])] = torch.tensor(prompts[number])
        last = torch.tensor([len(prompts[number]) - 1 for number in numbers])
        logits = _logits_at(model, idx.to(device), last.to(device))
        for row, number in enumerate(numbers):
            best = int(logits[row, letter_ids[number]].argmax())
            chosen[number] = conversations[number]["letters"][best]
    records = [
        {
            "index": index,
            "passed": bool(task.evaluate(conversation, letter)),
            "chosen": letter,
            "expected": conversation["messages"][-1]["content"],
        }
        for index, conversation, letter in zip(mine, conversations, chosen, strict=True)
    ]
    return _score(task, "categorical", 1, records)


def _logits_at(model: Any, idx: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) fp32, on the host, at position last[b] of each row; those of all positions are freed on return."""
    logits = model(idx)
    return logits[torch.arange(len(last), device=last.device), last].float().cpu()


def _cut(prompt: list[int], limit: int) -> list[int]:
    """The first token (<|bos|>) and as many of the last ones as fit."""
    return prompt if len(prompt) <= limit else [prompt[0], *prompt[len(prompt) - limit + 1 :]]


def _letter_ids(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    ids = [tokenizer.encode(letter) for letter in letters]
    for letter, tokens in zip(letters, ids, strict=True):
        if len(tokens) != 1:
            raise UserError(
                f"the answer letter {letter!r} is {len(tokens)} tokens in tokenizer {tokenizer.hash}, must be one: "
                "train a tokenizer that has it as one token"
            )
    return [tokens[0] for tokens in ids]


def _forwards(lengths: Sequence[int], batch_size: int, limit: int) -> Iterator[tuple[list[int], int]]:
    """(row numbers, width) of each forward, longest first so that running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        width = min(-(-lengths[order[0]] // _WIDTH) * _WIDTH, limit)
        count = max(1, min(batch_size, _FORWARD_TOKENS // width))
        yield order[:count], width
        order = order[count:]


# ---- open questions


def evaluate_generative(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    sampling: Sampling,
    *,
    batch_size: int,
    max_problems: int = -1,
    seed: int = 42,
) -> TaskScore:
    """Generate answers to each item and grade them, `batch_size` items at a time.

    An answer ends at the latest where prompt and answer fill the model's sequence_len. A prompt that leaves no room
    for a single token counts as failed.
    """
    rank, world = _rank_and_world()
    mine = chosen_items(task, max_problems)[rank::world]
    conversations = {index: task[index] for index in mine}
    prompts = {index: list(tokenizer.render_for_completion(conversations[index])) for index in mine}
    limit = engine.model.config.sequence_len
    room = {index: min(sampling.max_new_tokens, limit - len(prompts[index])) for index in mine}
    records = [_no_room(index, len(prompts[index]), limit) for index in mine if room[index] < 1]
    # longest first, as for the forwards above; the index keeps the order fixed among equals
    order = sorted((index for index in mine if room[index] >= 1), key=lambda index: (-len(prompts[index]), index))
    with ThreadPoolExecutor(max(1, min(_GRADERS, (os.cpu_count() or 1) // world))) as graders:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            generated = engine.generate_many(
                [prompts[index] for index in batch],
                replace(sampling, max_new_tokens=max(room[index] for index in batch)),
                seeds=[seed + index * sampling.num_samples for index in batch],
            )
            completions = {}
            for index, (sequences, _) in zip(batch, generated, strict=True):
                # the batch ran as far as its roomiest item; cut, so that no answer depends on its neighbours
                begin, end = len(prompts[index]), len(prompts[index]) + room[index]
                completions[index] = [tokenizer.decode(sequence[begin:end]) for sequence in sequences]
            records += _grade(task, conversations, completions, graders)
    return _score(task, "generative", sampling.num_samples, records)


def _no_room(index: int, length: int, limit: int) -> Record:
    error = f"a prompt of {length} tokens leaves no room for an answer in {limit}"
    return {"index": index, "passed": False, "completions": [], "samples_passed": [], "error": error}


def _grade(
    task: Task, conversations: dict[int, Conversation], completions: dict[int, list[str]], graders: ThreadPoolExecutor
) -> list[Record]:
    """Records of the items of one batch. In threads, because grading code waits for a subprocess."""
    pairs = [(conversations[index], text) for index, texts in completions.items() for text in texts]
    verdicts = graders.map(lambda pair: bool(task.evaluate(*pair)), pairs)  # in the order of pairs
    records = []
    for index, texts in completions.items():
        passed = [next(verdicts) for _ in texts]
        records.append({"index": index, "passed": any(passed), "completions": texts, "samples_passed": passed})
    return records


# ---- both


def chosen_items(task: Task, max_problems: int = -1) -> list[int]:
    """Indices of the items to score: all in order, or the first `max_problems` of a fixed shuffle, which are spread
    over the task. Raises UserError for a task without items."""
    if len(task) == 0:
        raise UserError(f"{task.name}: no items to evaluate; check its data or the number of items asked for")
    indices = list(range(len(task)))
    if max_problems > 0:
        random.Random(1337).shuffle(indices)
        indices = indices[:max_problems]
    return indices


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _score(task: Task, eval_type: str, num_samples: int, records: list[Record]) -> TaskScore:
    """The score over all ranks, the same on each."""
    if dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    return TaskScore(
        name=task.name,
        eval_type=eval_type,
        baseline=task.baseline,
        published=task.published,
        source=task.source,
        num_samples=num_samples,
        records=sorted(records, key=lambda record: record["index"]),
    )


def write_results(scores: Sequence[TaskScore], composites: Sequence[Composite], folder: Path, name: str) -> Path:
    """Write <name>.csv (a row a task, and one a composite) and <name>.jsonl (a line an item). Returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    table: list[list[object]] = [["Task", "Type", "n", "Samples", "Baseline", "Accuracy", "stderr", "Centered"]]
    for score in scores:
        numbers = (f"{value:.6f}" for value in (score.baseline, score.accuracy, score.stderr, score.centered))
        table.append([score.name, score.eval_type, score.n, score.num_samples, *numbers])
    for group in composites:
        count = sum(score.n for score in group.tasks)
        table.append([group.name, "", count, "", "", "", f"{group.stderr:.6f}", f"{group.value:.6f}"])
    with atomic_write(folder / f"{name}.jsonl") as path, path.open("w", encoding="utf-8") as stream:
        for score in scores:
            for record in score.records:
                stream.write(json.dumps({"task": score.name, **record}) + "\n")
    with atomic_write(folder / f"{name}.csv") as path, path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(table)
    return folder / f"{name}.csv"
