"""arithmetic.py: every worked answer is right, one form, short, and within the bounds that were asked for."""

import re
import string
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.tasks.arithmetic import NAMES, TEMPLATES, THINGS, Arithmetic
from nanochat.tasks.common import Task, answer_number, item_rng, worded
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.spelling import SpellingBee
from nanochat.tokenizer import RustBPETokenizer

FORMS = {4: ["text", "python", "python_output", "text"], 7: ["text", "python", "python_output"] * 2 + ["text"]}


NAME, THING = (f"(?:{'|'.join(words)})" for words in (NAMES, THINGS))
SIGNS = {"[": "(?:", "]": ")", "|": "|", "{x}": NAME, "{y}": NAME, "{things}": THING}


def question_pattern(text: str) -> re.Pattern[str]:
    """What all questions of a template look like, as typed, with its numbers as groups."""
    pattern = ""
    for number, part in enumerate(re.findall(r"\{\w+\}|.", text.rstrip("?.!"))):
        signs = {f"{{{name}}}": rf"(?P<{name}{number}>\d+)" for name in "abc"} | SIGNS
        pattern += signs.get(part) or re.escape(part)
    return re.compile(rf"{pattern}[?.!]*", re.IGNORECASE)


def conversation_of(task: Arithmetic, index: int) -> tuple[str, list[dict[str, str]]]:
    question, answer = (message["content"] for message in task[index]["messages"])
    return question, answer


@pytest.mark.parametrize("split", ["train", "test"])
def test_worked_answers(split):
    from nanochat.engine.calculator import use_calculator  # with torch, which those who import this do without

    task = Arithmetic(split, size=600)
    lengths = Counter()
    for index in range(600):
        question, parts = conversation_of(task, index)
        assert [part["type"] for part in parts] == FORMS[len(parts)]
        lengths[len(parts)] += 1
        given_numbers = [int(number) for number in re.findall(r"\d+", question)]
        assert all(2 <= number <= 999 for number in given_numbers)
        known = Counter(given_numbers)
        *calls, last = (parts[i : i + 3] for i in range(0, len(parts), 3))
        for number, (text, call, output) in enumerate(calls):
            assert text["text"] == ("\n" if number else "") + f"{call['text']}="
            assert use_calculator(call["text"]) == output["text"] and 0 <= int(output["text"]) < 1000
            operands = [int(operand) for operand in re.split(r"[-+*/]", call["text"])]
            assert all(operand in known for operand in operands)
            if number:
                assert int(calls[0][2]["text"]) in operands  # the second step goes on from the first
            known[int(output["text"])] += 1
        assert set(given_numbers) <= {int(n) for part in parts for n in re.findall(r"\d+", part["text"])}
        assert last[0]["text"] == f"\n#### {calls[-1][2]['text']}"
        assert task.evaluate(task[index], last[0]["text"])
    assert set(lengths) == {4, 7}


def test_templates():
    assert len(TEMPLATES) == len({template.text for template in TEMPLATES}) >= 25
    for template in TEMPLATES:
        for number in range(20):
            wording = worded(template.text, item_rng(number))
            fields = [field for _, field, _, _ in string.Formatter().parse(wording) if field]
            assert not re.search(r"[\[\]|]|  ", wording) and all(fields.count(name) <= 1 for name in "abc")
        numbers = {name for step in template.steps for name in step.split() if name in set("abc")}
        assert set(fields) & set("abc") == numbers and set(fields) - numbers <= {"x", "y", "things"}
        assert ["r" in step for step in template.steps] == [False, True][: len(template.steps)]


def test_every_template_is_drawn_about_as_often():
    task, usable = Arithmetic("train", size=3000), TEMPLATES
    patterns = {template.text: question_pattern(template.text) for template in usable}
    drawn: Counter[str] = Counter()
    for index in range(3000):
        question = conversation_of(task, index)[0]
        fits = [t.text for t in usable if patterns[t.text].fullmatch(question)]
        assert len(fits) == 1
        drawn[fits[0]] += 1
    assert len(drawn) == len(usable)
    assert max(drawn.values()) < 1.6 * 3000 / len(usable) and min(drawn.values()) > 0.5 * 3000 / len(usable)


def test_short_for_small_models():
    task = Arithmetic("train", size=1000)
    questions = [conversation_of(task, index)[0] for index in range(1000)]
    tokenizer = RustBPETokenizer.train_from_iterator(questions, 700)
    for index in range(1000):
        conversation = task[index]
        prompt = len(tokenizer.render_for_completion(conversation))
        assert prompt <= 50 and len(tokenizer.render_conversation(conversation)[0]) - prompt <= 52


def test_an_item_depends_on_its_place_alone():
    short, long = Arithmetic("train", size=3), Arithmetic("train")
    assert [short[i] for i in range(3)] == [long[i] for i in range(3)]
    assert len(long) == 20_000 and len(Arithmetic("test")) == 256
    assert len({str(long[i]) for i in range(500)}) > 480
    assert long[7] == Arithmetic("train", start=5, step=2)[1]
    assert not long.published and long.eval_type == "generative" and long.baseline == 0


@given(st.integers(0, 999), st.integers(0, 999))
def test_grading(right, said):
    parts = [{"type": "text", "text": f"\n#### {right}"}]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}
    task = Arithmetic("test")
    assert (
        task.evaluate(conversation, f"1+1=2\n#### {said}")
        == (right == said)
        == bool(task.reward(conversation, f"#### {said}.0"))
    )
    assert not task.evaluate(conversation, f"{right}") and not task.evaluate(conversation, "#### ")


def graders() -> list[Callable[[int, str], bool]]:
    """Each takes the right number and what a model says."""

    def grader(task: Task) -> Callable[[int, str], bool]:
        def grade(right: int, said: str) -> bool:
            answer = [{"type": "text", "text": f"\n#### {right}"}]
            return task.evaluate({"messages": [{"role": "assistant", "content": answer}]}, said)

        return grade

    return [grader(cls.__new__(cls)) for cls in (Arithmetic, SpellingBee, GSM8K)]


NUMBERS = st.integers(0, 99_999)
WORDINGS = (
    "{n}", "{n}.", "{n}.0", "{n:,}", "{n:,}.00", "${n}", "${n:,}.", "0{n}", "{n} apples", "{n} apples.",
    "{n} more apples!", "{n}, so she has enough.", "{n} miles per hour", "{n} times", "{n} cats and dogs",
    "{n} fewer than Tom", "{n} more than Ben has", "{n} pairs of shoes", "{n} notes in notebooks", "{n} roses",
    "{n}\nThat is all.", "{n}\r\n",
)  # fmt: skip
OTHERS = (
    "{n}/7", "{n} / 7", "{n} or 111", "{n} or more", "{n} or eleven", "{n}+111", "{n} + 1", "{n}-111", "{n} - 1",
    "{n}*2", "{n} x 2", "{n}e3", "{n}E3", "{n}e-3", "{n} e3", "{n}^2", "{n}\u00b2", "{n}\u00bd", "{n} 1/2",
    "{n} and a half", "{n} million", "{n} thousand apples", "{n} dozen", "{n} hundred", "{n}k", "{n}m",
    "{n} point five", "{n} squared", "{n}!", "{n}:30", "{n},5", "{n},50", "{n} 000", "{n}..5", "{n}.1", "{n}.0001",
    "{n}th", "{n}i", "{n}%2", "{n} % 7", "{n}_0", "{n}\u0660", "{n}0", "{n} 0", "{n}=11", "{n} to 120",
    "{n} doubled", "{n} halved", "twice {n}", "{n} twice", "{n} tenfold", "{n} tens", "{n} lakh", "{n} oder elf",
    "{n} negative", "{n} factorial", "{n} in binary", "{n} hex", "{n} square root", "{n} is wrong", "{n}, not eleven",
    "{n} maybe", "{n} at most", "{n} apples, at least", "{n} approximately", "{n} nope", "{n} is incorrect",
    "{n} plus eleven", "{n} times three", "{n} (or 111)", "{n}<111", "{n}x", "{n}\u4e07", "not {n}", "about {n}",
    "<{n}", "~{n}", "1/{n}", "1{n}", "1,{n}", "1-{n}", "2*{n}", "x{n}", "--{n}", "-${n}-1", "=11-{n}", ".{n}",
    "0.{n}", "0x{n}", "1 {n}", "{n}{n}",
)  # fmt: skip


@pytest.mark.parametrize("grade", graders())
@given(NUMBERS)
def test_the_same_number_in_other_words_is_right(grade, right):
    for wording in WORDINGS:
        assert grade(right, f"so\n#### {wording.format(n=right)}"), wording


@pytest.mark.parametrize("grade", graders())
@given(st.integers(2, 99_999))
def test_what_makes_another_value_of_a_number_is_refused(grade, right):
    for other in OTHERS:
        assert not grade(right, f"{right}\n#### {other.format(n=right)}"), other
        assert not grade(right, f"{right}\n#### {other.format(n=right)} apples."), other
    assert not grade(right, f"#### -{right}") and not grade(right, f"#### {right / 100:.2f}")


@pytest.mark.parametrize("grade", graders())
@given(st.integers(1, 999), st.text(max_size=6))
def test_any_text_behind_a_number_that_is_accepted_is_words(grade, right, text):
    if grade(right, f"#### {right}{text}"):
        assert re.fullmatch(
            r"[.,;:]*(\.0+[.,;:]*)?%?([ \t]+[A-Za-z][a-zA-Z']+[.,;:!?]*)*[ \t\r]*(\n.*|####.*)?", text, re.S
        )


def test_a_share_is_not_a_number_but_for_gsm8k():
    """Published graders take the number, and some of its questions ask for a percentage."""
    assert [[grade(110, f"#### 110{unit}") for unit in ("%", " percent", "%.")] for grade in graders()] == [
        [False] * 3, [False] * 3, [True] * 3
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text, number",
    [("#### 1,200", 1200), ("#### 3 #### -4.5", -4.5), ("####7 apples", 7), ("#### x", None), ("12", None)],
)
def test_answer_number(text, number):
    assert answer_number(text) == number
