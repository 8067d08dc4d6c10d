"""passages.py: sentences and words of any script; posts and code are read line by line."""

# ruff: noqa: RUF001 (the punctuation of other scripts)

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.tasks.passages import (
    MAX_RUN,
    _sentences,
    draw_items,
    ending,
    find_passages,
    unspaced,
    words_of,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One here. Two there! e.g. not three.", ["One here.", "Two there! e.g. not three."]),
        ("Он ушёл. Она осталась? — Да, осталась… Всё.", ["Он ушёл.", "Она осталась?", "— Да, осталась…", "Всё."]),
        ("Er sagte: „Nein.“ Über allem. so nicht", ["Er sagte: „Nein.“ Über allem. so nicht"]),
        ("你好！我们走吧。他说：「不去。」然后呢?好", ["你好！", "我们走吧。", "他说：「不去。」", "然后呢?", "好"]),
        ("ذهب الولد. أين هو؟ هنا", ["ذهب الولد.", "أين هو؟", "هنا"]),
        ("वह गया। वह आया॥ अब", ["वह गया।", "वह आया॥", "अब"]),
        ("ฉันไปตลาด แล้วกลับบ้าน", ["ฉันไปตลาด", "แล้วกลับบ้าน"]),
        ("ის წავიდა. ის დარჩა.", ["ის წავიდა.", "ის დარჩა."]),
        ("Գնաց։ Եկավ։", ["Գնաց։", "Եկավ։"]),
        ("v1.2 of foo.Bar", ["v1.2 of foo.Bar"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert _sentences(text) == expected


@given(st.text())
def test_no_letter_is_lost(text):
    assert "".join("".join(_sentences(text)).split()) == "".join(text.split())


def test_words():
    assert words_of("Größe naïve Привет, мир-2") == ["Größe", "naïve", "Привет", "мир"]
    assert words_of("今天天气很好，カタカナ") == ["今天", "天气", "很好", "カタカナ"]
    assert words_of("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert unspaced("我们 use API") is False and unspaced("我们在使用API接口") and unspaced("ภาษาไทย")
    assert ending("The end of it.") == ("The end of", "it") and ending("a f(x).") == ("", "")
    assert ending("我们是学生。") == ("我们是", "学生")


CHINESE = [chr(0x4E00 + number) for number in range(400)]


def chinese(rng: random.Random) -> str:
    return "".join(rng.sample(CHINESE, 24)) + "。"


@pytest.mark.parametrize(("count", "paragraphs"), [(40, 10), (1, 400)])
def test_text_without_spaces_has_passages(count, paragraphs):
    rng = random.Random(0)
    texts = ["\n\n".join("".join(chinese(rng) for _ in range(3)) for _ in range(paragraphs)) for _ in range(count)]
    passages = find_passages(texts)
    assert len(passages) == 400 and {len(passage.sentences) for passage in passages} == {3}
    assert {passage.joint for passage in passages} == {""} and len({passage.document for passage in passages}) >= 8


def test_a_paragraph_of_pages_is_many_passages():
    rng = random.Random(0)
    passages = find_passages(["".join(chinese(rng) for _ in range(1000))])
    assert sum(len(passage.sentences) for passage in passages) == 1000
    assert max(len(passage.sentences) for passage in passages) == MAX_RUN
    assert len({passage.document for passage in passages}) == len(passages)


def test_posts_are_read_line_by_line_and_broken_prose_is_not():
    rng = random.Random(1)
    words = ["late", "train", "again", "coffee", "rain", "monday", "cats", "pizza"]
    posts = [f"{' '.join(rng.sample(words, 6))} {'abcdefgh'[n % 8]}{'klmnopqr'[n // 8]}" for n in range(60)]
    assert [passage.sentences for passage in find_passages(posts)] == [[post] for post in posts]
    broken = ["The old doctor walks along the river\nevery morning with the small dog " + "ab"[n % 2] * (n + 2) + "."
              for n in range(60)]  # fmt: skip
    assert all(passage.sentences[0].startswith("The old") for passage in find_passages(broken))
    assert len(find_passages(broken)) == 60


@pytest.mark.parametrize("count", range(9))
def test_too_few_passages_give_no_items_and_end(count):
    """Wrong choices come from three others: looking for them must not go on for ever."""
    from nanochat.tasks.passages import next_sentence

    rng = random.Random(0)
    passages = find_passages(["\n\n".join(chinese(rng) + chinese(rng) for _ in range(count))])
    assert len(draw_items(next_sentence, passages, rng)) == (0 if count < 8 else count)
