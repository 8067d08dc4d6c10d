"""Evaluation bundles without a download: small tasks made from held-out text, in the layout that bundle.py reads.

They measure the same skills in miniature (which sentence follows, which word was meant, copying from the prompt), so
that the whole chain, few-shot prompts and all three kinds of task included, can be run and compared without a network.
Their scores are no CORE: every task is named `offline_...`, and `bundle.json` says kind = offline.
"""

import contextlib
import csv
import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from nanochat.eval.bundle import MARKER, TABLES, Bundle, Task, load_bundle
from nanochat.eval.shortcuts import best_of, of_bundle_task
from nanochat.files import atomic_write_text, inside, replaced_folder
from nanochat.tasks.passages import (
    Item,
    Pair,
    Passage,
    block_items,
    draw_blocks,
    draw_items,
    ending,
    find_passages,
    long_words,
    next_sentence,
    seen_word,
    shuffled,
    unseen,
    width,
    words_of,
)

ITEMS_PER_TASK = 148  # of blocks of two and four; standard error at most 4.1 %
MIN_ITEMS = 50


def sentence_order(passage: Passage, rng: random.Random) -> Item | None:
    """Two sentences that follow a third, as written or the other way round. The words in random order say less of a
    model: counting pairs of words in 32,768 tokens tells them from the true order in 89 of 100 sentences."""
    if len(passage.sentences) < 3:
        return None
    cut = rng.randrange(len(passage.sentences) - 2)
    before, *two = passage.sentences[cut : cut + 3]
    return {"query": before, "choices": [passage.joint.join(two), passage.joint.join(two[::-1])], "gold": 0}


def last_word(passage: Passage, rng: random.Random) -> Item | None:
    """The last word of a sentence, where the passage has already used it before."""
    for cut in shuffled(range(1, len(passage.sentences)), rng):
        before, word = ending(passage.sentences[cut])
        context = passage.joint.join([*passage.sentences[max(0, cut - 4) : cut], before])
        if before and width(word) >= 4 and word in (words_of(context) if passage.joint else context):
            return {"context": context, "continuation": word}
    return None


def context_pair(passage: Passage, rng: random.Random) -> Pair | None:
    """A sentence, and the one that follows."""
    if len(passage.sentences) < 2:
        return None
    cut = rng.randrange(1, len(passage.sentences))
    return Pair(passage.document, passage.sentences[cut - 1], passage.sentences[cut])


def next_sentences(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Which of four sentences follows."""
    return block_items(draw_blocks(next_sentence, passages, rng), rng)


def sentence_orders(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """The true order is the first choice of every other item."""
    items = draw_items(sentence_order, passages, rng)
    return [{**item, "choices": item["choices"][:: -1 if number % 2 else 1], "gold": number % 2}
            for number, item in enumerate(items)]  # fmt: skip


def seen_words(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Which of four words stood in the sentence just read."""
    return block_items(draw_blocks(seen_word, passages, rng, fits=unseen), rng)


def last_words(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """No word twice: else the most common one would be a fair guess."""
    items = draw_items(last_word, passages, rng)
    return list({item["continuation"].lower(): item for item in items[::-1]}.values())[::-1]


def context_swaps(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Which of two contexts a sentence belongs to; each is asked about with the sentence of either."""
    items: list[Item] = []
    for block in draw_blocks(context_pair, passages, rng, size=2):
        options = [pair.query for pair in block]
        items += [{"context_options": options, "continuation": pair.answer, "gold": gold}
                  for gold, pair in enumerate(block)]  # fmt: skip
    return items


def copy_words(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Three unrelated words, to be written once more; the few-shot examples show what is asked."""
    vocabulary = sorted({word for passage in passages for word in long_words(passage.sentences[0])})
    if len(vocabulary) < MIN_ITEMS:
        return []
    lists = [" ".join(rng.sample(vocabulary, 3)) for _ in range(ITEMS_PER_TASK)]
    return [{"context": f"Words: {words}\nAgain:", "continuation": words} for words in lists]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A task to generate: how its items are made, how it is asked, what guessing scores in percent."""

    make: Callable[[Sequence[Passage], random.Random], list[Item]]
    kind: str
    num_fewshot: int
    baseline: int
    description: str


RECIPES = {
    "offline_next_sentence": Recipe(next_sentences, "multiple_choice", 0, 25, "which of four sentences follows"),
    "offline_sentence_order": Recipe(sentence_orders, "multiple_choice", 0, 50, "true or false order of two sentences"),
    "offline_seen_word": Recipe(seen_words, "multiple_choice", 3, 25, "which of four words was in the text"),
    "offline_last_word": Recipe(last_words, "language_modeling", 0, 0, "last word, used before in the passage"),
    "offline_context_swap": Recipe(context_swaps, "schema", 0, 50, "which of two contexts a sentence belongs to"),
    "offline_copy_words": Recipe(copy_words, "language_modeling", 3, 0, "copy three words"),
}


def make_items(passages: Sequence[Passage]) -> dict[str, list[Item]]:
    """Items of every task, few or none where the text has too little for it; the same passages give the same items."""
    return {label: recipe.make(passages, random.Random(label))[:ITEMS_PER_TASK] for label, recipe in RECIPES.items()}


def write_offline_bundle(documents: Iterable[str], source: str, target: Path) -> Bundle:
    """Generate a bundle from held-out `documents` and put it at `target`, complete or not at all. A task that they have
    too little text for is left out, all of them even: the bundle says so, and a run goes on without."""
    passages = find_passages(documents)
    joint = Counter(passage.joint for passage in passages).most_common(1)[0][0] if passages else " "
    # a bundle has one delimiter a task: of a text in several scripts, what most of it is written in
    tasks = make_items([passage for passage in passages if passage.joint == joint])
    short = {label: len(items) for label, items in tasks.items() if len(items) < MIN_ITEMS}
    why = f"items in the held-out text of {source}, at least {MIN_ITEMS} are needed"
    left_out = [f"{label}: {count} {why}" for label, count in short.items()]
    entries, table = (
        [],
        [["Eval Task", "Task Type", "#shots", "#datapoints", "Random baseline", "Guess", "Description"]],
    )
    with _replacing(target, "offline", source, left_out) as folder:
        for label in (label for label in RECIPES if label not in short):
            recipe = RECIPES[label]
            uri, shots, kind = f"offline/{label}.jsonl", recipe.num_fewshot, recipe.kind
            lines = "".join(json.dumps(item) + "\n" for item in tasks[label])
            atomic_write_text(folder / "eval_data" / uri, lines)
            about: Any = {"label": label, "kind": kind, "num_fewshot": shots, "items": tasks[label]}
            percent = float(recipe.baseline)
            best, guess = best_of(of_bundle_task(Task(**about, delimiter="", baseline=percent)))
            entry = {"label": label, "dataset_uri": uri, "num_fewshot": [shots], "icl_task_type": kind}
            entries.append(entry if joint else {**entry, "continuation_delimiter": ""})
            numbers = [str(shots), str(len(tasks[label])), f"{100 * best:.6g}"]
            table.append([label, kind.replace("_", " "), *numbers, guess, recipe.description])
        atomic_write_text(folder / "core.yaml", yaml.safe_dump({"icl_tasks": entries}, sort_keys=False))
        with (folder / "eval_meta_data.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows(table)
    return load_bundle(target)


def copy_bundle(origin: Path, target: Path) -> Bundle:
    """Check the bundle at `origin` and copy what it names to `target`, complete or not at all."""
    bundle = load_bundle(origin)
    if target.exists() and origin.samefile(target):
        return bundle
    with _replacing(target, bundle.kind, bundle.source or str(origin), bundle.left_out) as folder:
        for name in (*TABLES, *(f"eval_data/{task.uri}" for task in bundle.tasks)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(origin, name), folder / name)
    return load_bundle(target)


@contextlib.contextmanager
def _replacing(target: Path, kind: str, source: str, left_out: list[str]) -> Iterator[Path]:
    """A new folder beside `target` that takes its place in the end: read back, and with what it is written down."""
    with replaced_folder(target) as folder:
        yield folder
        marker: dict[str, Any] = {"kind": kind, "source": source, "left_out": left_out}
        atomic_write_text(folder / MARKER, json.dumps(marker) + "\n")  # what load_bundle takes an empty bundle for
        tasks = [task.label for task in load_bundle(folder).tasks]
        atomic_write_text(folder / MARKER, json.dumps({**marker, "tasks": tasks}, indent=1) + "\n")
