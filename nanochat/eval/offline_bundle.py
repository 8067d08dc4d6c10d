"""Evaluation bundles without a download: small tasks made from held-out text, in the layout that core_eval reads.

They measure the same skills in miniature (which sentence follows, which word was meant, copying from the prompt), so
that the whole chain, few-shot prompts and all three kinds of task included, can be run and compared without a network.
Their scores are no CORE: every task is named `offline_...`, and `bundle.json` says kind = offline.
"""

import csv
import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from nanochat.errors import UserError
from nanochat.eval.bundle import MARKER, Bundle, load_bundle

ITEMS_PER_TASK = 150  # binomial standard error at most 4.1 %
MIN_ITEMS = 50
MAX_CHARS = 10_000_000  # held-out text read; ten times what the tasks need
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+")

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Passage:
    """Consecutive sentences of one paragraph of document number `document`."""

    document: int
    sentences: list[str]


def find_passages(documents: Iterable[str]) -> list[Passage]:
    """Runs of prose sentences, no sentence twice, from the first MAX_CHARS characters of `documents`."""
    passages: list[Passage] = []
    seen: set[str] = set()
    chars = 0
    for number, document in enumerate(documents):
        for paragraph in re.split(r"\n\s*\n", document):
            run: list[str] = []
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                if _is_prose(sentence) and sentence not in seen:
                    run.append(sentence)
                elif run:
                    passages.append(Passage(number, run))
                    run = []
                seen.add(sentence)
            if run:
                passages.append(Passage(number, run))
        chars += len(document)
        if chars > MAX_CHARS:
            break
    return passages


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        40 <= len(sentence) <= 300
        and len(sentence.split()) >= 6
        and letters >= 0.88 * len(sentence)
        and "--" not in sentence  # an underlined heading that stood in the paragraph
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
    )


# ---- the tasks: passages -> items, in random order, as many as can be made


def next_sentence(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Which sentence follows: the true one, or one of three from other documents."""
    items = []
    for passage in _shuffled(passages, rng):
        if len(passage.sentences) < 2:
            continue
        cut = rng.randrange(1, len(passage.sentences))
        wrong = [other.sentences[-1] for other in _others(passages, passage, 3, rng)]
        query = " ".join(passage.sentences[max(0, cut - 3) : cut])
        items.append(_choice(query, passage.sentences[cut], wrong, rng))
    return items


def word_order(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """How a sentence goes on: as written, or with its remaining words in random order."""
    items = []
    for passage in _shuffled(passages, rng):
        words = rng.choice(passage.sentences).split()
        middle = words[3:-1]
        mixed = _shuffled(middle, rng)
        if len(middle) >= 4 and mixed != middle:
            true, wrong = (" ".join([*rest, words[-1]]) for rest in (middle, mixed))
            items.append(_choice(" ".join(words[:3]), true, [wrong], rng))
    return items


def seen_word(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Which of four words stood in the sentence just read."""
    items = []
    for passage in _shuffled(passages, rng):
        sentence = rng.choice(passage.sentences)
        words = _long_words(sentence)
        foreign = sorted(
            {rng.choice(_long_words(other.sentences[0]) or [""]) for other in _others(passages, passage, 3, rng)}
        )
        taken = sentence.lower()
        if words and len(foreign) == 3 and all(word and word not in taken for word in foreign):
            items.append(_choice(f"Text: {sentence}\nA word from the text:", rng.choice(words), foreign, rng))
    return items


def last_word(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """The last word of a sentence, where the passage has already used it before."""
    items = []
    for passage in _shuffled(passages, rng):
        for cut in _shuffled(range(1, len(passage.sentences)), rng):
            before, _, end = passage.sentences[cut].rpartition(" ")
            word = end.rstrip(".!?")
            context = " ".join([*passage.sentences[max(0, cut - 4) : cut], before])
            if len(word) >= 4 and word.isalpha() and word in _WORD.findall(context):
                items.append({"context": context, "continuation": word})
                break
    return items


def context_swap(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Which of two contexts, one from another document, a sentence belongs to."""
    items = []
    for passage in _shuffled(passages, rng):
        if len(passage.sentences) < 2:
            continue
        cut = rng.randrange(1, len(passage.sentences))
        options = [passage.sentences[cut - 1], _others(passages, passage, 1, rng)[0].sentences[0]]
        gold = rng.randrange(2)
        items.append(
            {"context_options": options[:: -1 if gold else 1], "continuation": passage.sentences[cut], "gold": gold}
        )
    return items


def copy_words(passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """Three unrelated words, to be written once more; the few-shot examples show what is asked."""
    vocabulary = sorted({word for passage in passages for word in _long_words(passage.sentences[0])})
    if len(vocabulary) < MIN_ITEMS:
        return []
    lists = [" ".join(rng.sample(vocabulary, 3)) for _ in range(ITEMS_PER_TASK)]
    return [{"context": f"Words: {words}\nAgain:", "continuation": words} for words in lists]


def _shuffled(values: Iterable[Any], rng: random.Random) -> list[Any]:
    shuffled = list(values)
    rng.shuffle(shuffled)
    return shuffled


def _others(passages: Sequence[Passage], own: Passage, count: int, rng: random.Random) -> list[Passage]:
    """`count` different passages from other documents; there are some, by the check in make_items."""
    chosen: dict[int, Passage] = {}
    while len(chosen) < count:
        index = rng.randrange(len(passages))
        if passages[index].document != own.document:
            chosen[index] = passages[index]
    return list(chosen.values())


def _long_words(sentence: str) -> list[str]:
    return [word for word in _WORD.findall(sentence) if len(word) >= 5 and word.islower()]


def _choice(query: str, true: str, wrong: list[str], rng: random.Random) -> Item:
    gold = rng.randrange(len(wrong) + 1)
    return {"query": query, "choices": [*wrong[:gold], true, *wrong[gold:]], "gold": gold}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A task to generate: how its items are made, how it is asked, and what guessing scores in percent."""

    make: Callable[[Sequence[Passage], random.Random], list[Item]]
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
    "offline_copy_words": Recipe(copy_words, "language_modeling", 3, 0, "copy three words"),
}


def make_items(documents: Iterable[str]) -> dict[str, list[Item]]:
    """Items of every task; the same documents give the same items. Raises UserError where there is too little text."""
    passages = find_passages(documents)
    if len({passage.document for passage in passages}) < 8:
        raise UserError(
            "too little held-out prose for an offline bundle: fewer than 8 documents have any; get more data"
        )
    tasks = {}
    for label, recipe in RECIPES.items():
        items = recipe.make(passages, random.Random(label))[:ITEMS_PER_TASK]
        if len(items) < MIN_ITEMS:
            raise UserError(
                f"too little held-out prose for an offline bundle: {len(items)} items for {label}, "
                f"at least {MIN_ITEMS} are needed; get more data"
            )
        tasks[label] = items
    return tasks


# ---- writing


def write_offline_bundle(documents: Iterable[str], source: str, target: Path) -> Bundle:
    """Generate a bundle from held-out `documents` and put it at `target`, whole or not at all."""
    tasks = make_items(documents)
    staging = _staging(target)
    for label, items in tasks.items():
        file = staging / "eval_data" / "offline" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    entries = [
        {
            "label": label,
            "dataset_uri": f"offline/{label}.jsonl",
            "num_fewshot": [recipe.num_fewshot],
            "icl_task_type": recipe.kind,
        }
        for label, recipe in RECIPES.items()
    ]
    (staging / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}, sort_keys=False), encoding="utf-8")
    with (staging / "eval_meta_data.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["Eval Task", "Task Type", "#shots", "#datapoints", "Random baseline", "Description"])
        for label, recipe in RECIPES.items():
            kind = recipe.kind.replace("_", " ")
            row = [label, kind, recipe.num_fewshot, len(tasks[label]), recipe.baseline, recipe.description]
            writer.writerow(row)
    return _finish(staging, target, kind="offline", source=source)


def copy_bundle(origin: Path, target: Path) -> Bundle:
    """Check the bundle at `origin` and copy what it names to `target`, whole or not at all."""
    bundle = load_bundle(origin)
    if target.exists() and origin.samefile(target):
        return bundle
    entries = yaml.safe_load((origin / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    staging = _staging(target)
    names = ["core.yaml", "eval_meta_data.csv", *(f"eval_data/{entry['dataset_uri']}" for entry in entries)]
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin / name, staging / name)
    return _finish(staging, target, kind=bundle.kind, source=bundle.source or str(origin))


def _staging(target: Path) -> Path:
    staging = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _finish(staging: Path, target: Path, kind: str, source: str) -> Bundle:
    """Mark, read back, and swap into place."""
    labels = [task.label for task in load_bundle(staging).tasks]
    marker = {"kind": kind, "source": source, "tasks": labels}
    (staging / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(staging, target)
    shutil.rmtree(old, ignore_errors=True)
    return load_bundle(target)
