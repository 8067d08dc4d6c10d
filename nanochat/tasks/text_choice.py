"""Questions with four choices made from the run's own text: train items from its train text, test items held out.

    task_data/<source>/text_choice_{train,test}.jsonl     {"question", "choices", "answer"} a line
    task_data/<source>/text_choice.json                   what they were made from; written last

Two kinds, mixed: which sentence comes next (at most half), and which of four words stood in the sentence. They are
those of the offline bundle, from shorter passages, as questions in a chat.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanochat.data import sources
from nanochat.errors import TooLittleText
from nanochat.tasks.common import Conversation, Split, Task, item_rng, multiple_choice
from nanochat.tasks.generated import generate, require
from nanochat.tasks.passages import (
    MAX_CHARS,
    Item,
    Passage,
    block_items,
    draw_blocks,
    find_passages,
    next_sentence,
    seen_word,
    unseen,
    width,
)

COUNTS: dict[Split, int] = {"train": 4000, "test": 400}
MIN_ITEMS = 20
# Widths (nanochat/tasks/passages.py): characters, but for scripts in which one says more.
MAX_SENTENCE = 80  # longer ones make five sentences in one question too long for small models
MAX_ITEM = 300  # of question and choices together: 90 tokens in the mean with all around them
LETTERS = ("A", "B", "C", "D")
RULES = 3  # count up when the making changes, so that items made by older rules are made again


class TextChoice(Task):
    """Which sentence comes next, which word stood in the text: four choices, guessing is right in one of four."""

    name = "TextChoice"
    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: Split, source: str, **kwargs: Any) -> None:
        """Items generated from the text `source`. Raises UserError before they are, or when they are damaged, and
        TooLittleText where the text gave too few."""
        super().__init__(**kwargs)
        path = require(source, "text_choice", self.name) / f"text_choice_{split}.jsonl"
        self.source = f"generated from the {'train' if split == 'train' else 'validation'} text of {source}"
        self.items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(self.items) < MIN_ITEMS:
            found = f"{len(self.items)} {split} items, at least {MIN_ITEMS} are needed"
            raise TooLittleText(f"too little prose in {source}: {found} for TextChoice; get more data")

    def get_example(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice(item["question"], item["choices"], LETTERS, item["answer"])

    @classmethod
    def prepare(cls, name: str, source: str, from_dir: Path | None = None) -> None:
        """Make the items of both splits, unless that is done; few or none where there is too little text."""

        def make() -> dict[str, str]:
            texts = (sources.iter_documents(source, "train"), sources.iter_documents(source, "val"))
            return {
                f"text_choice_{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)
                for split, rows in make_items(*texts).items()
            }

        generate(source, "text_choice", (RULES, sorted(COUNTS.items()), MAX_CHARS, MAX_SENTENCE, MAX_ITEM), make)


def make_items(train: Iterable[str], held_out: Iterable[str]) -> dict[Split, list[dict[str, Any]]]:
    """Up to COUNTS items of each split, few or none where there is too little text; the same documents give the same.

    A sentence of the held-out text that the train text read here has as well is not used for test.
    """
    train_passages, test_passages = find_passages(train), find_passages(held_out)
    trained_on = {sentence for passage in train_passages for sentence in passage.sentences}
    return {
        "train": _split_items("train", _short(train_passages, set())),
        "test": _split_items("test", _short(test_passages, trained_on)),
    }


def _short(passages: Sequence[Passage], excluded: set[str]) -> list[Passage]:
    """Pairs of consecutive short sentences and single ones, none of them `excluded`, each sentence once."""
    short = []
    for passage in passages:
        usable = (width(sentence) <= MAX_SENTENCE and sentence not in excluded for sentence in passage.sentences)
        for fits, run in itertools.groupby(zip(usable, passage.sentences, strict=True), key=lambda pair: pair[0]):
            sentences = [sentence for _, sentence in run] if fits else []
            short += [Passage(passage.document, sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
    return short


def _split_items(split: Split, passages: Sequence[Passage]) -> list[dict[str, Any]]:
    rng = item_rng("next_sentence", split)
    pairs = block_items(draw_blocks(next_sentence, passages, rng, most=MAX_ITEM), rng)[: COUNTS[split] // 2]
    rng = item_rng("seen_word", split)
    blocks = draw_blocks(seen_word, passages, rng, most=MAX_ITEM, fits=unseen)
    words = block_items(blocks, rng)[: COUNTS[split] - len(pairs)]
    rows = [_row(f"Which sentence comes next? {item['query']}", item) for item in pairs]
    rows += [_row(item["query"], item) for item in words]
    item_rng("text_choice", split).shuffle(rows)
    return rows


def _row(question: str, item: Item) -> dict[str, Any]:
    return {"question": question, "choices": item["choices"], "answer": LETTERS[item["gold"]]}
