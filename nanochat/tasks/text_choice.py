"""Questions with four choices made from the run's own text: train items from its train text, test items held out.

    task_data/<source>/text_choice_{train,test}.jsonl     {"question", "choices", "answer"} a line
    task_data/<source>/text_choice.json                   what they were made from; written last

Two kinds, mixed: which sentence comes next (at most half), and which of four words stood in the sentence. They are
those of offline_bundle.py, from shorter passages, as questions in a chat.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanochat import dataset
from nanochat.errors import UserError
from nanochat.eval.offline_bundle import Item, Passage, find_passages, next_sentence, seen_word
from nanochat.files import atomic_write
from nanochat.tasks.common import Conversation, Split, Task, graded_letter, multiple_choice
from nanochat.tasks.generated import fingerprint, is_made, mark_made, require_made, source_dir
from nanochat.tasks.splits import item_rng

COUNTS: dict[Split, int] = {"train": 4000, "test": 400}
MIN_ITEMS = 20
MAX_CHARS = 10_000_000  # read of each split; it takes a second or two, and gives more than enough
MAX_SENTENCE = 80  # characters; longer ones make five sentences in one question too long for small models
MAX_ITEM = 300  # characters of question and choices together: 90 tokens in the mean with all around them
LETTERS = ("A", "B", "C", "D")
RULES = 1  # count up when the making changes, so that items made by older rules are made again


class TextChoice(Task):
    """Which sentence comes next, which word stood in the text: four choices, guessing is right in one of four."""

    name = "TextChoice"
    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, split: Split, source: str, **kwargs: Any) -> None:
        """Items made from the text `source`. Raises UserError before they are made, or when they are damaged."""
        super().__init__(**kwargs)
        path = require_made(source, "text_choice", self.name) / f"text_choice_{split}.jsonl"
        self.source = f"generated from the {'train' if split == 'train' else 'validation'} text of {source}"
        self.items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    @classmethod
    def prepare(cls, source: str) -> None:
        prepare(source)

    def num_examples(self) -> int:
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        item = self.items[index]
        return multiple_choice(item["question"], item["choices"], LETTERS, item["answer"])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return graded_letter(conversation, completion)


def prepare(source: str) -> None:
    """Make the items of both splits from the text of `source`, unless they stand. UserError for too little text."""
    folder = source_dir(source)
    made_from = fingerprint(source, RULES, sorted(COUNTS.items()), MAX_CHARS, MAX_SENTENCE, MAX_ITEM)
    if is_made(folder, "text_choice", made_from):
        return
    items = make_items(dataset.iter_documents(source, "train"), dataset.iter_documents(source, "val"), source)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in items.items():
        with atomic_write(folder / f"text_choice_{split}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mark_made(folder, "text_choice", source, made_from, [f"text_choice_{split}.jsonl" for split in items])


def make_items(train: Iterable[str], held_out: Iterable[str], source: str) -> dict[Split, list[dict[str, Any]]]:
    """Up to COUNTS items of each split; the same documents give the same items. Raises UserError for too little text.

    A sentence of the held-out text that the train text read here has as well is not used for test.
    """
    passages: dict[Split, list[Passage]] = {
        "train": find_passages(_limited(train)),
        "test": find_passages(_limited(held_out)),
    }
    taken = {sentence for passage in passages["train"] for sentence in passage.sentences}
    return {
        "train": _split_items("train", _short(passages["train"], set()), source),
        "test": _split_items("test", _short(passages["test"], taken), source),
    }


def _limited(documents: Iterable[str]) -> Iterator[str]:
    """The first documents, up to MAX_CHARS characters."""
    chars = 0
    for document in documents:
        yield document
        chars += len(document)
        if chars >= MAX_CHARS:
            return


def _short(passages: Sequence[Passage], excluded: set[str]) -> list[Passage]:
    """Pairs of consecutive short sentences and single ones, none of them `excluded`, each sentence once."""
    short = []
    for passage in passages:
        usable = (len(sentence) <= MAX_SENTENCE and sentence not in excluded for sentence in passage.sentences)
        for fits, run in itertools.groupby(zip(usable, passage.sentences, strict=True), key=lambda pair: pair[0]):
            sentences = [sentence for _, sentence in run] if fits else []
            short += [Passage(passage.document, sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
    return short


def _split_items(split: Split, passages: Sequence[Passage], source: str) -> list[dict[str, Any]]:
    next_ones: list[Item] = []
    words: list[Item] = []
    # the makers look for passages of four different documents
    if len({passage.document for passage in passages}) >= 8:
        next_ones = _fitting(next_sentence(passages, item_rng("next_sentence", split)))[: COUNTS[split] // 2]
        words = _fitting(seen_word(passages, item_rng("seen_word", split)))[: COUNTS[split] - len(next_ones)]
    rows = [_row(f"Which sentence comes next? {item['query']}", item) for item in next_ones]
    rows += [_row(item["query"], item) for item in words]
    if len(rows) < MIN_ITEMS:
        raise UserError(f"too little prose in {source}: {len(rows)} {split} items for TextChoice; get more data")
    item_rng("text_choice", split).shuffle(rows)
    return rows


def _fitting(items: Iterable[Item]) -> list[Item]:
    return [item for item in items if len(item["query"]) + sum(map(len, item["choices"])) <= MAX_ITEM]


def _row(question: str, item: Item) -> dict[str, Any]:
    return {"question": question, "choices": item["choices"], "answer": LETTERS[item["gold"]]}
