"""Scores of a chat model: multiple choice by the logits of the letters, open questions by generating answers.

Every rank must hold the full model: ranks answer different items and meet only in one gather at the end of each task.
Which items are taken, and what is sampled for each, depends neither on the batch size nor on the number of ranks.
"""

import math
import os
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.eval.scores import (
    COLUMNS,
    Composite,
    Record,
    TaskScore,
    gather_records,
    longest_first,
    mean_stderr,
    pad_rows,
    write_scores,
)
from nanochat.runtime import heartbeat, print0, rank_and_world
from nanochat.sandbox import require_isolation
from nanochat.tasks.common import LeftOut, Task
from nanochat.tasks.registry import CHATCORE_TASKS, GRADED_TASKS, make_task, parse_tasks
from nanochat.tokenizer import RustBPETokenizer

_FORWARD_TOKENS = 1 << 14  # tokens of one forward: the logits of 16,384 positions and 65,536 entries take 4 GiB in fp32
_SAMPLES = 3  # conversations shown in the report
_GRADERS = 8  # answers graded at a time, some by running code for seconds


@dataclass(frozen=True, kw_only=True)
class ChatScore(TaskScore):
    """Score of one task. An item passes when the letter chosen is right, or when any of its samples is.

    A record has `index` in the task and `passed`. Categorical: `chosen` and `expected` letter. Generative:
    `completions` and whether each is right (`samples_passed`), both empty, with a reason in `error`, where the prompt
    left no room for an answer.
    """

    eval_type: str
    published: bool
    source: str
    num_samples: int = 1

    @property
    def how(self) -> str:
        """`categorical`, `generative`, or `generative, pass@8` where any of 8 samples does."""
        return f"{self.eval_type}, pass@{self.num_samples}" if self.num_samples > 1 else self.eval_type

    @property
    def pass_at(self) -> dict[int, float]:
        """Chance that at least one of j samples is right, for j = 1 to num_samples; empty for categorical tasks."""
        if self.eval_type != "generative":
            return {}
        return {j: sum(self._chances(j)) / self.n for j in range(1, self.num_samples + 1)}

    def pass_at_stderr(self, j: int) -> float:
        """Standard error of pass_at[j] over the items."""
        return mean_stderr(statistics.pvariance(self._chances(j)), self.n)

    def _chances(self, j: int) -> list[float]:
        return [pass_at_k(self.num_samples, sum(record["samples_passed"]), j) for record in self.records]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k samples drawn without replacement from n, of which c are right, hold a right one (0 < k <= n)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def chat_core(scores: Sequence[ChatScore]) -> list[Composite]:
    """ChatCORE over the published tasks measured and ChatCORE-offline over the others; a group without tasks is absent.

    Two values are comparable only when their tasks are the same.
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
    model: Any,
    tokenizer: RustBPETokenizer,
    task: Task,
    device: torch.device,
    *,
    batch_size: int,
    max_problems: int = -1,
) -> ChatScore:
    """Let the model choose among `conversation["letters"]`: the letter with the largest logit after the prompt.

    `model` maps idx (B, T) int64 to logits (B, T, V) and has `config.sequence_len`; longer prompts lose tokens after
    <|bos|>. A forward takes `batch_size` prompts, fewer where they are long. Raises UserError where a letter is not
    one token.
    """

    def measure() -> dict[int, Record]:
        rank, world = rank_and_world()
        local = chosen_items(task, max_problems)[rank::world]
        conversations = [task[index] for index in local]
        bos = tokenizer.get_bos_token_id()
        limit = model.config.sequence_len
        prompts = [_shortened(tokenizer.render_for_completion(each), limit) for each in conversations]
        letter_ids = [[_letter_id(tokenizer, letter) for letter in each["letters"]] for each in conversations]
        records: dict[int, Record] = {}
        for numbers, width in longest_first([len(prompt) for prompt in prompts], limit, _FORWARD_TOKENS, batch_size):
            idx = pad_rows([prompts[number] for number in numbers], width, bos)
            last = torch.tensor([len(prompts[number]) - 1 for number in numbers])
            logits = _logits_at(model, idx.to(device), last.to(device))
            for row, number in enumerate(numbers):
                conversation = conversations[number]
                letter = conversation["letters"][int(logits[row, letter_ids[number]].argmax())]
                records[local[number]] = {
                    "index": local[number],
                    "passed": bool(task.evaluate(conversation, letter)),
                    "chosen": letter,
                    "expected": conversation["messages"][-1]["content"],
                }
        return records

    return _score(task, measure)


def _logits_at(model: Any, idx: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Logits (B, V) fp32, on the host, at position last[b] of each row; those of all positions are freed on return."""
    logits = model(idx)
    return logits[torch.arange(len(last), device=last.device), last].float().cpu()


def _shortened(prompt: list[int], limit: int) -> list[int]:
    """The first token (<|bos|>) and as many of the last ones as fit."""
    return prompt if len(prompt) <= limit else [prompt[0], *prompt[len(prompt) - limit + 1 :]]


def _letter_id(tokenizer: RustBPETokenizer, letter: str) -> int:
    first, *others = tokenizer.encode(letter)
    if others:
        raise UserError(
            f"the answer letter {letter!r} is {1 + len(others)} tokens in tokenizer {tokenizer.hash}, must be one: "
            "train a tokenizer that has it as one token"
        )
    return first


# ---- open questions


def evaluate_generative(
    engine: Engine,
    task: Task,
    sampling: Sampling,
    *,
    batch_size: int,
    max_problems: int = -1,
    seed: int = 42,
) -> ChatScore:
    """Generate `sampling.num_samples` answers to each item, as many at a time as `batch_size` items have, and grade
    them as they come.

    An answer has at most `sampling.max_new_tokens` tokens and ends where prompt and answer fill the model's
    sequence_len. A prompt that leaves no room for a single token counts as failed.
    """

    def measure() -> dict[int, Record]:
        rank, world = rank_and_world()
        local = chosen_items(task, max_problems)[rank::world]
        conversations = {index: task[index] for index in local}
        prompts = {index: engine.tokenizer.render_for_completion(conversations[index]) for index in local}
        limit = engine.model.config.sequence_len
        room = {index: min(sampling.max_new_tokens, limit - len(prompts[index])) for index in local}
        records = {index: _no_room(index, len(prompts[index]), limit) for index in local if room[index] < 1}
        # longest first, so that running out of memory shows at once; the index keeps the order fixed among equals
        order = sorted((index for index in local if room[index] >= 1), key=lambda index: (-len(prompts[index]), index))
        answers = engine.answers(
            [prompts[index] for index in order],
            sampling,
            [seed + index * sampling.num_samples for index in order],
            limits=[room[index] for index in order],
            rows=batch_size * sampling.num_samples,
        )
        graded: deque[tuple[int, list[str], list[Future[bool]]]] = deque()
        # in threads, because grading code waits for a subprocess
        with ThreadPoolExecutor(max(1, min(_GRADERS, (os.cpu_count() or 1) // world))) as graders:
            for number, sequences, _ in answers:
                index = order[number]
                texts = [engine.tokenizer.decode(sequence[len(prompts[index]) :]) for sequence in sequences]
                right = [graders.submit(task.evaluate, conversations[index], text) for text in texts]
                graded.append((index, texts, right))
                while graded and all(one.done() for one in graded[0][2]):  # what fails, fails at once
                    records |= _graded(*graded.popleft())
            while graded:
                records |= _graded(*graded.popleft())
        return records

    return _score(task, measure, sampling.num_samples)


def _no_room(index: int, length: int, limit: int) -> Record:
    error = f"a prompt of {length} tokens leaves no room for an answer in {limit}"
    return {"index": index, "passed": False, "completions": [], "samples_passed": [], "error": error}


def _graded(index: int, texts: list[str], right: Sequence[Future[bool]]) -> dict[int, Record]:
    """The record of one item, when all its answers are graded."""
    passed = [bool(one.result()) for one in right]
    heartbeat()  # grading may take longer than generating
    return {index: {"index": index, "passed": any(passed), "completions": texts, "samples_passed": passed}}


# ---- both


def evaluate(engine: Engine, task: Task, sampling: Sampling, seed: int, **limits: int) -> ChatScore:
    """Score one task the way it is graded. limits: batch_size, max_problems."""
    if task.eval_type == "categorical":
        return evaluate_categorical(engine.model, engine.tokenizer, task, engine.model.get_device(), **limits)
    return evaluate_generative(engine, task, sampling, seed=seed, **limits)


def pick_tasks(names: str | None, source: str | None) -> tuple[list[Task], list[str]]:
    """(tasks to score, `name: why` of those left out for want of data or of a sandbox); names None: all graded tasks.

    A named one is left out only where the run's text has too little for it. Raises UserError for a named task that is
    unknown, lacks data or a sandbox, cannot be graded or is named twice, and when nothing is left.
    """
    if names is None:
        tasks, left_out = [], []
        for name in GRADED_TASKS:
            try:
                tasks.append(ready(make_task(name, "test", source)))
            except UserError as error:
                left_out.append(f"{name}: {error}")
        if not tasks:
            raise UserError(f"no task to score: {'; '.join(left_out)}")
        return tasks, left_out
    parsed = parse_tasks(names, "test", source)
    left_out = [f"{task.name}: {task.why}" for task in parsed if isinstance(task, LeftOut)]
    tasks = [task for task in parsed if not isinstance(task, LeftOut)]
    if not tasks:
        raise UserError(f"--task-name={names}: no task to score: {'; '.join(left_out)}")
    for task in tasks:
        if task.eval_type is None:
            raise UserError(f"--task-name={names}: {task.name} has no answers to grade; leave it out")
        if sum(task.name == other.name for other in tasks) > 1:
            raise UserError(f"--task-name={names}: {task.name} is there twice; name it once")
    return [ready(task) for task in tasks], left_out


def ready(task: Task) -> Task:
    """The task. Raises UserError where its data is absent or its answers may not be run: now, not in an hour."""
    len(task)
    if task.runs_code and (danger := require_isolation().danger()):
        print0(f"WARNING: {task.name}: this kernel grants {danger}")
    return task


def chosen_items(task: Task, max_problems: int = -1) -> list[int]:
    """Indices of the items to score: all in order, or `max_problems`: the first of a published data set, whose order is
    that in which others take the first; else those of a fixed shuffle. Raises UserError for a task without items."""
    if len(task) == 0:
        raise UserError(f"{task.name}: no items to evaluate; check its data or the number of items requested")
    indices = list(range(len(task)))
    if max_problems > 0:
        if not task.published:
            random.Random(1337).shuffle(indices)
        indices = indices[:max_problems]
    return indices


def _score(task: Task, measure: Callable[[], dict[int, Record]], num_samples: int = 1) -> ChatScore:
    """The score over all ranks, the same on each, from what `measure` gives on each."""
    return ChatScore(
        name=task.name,
        baseline=task.baseline,
        records=gather_records(measure),
        eval_type=str(task.eval_type),
        published=task.published,
        source=task.source,
        num_samples=num_samples,
    )


def write_results(scores: Sequence[ChatScore], composites: Sequence[Composite], folder: Path, name: str) -> Path:
    """Write <name>.csv (a row a task, and one a composite) and <name>.jsonl (a line an item). Returns the CSV."""
    columns = ["Task", "Type", "n", "Samples", "Baseline", "Accuracy", "stderr", "Centered", "Low", "High", "Guess"]
    table: list[Sequence[object]] = [columns]
    for score in scores:
        values = (score.baseline, score.accuracy, score.stderr, score.centered, *score.interval)
        cells = (f"{value:.6f}" for value in values)
        table.append([score.name, score.eval_type, score.n, score.num_samples, *cells, score.guess])
    for group in composites:
        table.append([group.name, "", group.n, "", "", "", f"{group.stderr:.6f}", f"{group.value:.6f}", "", "", ""])
    return write_scores(folder, name, table, scores)


# ---- the report


def report_data(tasks: Sequence[Task], scores: Sequence[ChatScore], composites: Sequence[Composite]) -> dict[str, Any]:
    """Metrics, tables, samples and facts of the report's section."""
    metrics: dict[str, Any] = {}
    for score in scores:
        metrics |= {score.name: score.accuracy, f"{score.name} standard error": score.stderr}
    for group in composites:
        metrics |= {group.name: group.value, f"{group.name} standard error": group.stderr}
    without_room = {score.name: sum("error" in record for record in score.records) for score in scores}
    facts = {
        "composites": {group.name: {task.name: task.baseline for task in group.tasks} for group in composites},
        "without_room": {name: count for name, count in without_room.items() if count},
    }
    synthetic = any(not score.published for score in scores)
    samples = _samples(tasks, scores)
    return {"metrics": metrics, "tables": _tables(scores), "samples": samples, "facts": facts, "synthetic": synthetic}


def _tables(scores: Sequence[ChatScore]) -> list[dict[str, Any]]:
    columns = ["Task", "Type", "Items", *COLUMNS, "Source"]
    rows = [[score.name, score.eval_type, score.n, *score.cells, score.source] for score in scores]
    tables = [{"title": "Chat tasks", "columns": columns, "rows": rows}]
    sampled = [score for score in scores if score.num_samples > 1]
    if sampled:
        ks = list(sampled[0].pass_at)
        rows = [[score.name, *score.pass_at.values()] for score in sampled]
        tables.append({"title": "Pass@k", "columns": ["Task", *(f"pass@{k}" for k in ks)], "rows": rows})
    return tables


def _samples(tasks: Sequence[Task], scores: Sequence[ChatScore]) -> list[dict[str, str]]:
    """The first item of each of the first tasks, generated answers before letters: they show more."""
    shown = []
    for task, score in sorted(zip(tasks, scores, strict=True), key=lambda pair: pair[1].eval_type != "generative"):
        record = score.records[0]
        if score.eval_type == "categorical":
            text = f"{record['chosen']} (right answer: {record['expected']})"
        else:
            text = record["completions"][0] if record["completions"] else f"({record['error']})"
        # not the last message but one: some puzzles have no reference answer behind the question
        questions = [message["content"] for message in task[record["index"]]["messages"] if message["role"] == "user"]
        shown.append({"prompt": f"[{score.name}] {' '.join(str(questions[-1]).split())}", "text": text})
    return shown[:_SAMPLES]
