"""What a task is: a list of conversations with a way to grade answers; slices and mixtures of them.

Also the hashing that gives every generated item to train or to test, and seeds its random choices: it depends on
values alone, never on the process, PYTHONHASHSEED or Python's global random state.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal

from nanochat.errors import UserError

Conversation = dict[str, Any]  # {"messages": [...]}, see nanochat/chat_format.py; tasks may add keys of their own
Split = Literal["train", "test"]
MIXTURE_SEED = 42
CARELESS = 0.2  # share of the questions, of either kind
_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
# An answer as graders of GSM8K read it, $1,000.00 being 1000, and the rest of its line
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_ANSWER = re.compile(rf"####[ \t]*(-?)\$?(-?)({_NUMBER})(?![\d,]*\d)(.*?)[ \t\r]*(?=\n|####|\Z)", re.ASCII)
_REST = re.compile(r"[.,;:]*((?:[ \t]+[a-z][a-z']+[.,;:!?]*)*)", re.ASCII | re.IGNORECASE)
# Words that make another value of the number before them, or take it back; others say what was counted
_VALUE_WORDS = re.compile(
    r"\b(?:or|oder|ou|plus|minus|times [a-z]+|point|percent|cent|squared|cubed|(?:hundred|thousand|dozen|third|quarter)"
    r"s?|half|halve[ds]|(?:doubl|tripl|quadrupl)ed?|twice|thrice|\w+fold|tens|score|mil|mln|mio|bn|lakhs?|crores?|\w+ths?"
    r"|\w+(?:illions?|teen)|nought|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:twen|thir|for|fif"
    r"|six|seven|eigh|nine)ty|negative|factorial|binary|octal|hex|inverse|reciprocal|sqrt|roots?|not|nope|wrong|incorrect"
    r"|false|n?either|maybe|perhaps|approximately|at (?:most|least))\b", re.ASCII | re.IGNORECASE)  # fmt: skip


class Task:
    """Conversations, by index: `task[i]` for 0 <= i < len(task). A slice of them with start, stop and step. Subclasses
    set `items` or give `num_examples` and `get_example`; where answers can be graded, they set `eval_type` and give
    `evaluate`."""

    name: str = ""  # on the command line and in reports
    # graded by the logits of `conversation["letters"]`, by generating an answer, or not at all
    eval_type: Literal["categorical", "generative"] | None = None
    baseline: float = 0.0  # accuracy of guessing, between 0 and 1
    published: bool = False  # data sets that others publish numbers on; False: items that this program generates
    source: str = "generated"  # where the items come from, in words for the report
    runs_code: bool = False  # whether grading runs code that the model wrote
    any_size: bool = False  # whether the class takes `size`, the number of items to generate; others have a fixed set
    items: Sequence[Any] = ()  # all conversations, before slicing, where a list of them is at hand

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(f"task slice {start}:{stop}:{step}: expected 0 <= start <= stop and step >= 1")
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """Number of items before slicing."""
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        """Item `index` before slicing: the question and, as the last message, the right answer."""
        found: Conversation = self.items[index]
        return found

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion`, the model's answer or the letter it chose, is right. Raises UserError for tasks that
        are only trained on, and ValueError for a letter that is none of the item's."""
        if self.eval_type != "categorical":
            raise UserError(f"{self.name or type(self).__name__} has no answers to grade: choose another task")
        if completion not in conversation["letters"]:
            raise ValueError(f"{completion!r} is none of the letters {conversation['letters']}")
        return bool(completion == conversation["messages"][-1]["content"])

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The reward of `completion` in reinforcement learning: 1 for a right answer and 0 otherwise."""
        return float(self.evaluate(conversation, completion))

    @classmethod
    def prepare(cls, name: str, source: str, from_dir: Path | None) -> None:
        """Put into the store what the task `name` reads, nothing for most: files that lie in the folder `from_dir`,
        what is made from the text `source`. Raises UserError where it cannot be had."""

    def _range(self) -> range:
        return range(self.num_examples())[self.start : self.stop : self.step]

    def __len__(self) -> int:
        return len(self._range())

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name or type(self).__name__}: item {index} of {len(self)}")
        return self.get_example(self._range()[index])


class LeftOut(Task):
    """Stands for a task that the run's text has too little for, so that log and report can say so: it has no items."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__()
        self.name, self.why, self.source = name, why, f"left out: {why}"


class GeneratedTask(Task):
    """Questions made by a program and graded by their answers, as many as requested."""

    eval_type = "generative"
    any_size = True
    sizes: ClassVar[dict[Split, int]] = {"train": 20_000, "test": 256}

    def __init__(self, split: Split, size: int | None = None, **kwargs: Any) -> None:
        """`size` items, by default `sizes[split]`."""
        super().__init__(**kwargs)
        self.split, self.size = split, self.sizes[split] if size is None else size

    def num_examples(self) -> int:
        return self.size

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether `completion` ends in the number that the last part of the conversation's answer ends in."""
        return answer_number(completion) == answer_number(conversation["messages"][-1]["content"][-1]["text"])


class TaskMixture(Task):
    """All items of several tasks in one fixed random order. A task that is listed twice comes twice as often."""

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        self.items = [(number, item) for number, task in enumerate(self.tasks) for item in range(len(task))]
        random.Random(MIXTURE_SEED).shuffle(self.items)

    def get_example(self, index: int) -> Conversation:
        number, item = self.items[index]
        return self.tasks[number][item]


# ---- conversations


def answered(question: str, answer: str | list[dict[str, str]]) -> Conversation:
    """One question and its answer: text, or the parts of a message with tool calls."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def worded(text: str, rng: random.Random) -> str:
    """`text` with one of the alternatives of each `[gets|buys|]`, as people type: some leave the first letter small or
    the mark at the end out."""
    text = _ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("|")), text)
    text = text[:1].lower() + text[1:] if rng.random() < CARELESS else text
    return text.rstrip("?.! ") if rng.random() < CARELESS else text


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A categorical question as the user asks it. The letter stands after its choice, so that a small model binds it to
    what it has just read, and without a space, so that it is the same token as in the answer."""
    if len(letters) != len(choices):
        raise UserError(f"multiple choice with {len(letters)} letters for {len(choices)} choices: {question[:60]!r}")
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str], answer: str) -> Conversation:
    """A categorical item: its question and the right letter as its answer."""
    return {**answered(render_mc(question, letters, choices), answer), "letters": [*letters], "choices": [*choices]}


# ---- calculations


def answer_numbers(text: str, unit: str = "") -> list[Decimal | None]:
    """The number behind each `####` that has one; None where what follows on its line makes another value of it:
    `110/7`, `110e3`, `110 or 111`, `110 million`. `unit`, a pattern, may stand at the number."""
    numbers: list[Decimal | None] = []
    for found in _ANSWER.finditer(text):
        rest = re.fullmatch(f"(?:{unit})?{_REST.pattern}", found[4], _REST.flags)
        plain = rest and not _VALUE_WORDS.search(rest[1]) and not (found[1] and found[2])
        numbers.append(Decimal(f"{found[1]}{found[2]}{found[3]}".replace(",", "")) if plain else None)
    return numbers


def answer_number(text: str) -> Decimal | None:
    """The number after the last `####`, None where there is none."""
    return (answer_numbers(text) or [None])[-1]


def call_calculator(expression: str, result: int) -> list[dict[str, str]]:
    """The two parts of one tool call: what the model writes, and the result put in behind it."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": str(result)}]


# ---- hashing


def stable_hash(*parts: object) -> int:
    """64 bits over `parts` (strings, numbers, tuples of them) written in ASCII: the same everywhere, never below 0."""
    return int.from_bytes(hashlib.blake2b(ascii(parts).encode(), digest_size=8).digest(), "big")


def split_of(*identity: object, test_share: float = 0.1) -> Split:
    """The split of an item, from what identifies it."""
    # apart from the hashes that seed generators: an item's split must not tell anything about its other choices
    return "test" if stable_hash("split", *identity) < test_share * 2**64 else "train"


def item_rng(*identity: object) -> random.Random:
    """The random choices of one item."""
    return random.Random(stable_hash("item", *identity))
