"""Conversations about who the assistant is, written for this project: identity.jsonl beside this module.

A line of it is one of
    {"intent", "questions", "answers"}    each question can be answered by each answer
    {"dialogue": [intent, ...]}           several turns
    {"system", "answers": {intent: ...}}  a system message, and what is answered under it
What they say is true of a model of any size, on any text. Every way of putting a question belongs to train or to test,
by its hash, and a conversation is made from those of one split only: no question of test is ever trained on.
"""

import json
from pathlib import Path
from typing import Any

from nanochat.tasks.common import Conversation, Split, Task, item_rng, split_of

DATA = Path(__file__).with_name("identity.jsonl")
TEST_SHARE = 0.2  # of the questions, the first of each intent aside
DIALOGUES = {"train": 3, "test": 1}  # made from each sequence of intents


class Identity(Task):
    """Who are you? For training and for reading; answers are not graded."""

    name = "Identity"
    source = "written for this project"

    def __init__(self, split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conversations = make_conversations(split)

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def make_conversations(split: Split) -> list[Conversation]:
    """All conversations of a split, each once, in a fixed random order."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    intents = {line["intent"]: line for line in lines if "intent" in line}
    own = {name: own_questions(line["questions"], split) for name, line in intents.items()}
    made: list[list[dict[str, str]]] = []
    for line in lines:
        if "intent" in line:
            made += _single(own[line["intent"]], line["answers"])
        elif "dialogue" in line:
            made += _dialogues(line["dialogue"], own, intents, DIALOGUES[split])
        else:
            system = {"role": "system", "content": line["system"]}
            for intent, answers in line["answers"].items():
                made += [[system, *turn] for turn in _single(own[intent], answers)]
    distinct = list({json.dumps(messages): messages for messages in made}.values())
    item_rng("identity", split).shuffle(distinct)
    return [{"messages": messages} for messages in distinct]


def own_questions(questions: list[str], split: Split) -> list[str]:
    """Those of an intent's questions that belong to `split`. The first, the usual one to ask, is always trained on."""
    usual, *others = questions
    own = [question for question in others if split_of("identity", question, test_share=TEST_SHARE) == split]
    return [usual, *own] if split == "train" else own


def _single(questions: list[str], answers: list[str]) -> list[list[dict[str, str]]]:
    return [_turn(question, answer) for question in questions for answer in answers]


def _dialogues(
    names: list[str], own: dict[str, list[str]], intents: dict[str, Any], count: int
) -> list[list[dict[str, str]]]:
    """`count` conversations through the intents `names`; none where one of them has no question in this split."""
    if not all(own[name] for name in names):
        return []
    rngs = [item_rng("dialogue", names, number) for number in range(count)]
    turns = [[_turn(rng.choice(own[name]), rng.choice(intents[name]["answers"])) for name in names] for rng in rngs]
    return [[message for turn in one for message in turn] for one in turns]


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": _as_typed(question, answer)}, {"role": "assistant", "content": answer}]


def _as_typed(question: str, answer: str) -> str:
    """The question as somebody types it: mostly as written, at times in small letters or after a greeting."""
    drawn = item_rng("typed", question, answer).random()
    if drawn < 0.25:
        return question.lower().rstrip("?!.")
    if drawn < 0.35 and question.endswith("?"):
        return f"Hi! {question}"
    return question
