"""identity.py: enough conversations, true of a model of any size, test questions never trained on."""

import json
import re
from collections import Counter

import pytest

from nanochat.errors import UserError
from nanochat.tasks.identity import DATA, Identity, split_questions

LINES = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
INTENTS = [line for line in LINES if "intent" in line]


def plain(question: str) -> str:
    """What is left when letter case, punctuation and a greeting before it do not count."""
    return " ".join(re.findall(r"\w+", question.lower().removeprefix("hi! ")))


def user_turns(task: Identity) -> set[str]:
    return {
        plain(message["content"])
        for index in range(len(task))
        for message in task[index]["messages"]
        if message["role"] == "user"
    }


def test_enough_to_train_on():
    assert len(INTENTS) == len({line["intent"] for line in INTENTS}) >= 60
    assert all(len(line["questions"]) >= 4 and 1 <= len(line["answers"]) <= 3 for line in INTENTS)
    assert len(Identity("train")) >= 600 and len(Identity("test")) >= 50
    for split in ("train", "test"):
        task = Identity(split)
        kinds = Counter(len(task[index]["messages"]) for index in range(len(task)))
        assert kinds[2] > 50 and kinds[4] > 10 and len(kinds) >= 3  # one turn, two turns, and more or a system message
        assert any(task[index]["messages"][0]["role"] == "system" for index in range(len(task)))
        assert len({json.dumps(task[index]) for index in range(len(task))}) == len(task)


def test_questions_are_all_different():
    counts = Counter(plain(question) for line in INTENTS for question in line["questions"])
    assert max(counts.values()) == 1


def test_test_questions_are_never_trained_on():
    train, test = user_turns(Identity("train")), user_turns(Identity("test"))
    assert not train & test
    assert train | test <= {plain(question) for line in INTENTS for question in line["questions"]}
    assert len(test) > 40


def test_the_usual_question_of_each_intent_is_trained_on():
    train = user_turns(Identity("train"))
    for line in INTENTS:
        assert plain(line["questions"][0]) in train
        both = split_questions(line["questions"], "train") + split_questions(line["questions"], "test")
        assert sorted(both) == sorted(line["questions"])


def test_answers_claim_nothing_that_differs_from_run_to_run():
    answers = [answer for line in INTENTS for answer in line["answers"]]
    assert not [
        answer for answer in answers if re.search(r"\d|million|billion|fineweb|transformer|gpu", answer.lower())
    ]
    assert all(len(answer) <= 150 and len(re.findall(r"[.!?](?=\s|$)", answer)) <= 3 for answer in answers)


def test_lines_name_intents_that_exist():
    names = {line["intent"] for line in INTENTS}
    for line in LINES:
        assert set(line.get("dialogue", [])) <= names
        assert "system" not in line or set(line["answers"]) <= names


def test_not_graded_but_sliceable():
    task = Identity("train")
    assert task.eval_type is None and not task.published and task.source == "written for this project"
    assert Identity("train", start=2, stop=10, step=4)[1] == task[6]
    with pytest.raises(UserError, match="Identity has no answers to grade"):
        task.evaluate(task[0], "I am nanochat.")
