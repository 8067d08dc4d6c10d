"""Evaluation bundles without a download: small tasks made from held-out text, in the layout that bundle.py reads.

They measure the same skills in miniature (which sentence follows, which word was meant, copying from the prompt), so
that the whole chain, few-shot prompts and all three kinds of task included, can be run and compared without a network.
Their scores are no CORE: every task is named `offline_...`, and `bundle.json` says kind = offline.
"""

import contextlib
import csv
import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from nanochat.eval.bundle import MARKER, TABLES, Bundle, load_bundle
from nanochat.files import atomic_write_text, inside, temporary_folder
from nanochat.tasks.passages import (
    Item,
    ItemMaker,
    Passage,
    choice,
    draw_items,
    ending,
    find_passages,
    graphemes,
    long_words,
    next_sentence,
    others,
    seen_word,
    shuffled,
    width,
    words_of,
)

ITEMS_PER_TASK = 150  # binomial standard error at most 4.1 %
MIN_ITEMS = 50


def word_order(passage: Passage, passages: Sequence[Passage], rng: random.Random) -> Item | None:
    """How a sentence goes on: as written, or with its remaining words in random order."""
    sentence = rng.choice(passage.sentences)
    words = sentence.split() if passage.joint else graphemes(sentence)
    middle = words[3:-1]
    mixed = shuffled(middle, rng)
    if len(middle) < 4 or mixed == middle:
        return None
    true, wrong = (passage.joint.join([*rest, words[-1]]) for rest in (middle, mixed))
    return choice(passage.joint.join(words[:3]), true, [wrong], rng)


def last_word(passage: Passage, passages: Sequence[Passage], rng: random.Random) -> Item | None:
    """The last word of a sentence, where the passage has already used it before."""
    for cut in shuffled(range(1, len(passage.sentences)), rng):
        before, word = ending(passage.sentences[cut])
        context = passage.joint.join([*passage.sentences[max(0, cut - 4) : cut], before])
        if before and width(word) >= 4 and word in (words_of(context) if passage.joint else context):
            return {"context": context, "continuation": word}
    return None


def context_swap(passage: Passage, passages: Sequence[Passage], rng: random.Random) -> Item | None:
    """Which of two contexts, one from another document, a sentence belongs to."""
    if len(passage.sentences) < 2:
        return None
    cut = rng.randrange(1, len(passage.sentences))
    options = [passage.sentences[cut - 1], others(passages, passage, 1, rng)[0].sentences[0]]
    gold = rng.randrange(2)
    return {"context_options": options[:: -1 if gold else 1], "continuation": passage.sentences[cut], "gold": gold}


def copy_words(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Three unrelated words, to be written once more; the few-shot examples show what is asked."""
    vocabulary = sorted({word for passage in passages for word in long_words(passage.sentences[0])})
    if len(vocabulary) < MIN_ITEMS:
        return []
    lists = [" ".join(rng.sample(vocabulary, 3)) for _ in range(ITEMS_PER_TASK)]
    return [{"context": f"Words: {words}\nAgain:", "continuation": words} for words in lists]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A task to generate: how an item is made (None: copy_words), how it is asked, what guessing scores in percent."""

    make: ItemMaker | None
    kind: str
    num_fewshot: int
    baseline: int
    description: str


RECIPES = {
    "offline_next_sentence": Recipe(next_sentence, "multiple_choice", 0, 25, "which of four sentences follows"),
    "offline_word_order": Recipe(word_order, "multiple_choice", 0, 50, "true or shuffled end of a sentence"),
    "offline_seen_word": Recipe(seen_word, "multiple_choice", 3, 25, "which of four words was in the text"),
    "offline_last_word": Recipe(last_word, "language_modeling", 0, 0, "last word, used before in the passage"),
    "offline_context_swap": Recipe(context_swap, "schema", 0, 50, "which of two contexts a sentence belongs to"),
    "offline_copy_words": Recipe(None, "language_modeling", 3, 0, "copy three words"),
}


def make_items(passages: Sequence[Passage]) -> dict[str, list[Item]]:
    """Items of every task, few or none where the text has too little for it; the same passages give the same items."""
    tasks = {}
    for label, recipe in RECIPES.items():
        rng = random.Random(label)
        items = draw_items(recipe.make, passages, rng) if recipe.make else copy_words(passages, rng)
        tasks[label] = items[:ITEMS_PER_TASK]
    return tasks


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
    entries, table = [], [["Eval Task", "Task Type", "#shots", "#datapoints", "Random baseline", "Description"]]
    with _replacing(target, "offline", source, left_out) as folder:
        for label in (label for label in RECIPES if label not in short):
            recipe = RECIPES[label]
            uri, shots, kind = f"offline/{label}.jsonl", recipe.num_fewshot, recipe.kind
            lines = "".join(json.dumps(item) + "\n" for item in tasks[label])
            atomic_write_text(folder / "eval_data" / uri, lines)
            entry = {"label": label, "dataset_uri": uri, "num_fewshot": [shots], "icl_task_type": kind}
            entries.append(entry if joint else {**entry, "continuation_delimiter": ""})
            numbers = [str(number) for number in (shots, len(tasks[label]), recipe.baseline)]
            table.append([label, kind.replace("_", " "), *numbers, recipe.description])
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
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as folder, temporary_folder(target.with_name(f"{target.name}.old")) as old:
        yield folder
        marker: dict[str, Any] = {"kind": kind, "source": source, "left_out": left_out}
        atomic_write_text(folder / MARKER, json.dumps(marker) + "\n")  # what load_bundle takes an empty bundle for
        tasks = [task.label for task in load_bundle(folder).tasks]
        atomic_write_text(folder / MARKER, json.dumps({**marker, "tasks": tasks}, indent=1) + "\n")
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
