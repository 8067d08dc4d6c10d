"""The plain questions: that none was trained on, and how answers are graded."""

import re

import pytest

from benchmarks.plain_questions import HONEST, QUESTIONS, UNKNOWN, is_right
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.identity import Identity

TRAINED = 11_000  # problems, at most, in each stage of profiles/tiny.sh


def test_no_calculation_and_no_unknown_question_was_trained_on():
    trained = set()
    problems, talks = Arithmetic("train", size=TRAINED), Identity("train")
    for conversation in [problems[index] for index in range(TRAINED)] + [talks[index] for index in range(len(talks))]:
        for message in conversation["messages"]:
            content = message["content"]
            parts = [content] if isinstance(content, str) else [part["text"] for part in content]
            trained.update(part.lower() for part in parts)
    assert not trained & {question.lower() for question in (*QUESTIONS, *UNKNOWN)}
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for question, right in QUESTIONS.items():
        if len(numbers := [int(number) for number in re.findall(r"\d+", question)]) == 2:
            left, other = numbers
            (operator,) = (name for name, operation in operations.items() if operation(left, other) == right)
            assert not trained & {f"{left}{operator}{other}"}, question


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("What is 12 + 30?", "12+30=42\n#### 42", "12+30=42\n#### 43"),
        ("Spell banana", "The word banana: b a n a n a", "The word banana: b a n a a"),
        ("Why do dogs bark?", sorted(HONEST)[0], "YOU'RE WELCOME!"),
    ],
)
def test_what_counts_as_right(question, right, wrong):
    assert is_right(question, right) and not is_right(question, wrong)
