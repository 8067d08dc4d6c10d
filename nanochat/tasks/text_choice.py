"""Which of four words of the run's own text ends in a letter, or begins with it: worked out word by word.

    Which of these words ends in b: apple, crab, tent, zoo?
    The word apple: a p p l e no; crab: c r a b yes
    #### crab

Four questions in a row have the same four words, each the answer of one, at each place once: length, place and
frequency of a word say nothing. Letters of choices, `A` for a sentence, stayed at chance in models of every size tried:
they have to find a match and carry its letter over at once, in one token. Here the letter that decides stands right
before each `yes` and `no`.
"""

import random
from typing import Any

from nanochat.errors import TooLittleText
from nanochat.tasks.common import Conversation, Split, answered, item_rng, worded
from nanochat.tasks.spelling import QUOTATION, QUOTES, WordTask, characters

CHOICES = 4
LONGEST = 8  # letters of a word, so that the answer stays below 96 tokens
_WHICH = "[Which|Which one|Which word] of [these words|these|the words|the following words]"
_WORDS = "[: {words}|? {words}|: {words}?]"
QUESTIONS = {
    "ends": f"{_WHICH} [ends in|ends with|has at its end] [|the letter ]{{letter}}{_WORDS}",
    "begins": f"{_WHICH} [begins with|starts with|has at its beginning] [|the letter ]{{letter}}{_WORDS}",
}
PLACES = {"ends": -1, "begins": 0}  # of the letter that is asked about


class TextChoice(WordTask):
    """Which of four words ends in, or begins with, a letter; the first of four is right in one of four."""

    name = "TextChoice"
    baseline = 1 / CHOICES

    def __init__(self, split: Split, source: str, size: int | None = None, **kwargs: Any) -> None:
        """Raises UserError before the words are there, and TooLittleText where few letters begin and end them."""
        super().__init__(split, source, size, **kwargs)
        self.words = [word for word in self.words if len(word) <= LONGEST]
        different = {kind: len({characters(word)[place] for word in self.words}) for kind, place in PLACES.items()}
        self.kinds = [kind for kind, count in different.items() if count >= CHOICES]
        if not self.kinds:
            raise TooLittleText(
                f"too few words in {source}: those of up to {LONGEST} letters begin with {different['begins']} letters "
                f"and end in {different['ends']}; TextChoice needs {CHOICES}"
            )

    def get_example(self, index: int) -> Conversation:
        block, member = divmod(index, CHOICES)
        shared = item_rng(self.name, self.split, "block", block)
        kind = shared.choice(self.kinds)
        words = self._different(kind, shared)
        places = shared.sample(range(CHOICES), CHOICES)
        right = words.pop(member)
        rng = item_rng(self.name, self.split, index)
        rng.shuffle(words)
        words.insert(places[member], right)
        letter = characters(right)[PLACES[kind]]
        quotes = rng.choice(QUOTES)
        question = worded(QUESTIONS[kind], rng).format(letter=letter, words=", ".join(map(quotes.format, words)))
        return {**answered(question, _worked(kind, words, right)), "choices": words}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the line after the last `####` is the right word and nothing else."""
        _, mark, said = completion.rpartition("####")
        expected = conversation["messages"][-1]["content"].rpartition("####")[2].strip()
        return bool(mark) and said.strip().partition("\n")[0].strip(f" {QUOTATION}.") == expected

    def _different(self, kind: str, rng: random.Random) -> list[str]:
        """Words of which no two end, or begin, with the same letter."""
        found: dict[str, str] = {}
        while len(found) < CHOICES:
            word = rng.choice(self.words)
            found.setdefault(characters(word)[PLACES[kind]], word)
        return list(found.values())


def _worked(kind: str, words: list[str], right: str) -> str:
    """Word after word up to the right one: its letters, or the first of them, and whether it is the one."""
    steps = []
    for word in words[: words.index(right) + 1]:
        letters = characters(word) if kind == "ends" else characters(word)[:1]
        steps.append(f"{word}: {' '.join(letters)} {'yes' if word == right else 'no'}")
    return f"The word {'; '.join(steps)}\n#### {right}"
