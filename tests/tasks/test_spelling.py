"""spelling.py: letters are tokens of their own whatever the merges, counts are right, and grading is strict."""

import functools
import itertools
import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine.calculator import use_calculator
from nanochat.errors import UserError
from nanochat.tasks.common import item_rng
from nanochat.tasks.spelling import (
    COUNT_QUESTIONS,
    LIST_QUESTIONS,
    LISTED,
    LONGEST,
    SHORTEST,
    SPELL_QUESTIONS,
    SimpleSpelling,
    SpellingBee,
    _letter_to_count,
    balanced,
    characters,
    load_words,
    spelled,
)
from nanochat.tokenizer import RustBPETokenizer
from tests.tasks.test_words import documents, put_text, source  # noqa: F401  (the fixture)

some_word = st.text(alphabet=string.ascii_lowercase, min_size=1, max_size=12)


@pytest.fixture
def ready(source: str) -> str:  # noqa: F811
    SpellingBee.prepare("SpellingBee", source)
    return source


@functools.cache
def tokenizer(kind: str) -> RustBPETokenizer:
    """Merges of ordinary text; merges of nothing but spellings, which join whatever can be joined; no merges."""
    texts = {"text": documents(60), "spellings": [spelled(word) for word in documents(20)[0].split()] * 9, "bytes": []}
    return RustBPETokenizer.train_from_iterator(texts[kind], {"text": 2000, "spellings": 1000, "bytes": 265}[kind])


# ---- spelling


@pytest.mark.parametrize("kind", ["text", "spellings", "bytes"])
@given(word=some_word)
def test_each_letter_has_its_own_token_and_always_the_same(kind, word):
    encode = tokenizer(kind).encode
    letters = [token for letter in word for token in encode(f" {letter}")]
    assert encode(spelled(word)) == encode("The word") + encode(f" {word}") + encode(":") + letters


def test_in_ordinary_text_a_letter_is_one_token():
    """With merges enough: here the letters that the text has."""
    used = sorted({letter for letter in "".join(documents(60)).lower() if letter.isalpha()})
    apart = RustBPETokenizer.train_from_iterator([*documents(60), *(f" {a}" for a in used for _ in range(200))], 1000)
    assert [len(apart.encode(f" {letter}")) for letter in used] == [1] * len(used)


def shape(question: str, words: list[str]) -> str:
    """The question with `*` for its words, as if typed with care."""
    question = question.replace(", ".join(words), "*").rstrip("?.!")
    return question[:1].upper() + question[1:]


def shapes(templates: list[str]) -> set[str]:
    """All wordings of templates."""
    found = set()
    for template in templates:
        parts = [part.split("|") if place % 2 else [part] for place, part in enumerate(re.split(r"[\[\]]", template))]
        found |= {shape("".join(chosen).format(word="*", words="*"), ["*"]) for chosen in itertools.product(*parts)}
    return found


def test_spelling_items(ready):
    words = {split: set(load_words(ready, split)) for split in ("train", "test")}
    lengths, blends = Counter(), set()
    for split in ("train", "test"):
        task = SimpleSpelling(split, ready, size=400)
        questions = set()
        for index in range(400):
            question, answer = (message["content"] for message in task[index]["messages"])
            pairs = [pair.split(": ") for pair in answer.removeprefix("The word ").split("; ")]
            asked = [word for word, _ in pairs]
            assert all(letters.split(" ") == list(word) for word, letters in pairs)
            quoted = next(q for q in ("'", '"', "") if f"{q}{asked[0]}{q}" in question)
            questions.add(shape(question.replace(quoted, "") if quoted else question, asked))
            lengths[split, len(asked)] += 1
            blends |= {word for word in asked if word not in words[split]}
        assert questions <= shapes(SPELL_QUESTIONS + LIST_QUESTIONS) and len(questions) > 30
    assert {count for split, count in lengths if split == "test"} == {1}
    assert lengths["train", 1] > 100 and all(lengths["train", count] > 20 for count in range(2, LISTED[1] + 1))
    assert len(blends) > 50 and not blends & words["test"]
    assert all(SHORTEST <= len(word) <= LONGEST for word in blends)


def test_of_several_words_all_have_to_be_right():
    answer = spelled("cat", "house")
    assert answer == "The word cat: c a t; house: h o u s e"
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
    grade = functools.partial(SimpleSpelling.evaluate, None, conversation)
    assert grade(answer) and grade("cat: c a t; house: h o u s e")
    assert not grade("The word cat: c a r; house: h o u s e") and not grade("house: h o u s e; cat: c a t")
    assert not grade("The word house: h o u s e")


@given(word=some_word, other=some_word)
def test_grading_of_spelling(word, other):
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": spelled(word)}]}
    grade = functools.partial(SimpleSpelling.evaluate, None, conversation)
    letters = " ".join(word)
    assert grade(spelled(word)) and grade(f"Sure: {word}: {letters}\n") and grade(f'The word "{word}": {letters}.')
    assert grade(spelled(other)) == grade(f"{other}: {letters}") == (word == other)
    assert (
        not grade(f":{letters}") and not grade(f"{word}{other}: {letters}") and not grade(f"{other}-{word}: {letters}")
    )
    assert not grade(letters) and not grade("") and not grade(":") and not grade(f"{word}: {letters} a")
    assert not grade(f"{word}: {letters.upper()}") and not grade(f"{letters}: ")
    if len(word) > 1:
        assert not grade(f"{word}: {word}") and not grade(f"{word}: {letters[2:]}")


# ---- counting


def parts_of(task: SpellingBee, index: int) -> tuple[str, list[dict[str, str]]]:
    question, answer = (message["content"] for message in task[index]["messages"])
    return question, answer


def test_counting_items(ready):
    task = SpellingBee("train", ready, size=400)
    words = set(load_words(ready, "train"))
    counts, blends = [], 0
    for index in range(400):
        question, parts = parts_of(task, index)
        assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
        text, call, output, last = (part["text"] for part in parts)
        spelling, by_hand = text.rstrip("\n").split("\n")
        word, letter = spelling.split(":")[0].removeprefix("The word "), by_hand.removeprefix("Count ")[0]
        blends += word not in words
        assert spelling == spelled(word) and word in question and letter in question
        running = [f"{one}{word[: place + 1].count(letter)}" for place, one in enumerate(word)]
        assert by_hand == f"Count {letter}: {' '.join(running)}"
        assert call == f"' {word}'.count('{letter}')" and use_calculator(call) == output
        assert last == f"\n#### {word.count(letter)}"
        counts.append(word.count(letter))
    assert 0.05 < counts.count(0) / 400 < 0.3  # letters that are not there
    assert 40 < blends < 160
    assert 0.15 < sum(count > 1 for count in counts) / 400 < 0.6  # and several times there: 1 is no safe guess


def test_a_few_dozen_ways_to_ask():
    assert len(set(COUNT_QUESTIONS)) == len(COUNT_QUESTIONS) >= 30
    for question in COUNT_QUESTIONS:
        assert question.count("{letter}") == question.count("{word}") == 1 and question[-1] in "?."


def test_answers_are_short(ready):
    task = SpellingBee("train", ready, size=300)
    conversations = [task[index] for index in range(300)]
    texts = [part["text"] for one in conversations for part in one["messages"][1]["content"]]
    apart = RustBPETokenizer.train_from_iterator([*documents(150), *texts], 3000)
    for conversation in conversations:
        word = conversation["messages"][1]["content"][0]["text"].split(":")[0].removeprefix("The word ")
        answer = len(apart.render_conversation(conversation)[0]) - len(apart.render_for_completion(conversation))
        assert answer <= 60 / 6 * max(6, len(word))


@given(st.lists(st.dictionaries(st.integers(0, 4), st.lists(st.sampled_from("abc"), min_size=1, unique=True),
                                min_size=1), max_size=50))  # fmt: skip
def test_a_letter_is_asked_about_at_a_count_it_has(offered):
    chosen = balanced(offered)
    assert chosen == balanced(offered)
    for letter, counts in zip(chosen, offered, strict=True):
        assert any(letter in letters for letters in counts.values())


def test_no_count_is_a_safe_guess(ready):
    """Neither of all test words, nor of those with the same letter: at best one of three, for 0, 1 and 2."""
    task = SpellingBee("test", ready, size=len(SpellingBee("test", ready).words))
    by_letter: dict[str, Counter[int]] = {}
    for index in range(len(task)):
        text = parts_of(task, index)[1][0]["text"]
        word, letter = text.split(":")[0].removeprefix("The word "), text.partition("Count ")[2][0]
        by_letter.setdefault(letter, Counter())[word.count(letter)] += 1
    total = sum(by_letter.values(), Counter())
    assert len(task) > 40 and all(abs(total[count] / len(task) - 1 / 3) < 0.14 for count in (0, 1, 2))
    assert sum(max(counts.values()) for counts in by_letter.values()) / len(task) < 0.45


@given(st.integers(0, 5), st.integers(0, 15))
def test_grading_of_counts(right, said):
    parts = [{"type": "text", "text": "..."}, {"type": "text", "text": f"\n#### {right}"}]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": parts}]}
    grade = functools.partial(SpellingBee.evaluate, None, conversation)
    assert grade(f"a p p l e\n#### {said}") == (said == right)
    assert grade(f"#### {said + 1}, no: #### {right}") and grade(f"####{right}.")
    assert not grade(f"{right}") and not grade("") and not grade("####") and not grade("#### many")


# ---- both


@pytest.mark.parametrize("task", [SimpleSpelling, SpellingBee])
def test_sizes_and_sources(ready, task):
    assert (len(task("train", ready)), len(task("test", ready))) == (20_000, 256)
    assert len(task("train", ready, size=50)) == 50 and len(task("train", ready, start=10, stop=40, step=3)) == 10
    short, long = task("train", ready, size=5), task("train", ready)
    assert [short[i] for i in range(5)] == [long[i] for i in range(5)]
    assert long.source == "generated from words of pydocs" and not long.published and long.eval_type == "generative"
    with pytest.raises(IndexError):
        short[5]


@pytest.mark.parametrize("task", [SimpleSpelling, SpellingBee])
def test_test_items_ask_for_different_words(ready, task):
    words = task("test", ready).words
    assert set(words) <= set(load_words(ready, "test"))
    items = task("test", ready, size=len(words))
    asked = [str(items[index]["messages"][1]["content"]) for index in range(len(words))]
    assert len(set(asked)) == len(words)


def test_absent_words(store):
    with pytest.raises(UserError, match=r"scripts\.chat_data --source=pydocs"):
        SpellingBee("test", "pydocs")


def test_words_of_another_text_are_not_taken(store):
    put_text("pydocs", documents(60, vocabulary=300), documents(2, seed=1))
    SpellingBee.prepare("SpellingBee", "pydocs")
    with pytest.raises(UserError, match="no words of fineweb-edu"):
        SimpleSpelling("train", "fineweb-edu")


@pytest.mark.parametrize("word", ["слово", "größe", "हिन्दी", "नीति", "كتاب", "학교에서"])
def test_other_alphabets(word):
    for number in range(30):
        letter = _letter_to_count(word, ["ж", "न", "ß", "ق"], item_rng(number))
        assert use_calculator(f"'{word}'.count('{letter}')") == str(characters(word).count(letter))
    assert spelled(word) == f"The word {word}: {' '.join(characters(word))}" and "".join(characters(word)) == word
