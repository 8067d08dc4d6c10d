"""Prose of a text source, and questions with one right choice made from it: for TextChoice and for offline CORE."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 10_000_000  # of documents read; ten times what the questions need
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]+")

Item = dict[str, Any]


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences of one paragraph of document number `document`."""

    document: int
    sentences: list[str]


ItemMaker = Callable[[Passage, Sequence[Passage], random.Random], Item | None]


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


def draw_items(make: ItemMaker, passages: Sequence[Passage], rng: random.Random) -> list[Item]:
    """What `make` gives for each passage, in random order; it may give nothing. Four documents at least."""
    made = (make(passage, passages, rng) for passage in shuffled(passages, rng))
    return [item for item in made if item is not None]


def next_sentence(passage: Passage, passages: Sequence[Passage], rng: random.Random) -> Item | None:
    """Which sentence follows: the true one, or one of three from other documents."""
    if len(passage.sentences) < 2:
        return None
    cut = rng.randrange(1, len(passage.sentences))
    wrong = [other.sentences[-1] for other in others(passages, passage, 3, rng)]
    return choice(" ".join(passage.sentences[max(0, cut - 3) : cut]), passage.sentences[cut], wrong, rng)


def seen_word(passage: Passage, passages: Sequence[Passage], rng: random.Random) -> Item | None:
    """Which of four words stood in the sentence just read."""
    sentence = rng.choice(passage.sentences)
    words = long_words(sentence)
    drawn = {rng.choice(long_words(other.sentences[0]) or [""]) for other in others(passages, passage, 3, rng)}
    wrong = sorted(drawn)
    if not words or len(wrong) < 3 or any(not word or word in sentence.lower() for word in wrong):
        return None
    return choice(f"Text: {sentence}\nA word from the text:", rng.choice(words), wrong, rng)


def shuffled(values: Iterable[Any], rng: random.Random) -> list[Any]:
    values = list(values)
    rng.shuffle(values)
    return values


def others(passages: Sequence[Passage], passage: Passage, count: int, rng: random.Random) -> list[Passage]:
    """`count` different passages from other documents than that of `passage`; there must be some."""
    chosen: dict[int, Passage] = {}
    while len(chosen) < count:
        index = rng.randrange(len(passages))
        if passages[index].document != passage.document:
            chosen[index] = passages[index]
    return list(chosen.values())


def words_of(text: str) -> list[str]:
    return _WORD.findall(text)


def long_words(sentence: str) -> list[str]:
    return [word for word in words_of(sentence) if len(word) >= 5 and word.islower()]


def choice(query: str, true: str, wrong: list[str], rng: random.Random) -> Item:
    """A multiple-choice item with the true choice at a random place."""
    gold = rng.randrange(len(wrong) + 1)
    return {"query": query, "choices": [*wrong[:gold], true, *wrong[gold:]], "gold": gold}
