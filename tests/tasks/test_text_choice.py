"""text_choice.py: one of four words is right, every word as often as any other, and the answer says it and no more."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import TooLittleText, UserError
from nanochat.eval.shortcuts import of_task
from nanochat.tasks.spelling import QUOTATION, characters, load_words
from nanochat.tasks.text_choice import CHOICES, LONGEST, TextChoice
from nanochat.tokenizer import RustBPETokenizer
from tests.tasks.test_words import documents, put_text


@pytest.fixture
def ready(store) -> str:
    rng = random.Random(4)
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]
    words = {"".join(rng.sample(syllables, 2)) + rng.choice(["", *"drnmst"]) for _ in range(1500)}
    put_text("pydocs", [" ".join(sorted(words) * 6)] * 2, ["x"])
    TextChoice.prepare("TextChoice", "pydocs")
    return "pydocs"


def fields(task: TextChoice, index: int) -> tuple[str, list[str], str, str]:
    """(question, words, worked answer, right word)."""
    item = task[index]
    question, answer = (message["content"] for message in item["messages"])
    return question, item["choices"], *answer.split("\n#### ")


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_word_is_right_and_the_answer_finds_it(ready, split):
    task = TextChoice(split, ready, size=400)
    known = set(load_words(ready, split))
    kinds: Counter[str] = Counter()
    for index in range(len(task)):
        question, words, worked, right = fields(task, index)
        assert set(words) <= known and len(set(words)) == CHOICES and max(map(len, words)) <= LONGEST
        assert all(word in question for word in words)
        kind = "ends" if any(each in question for each in (" ends ", " at its end")) else "begins"
        place = -1 if kind == "ends" else 0
        letter = right[place]
        assert f" {letter}" in question and [word for word in words if word[place] == letter] == [right]
        steps = worked.removeprefix("The word ").split("; ")
        assert len(steps) == words.index(right) + 1
        for word, step in zip(words, steps, strict=False):
            letters = " ".join(word) if kind == "ends" else word[0]
            assert step == f"{word}: {letters} {'yes' if word == right else 'no'}"
        assert step.split()[-2] == letter  # what decides stands right before the decision
        kinds[kind] += 1
    assert 120 < kinds["ends"] < 280


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_word_of_four_is_right_once_and_at_each_place(ready, split):
    task = TextChoice(split, ready, size=200)
    for block in range(0, len(task), CHOICES):
        items = [fields(task, index) for index in range(block, block + CHOICES)]
        assert len({frozenset(words) for _, words, _, _ in items}) == 1
        assert {right for *_, right in items} == set(items[0][1])
        assert sorted(words.index(right) for _, words, _, right in items) == list(range(CHOICES))
    shortcuts = of_task(task)
    assert {name: value for name, value in shortcuts.items() if value > 1 / CHOICES + 1e-9} == {}
    assert "the longest" in shortcuts and "an untrained model" in shortcuts


@given(st.text(max_size=20))
def test_grading(text):
    item = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "so\n#### crab"}]}
    task = TextChoice.__new__(TextChoice)
    for right in ("#### crab", "x\n####crab.", "no #### apple\n#### crab", "#### 'crab'", '#### "crab".\nDone.'):
        assert task.evaluate(item, right), right
    for wrong in ("crab", "", "####", "#### crab or apple", "#### crabs", "#### not crab", "#### crab #### apple"):
        assert not task.evaluate(item, wrong), wrong
    if task.evaluate(item, f"#### crab{text}"):
        assert not text.partition("\n")[0].strip().strip(f" {QUOTATION}.") or "####" in text


def test_answers_fit(ready):
    task = TextChoice("train", ready, size=200)
    conversations = [task[index] for index in range(len(task))]
    texts = [each["messages"][1]["content"] for each in conversations]
    apart = RustBPETokenizer.train_from_iterator([*documents(60), *texts], 2000)
    for conversation in conversations:
        prompt = len(apart.render_for_completion(conversation))
        assert prompt < 100 and len(apart.render_conversation(conversation)[0]) - prompt <= 96


def test_items_depend_on_their_place_alone(ready):
    short, long = TextChoice("test", ready, size=6), TextChoice("test", ready)
    assert [short[i] for i in range(6)] == [long[i] for i in range(6)]
    assert len(long) == 256 and len(TextChoice("train", ready)) == 20_000 and long.eval_type == "generative"
    assert long.source == "generated from words of pydocs" and not long.published and long.baseline == 0.25
    words = {word for index in range(100) for word in TextChoice("train", ready)[index]["choices"]}
    assert not words & set(load_words(ready, "test"))


def test_too_few_letters(store):
    words = [f"b{a}{e}b" for a in "bcdfghjklm" for e in "aeiou"]
    put_text("pydocs", [" ".join(words * 5)] * 3, ["x"])
    TextChoice.prepare("TextChoice", "pydocs")
    with pytest.raises(TooLittleText, match=r"begin with 1 letters and end in 1; TextChoice needs 4") as caught:
        TextChoice("train", "pydocs")
    assert "\n" not in str(caught.value)


def test_other_alphabets(store):
    words = ["слово", "книга", "город", "школа", "поле", "река", "небо", "дом", "хлеб", "снег", "мост", "лес", "язык"]
    put_text("pydocs", [" ".join([*words, *(f"{word}{end}" for word in words for end in ("ы", "ам"))] * 6)] * 3, ["x"])
    TextChoice.prepare("TextChoice", "pydocs")
    task = TextChoice("train", "pydocs", size=40)
    for index in range(40):
        *_, worked, right = fields(task, index)
        assert worked.split()[-1] == "yes" and worked.split()[-2] in (characters(right)[0], characters(right)[-1])


def test_absent_words_name_the_command(store):
    with pytest.raises(UserError, match=r"`python -m scripts\.chat_data --source=pydocs"):
        TextChoice("test", "pydocs")
