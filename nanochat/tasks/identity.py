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

from nanochat.files import read_jsonl
from nanochat.tasks.common import Conversation, Split, Task, item_rng, split_of

DATA = Path(__file__).with_suffix(".jsonl")
TEST_SHARE = 0.2  # of the questions, the first of each intent aside
DIALOGUES = {"train": 3, "test": 1}  # from each sequence of intents


class Identity(Task):
    """Who are you? For training and for reading; answers are not graded."""

    name = "Identity"
    source = "written for this project"

    def __init__(self, split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.items = make_conversations(split)


def make_conversations(split: Split) -> list[Conversation]:
    """All conversations of a split, each once, in a fixed random order."""
    lines = read_jsonl(DATA)
    intents = {line["intent"]: line for line in lines if "intent" in line}
    questions = {name: split_questions(line["questions"], split) for name, line in intents.items()}
    conversations: list[list[dict[str, str]]] = []
    for line in lines:
        if "intent" in line:
            conversations += _single(questions[line["intent"]], line["answers"])
        elif "dialogue" in line:
            conversations += _dialogues(line["dialogue"], questions, intents, DIALOGUES[split])
        else:
            system = {"role": "system", "content": line["system"]}
            for intent, answers in line["answers"].items():
                conversations += [[system, *turn] for turn in _single(questions[intent], answers)]
    distinct = list({json.dumps(messages): messages for messages in conversations}.values())
    item_rng("identity", split).shuffle(distinct)
    return [{"messages": messages} for messages in distinct]


def split_questions(questions: list[str], split: Split) -> list[str]:
    """Those of an intent's questions that belong to `split`. The first, the usual one to ask, is always trained on."""
    usual, *others = questions
    found = [question for question in others if split_of("identity", question, test_share=TEST_SHARE) == split]
    return [usual, *found] if split == "train" else found


def _single(questions: list[str], answers: list[str]) -> list[list[dict[str, str]]]:
    return [_turn(question, answer) for question in questions for answer in answers]


def _dialogues(
    names: list[str], questions: dict[str, list[str]], intents: dict[str, Any], count: int
) -> list[list[dict[str, str]]]:
    """`count` conversations through the intents `names`; none where one of them has no question in this split."""
    if not all(questions[name] for name in names):
        return []
    dialogues = []
    for rng in (item_rng("dialogue", names, number) for number in range(count)):
        turns = [_turn(rng.choice(questions[name]), rng.choice(intents[name]["answers"])) for name in names]
        dialogues.append([message for turn in turns for message in turn])
    return dialogues


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    """Question and answer. The question is mostly typed as written, at times in small letters or after a greeting."""
    drawn = item_rng("typed", question, answer).random()
    if drawn < 0.25:
        question = question.lower().rstrip("?!.")
    elif drawn < 0.35 and question.endswith("?"):
        question = f"Hi! {question}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
