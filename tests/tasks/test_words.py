"""Words of running text in spelling.py, counted once; hashing that is the same everywhere."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import parquet
from nanochat.errors import TooLittleText, UserError
from nanochat.paths import data_dir, task_data_dir
from nanochat.tasks import spelling
from nanochat.tasks.common import item_rng, split_of, stable_hash
from nanochat.tasks.spelling import WordTask, frequent_words, load_words

SYLLABLES = [a + b for a, b in itertools.product("bdfgklmnprst", "aeiou")]
VOCABULARY = ["".join(syllables) + "s" for syllables in itertools.product(SYLLABLES, repeat=3)]


def documents(count: int, seed: int = 0, vocabulary: int = 1500) -> list[str]:
    """Documents of short sentences, two to a paragraph; `seed` decides what they say."""
    rng = random.Random(seed)
    known = random.Random(99).sample(VOCABULARY, vocabulary)

    def sentence() -> str:
        one, two, three, four, five = rng.sample(known, 5)
        return f"The {one} of {two} and {three} was {four} to {five}."

    return ["\n\n".join(f"{sentence()} {sentence()}" for _ in range(12)) for _ in range(count)]


def put_text(source: str, train: list[str], held_out: list[str]) -> None:
    """A text source as nanochat.dataset leaves it: one train shard, one validation shard."""
    folder = data_dir(source)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for number, (split, texts) in enumerate((("train", train), ("val", held_out))):
        name = f"shard_{number:05d}.parquet"
        parquet.write_shard(folder / name, texts)
        files[name] = parquet.describe(folder / name, split)
    parquet.update_manifest(folder, {"source": source}, files, replace=True)


@pytest.fixture
def source(store) -> str:
    put_text("pydocs", documents(150), documents(40, seed=1))
    return "pydocs"


def other_process(code: str, hash_seed: str) -> str:
    """What `code` prints in a Python of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, cwd=root, capture_output=True, text=True
    ).stdout


# ---- hashing


def test_hashes_are_the_same_for_ever():
    """Were they to change, items trained on before could be tested on after."""
    assert stable_hash("word", 1, ("a", 2)) == 0x394D45AFFEB10DC8
    assert [split_of("word", word) for word in ("the", "that", "apple")] == ["train", "test", "train"]
    assert item_rng("a", 0).random() == 0.6681506390669301


@given(
    st.lists(st.one_of(st.text(), st.integers()), max_size=4), st.lists(st.one_of(st.text(), st.integers()), max_size=4)
)
def test_different_things_have_different_hashes(one, other):
    assert (stable_hash(*one) == stable_hash(*other)) == (one == other)
    assert stable_hash(*one) >= 0


def test_no_two_items_share_their_choices():
    """Python seeds -1 and 1 alike; seeds made by hashing are never negative and never meet."""
    drawn = [item_rng("task", split, index).random() for split in ("train", "test") for index in range(-2000, 2000)]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_shares(share):
    count = sum(split_of("thing", number, test_share=share) == "test" for number in range(20_000))
    assert abs(count / 20_000 - share) < 0.01


# ---- counting


def slow_words(text: str) -> Counter[str]:
    """Runs of word characters, taken one after the other with a look at their neighbours."""
    counts: Counter[str] = Counter()
    for is_word, group in itertools.groupby(enumerate(text), key=lambda pair: pair[1].isalnum() or pair[1] == "_"):
        places = [place for place, _ in group]
        start, end = places[0], places[-1] + 1
        run = text[start:end]
        before, after, beyond = text[start - 1 : start], text[end : end + 1], text[end + 1 : end + 2]
        joined = set("'\u2019@/\\-")
        dotted = after == "." and (beyond.isalnum() or beyond == "_")
        plain = run.isalpha() and run.islower() and 3 <= len(run) <= 12
        if is_word and plain and before not in joined | {"."} and after not in joined and not dotted:
            counts[run] += 1
    return counts


@given(st.text(alphabet="abcxyz.'\u2019-_/@\\ \nAé1", max_size=60))
def test_words_of_running_text(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spelling, "MIN_COUNT", 1)
        counts = slow_words(text)
        assert frequent_words([text]) == sorted(counts, key=lambda word: (-counts[word], word))


def test_rare_words_are_left_out_and_the_frequent_come_first(monkeypatch):
    texts = ["often " * 9 + "seldom " * 4 + "usual " * 5 + "alike " * 5] * 1
    assert frequent_words(texts) == ["often", "alike", "usual"]
    assert frequent_words(texts * 2) == ["often", "alike", "usual", "seldom"]
    assert frequent_words(["half ", "half "] * 2 + ["half"]) == ["half"]  # counted over all documents
    monkeypatch.setattr(spelling, "MAX_WORDS", 2)
    assert frequent_words(texts) == ["often", "alike"]


def test_reading_stops_in_time(monkeypatch):
    monkeypatch.setattr(spelling, "CHUNK_CHARS", 100)
    monkeypatch.setattr(spelling, "MAX_CHARS", 1000)
    taken = []

    def stream():
        for number in itertools.count():
            taken.append(number)
            yield "word " * 10

    assert frequent_words(stream()) == ["word"]
    assert len(taken) == 20


# ---- the file


def test_words_are_given_to_one_split_each(source):
    WordTask.prepare("SpellingBee", source)
    train, test = load_words(source, "train"), load_words(source, "test")
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted((task_data_dir() / "pydocs" / "words.txt").read_text().split())
    assert len(train) > 1000 and 0.05 < len(test) / len(train + test) < 0.15
    text = " ".join(documents(150)).split()
    assert all(text.count(word) + text.count(f"{word}.") >= 5 for word in test)


def test_made_once_for_the_same_text(source):
    WordTask.prepare("SpellingBee", source)
    path = task_data_dir() / "pydocs" / "words.txt"
    before = path.stat()
    WordTask.prepare("SpellingBee", source)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    put_text(source, documents(80, seed=5), documents(1))
    WordTask.prepare("SpellingBee", source)
    assert len(path.read_text().split()) > 500


def test_absent_words_name_the_command(store):
    with pytest.raises(
        UserError, match=r"no words of pydocs in .*`python -m scripts\.chat_data --source=pydocs --tasks="
    ):
        load_words("pydocs", "train")
    with pytest.raises(UserError, match=r"no train shards of pydocs.*python -m nanochat\.dataset"):
        WordTask.prepare("SpellingBee", "pydocs")
    with pytest.raises(UserError, match="expected fineweb-edu"):
        load_words("elsewhere", "train")


def test_unfinished_or_foreign_words_do_not_count(source):
    WordTask.prepare("SpellingBee", source)
    folder = task_data_dir() / "pydocs"
    marker = json.loads((folder / "words.json").read_text())
    for content in (json.dumps({**marker, "source": "local:/a-b"}), "{", "[]"):
        (folder / "words.json").write_text(content)
        with pytest.raises(UserError, match="no words of pydocs"):
            load_words(source, "train")
    WordTask.prepare("SpellingBee", source)
    assert load_words(source, "test")


def test_damaged_words_are_refused_and_made_again(source):
    WordTask.prepare("SpellingBee", source)
    path = task_data_dir() / "pydocs" / "words.txt"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-20]), path.unlink):
        damage()
        command = r"`python -m scripts\.chat_data --source=pydocs --tasks=SpellingBee`"
        with pytest.raises(UserError, match=rf"words\.txt absent or damaged: run {command}") as caught:
            load_words(source, "test")
        assert "\n" not in str(caught.value)
        WordTask.prepare("SpellingBee", source)
        assert path.read_bytes() == whole


def test_markers_that_list_no_files_do_not_count(source):
    WordTask.prepare("SpellingBee", source)
    path = task_data_dir() / "pydocs" / "words.json"
    whole = path.read_text()
    path.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != "files"}))
    with pytest.raises(UserError, match=r"run `python -m scripts\.chat_data"):
        load_words(source, "train")
    WordTask.prepare("SpellingBee", source)
    assert path.read_text() == whole


def test_too_little_text(store):
    put_text("pydocs", ["The word word word word word word."], ["Nothing."])
    WordTask.prepare("SpellingBee", "pydocs")
    with pytest.raises(TooLittleText, match=r"^too few words in pydocs: 1 frequent words between spaces, [01] "):
        load_words("pydocs", "train")


def test_words_of_other_alphabets():
    assert frequent_words(["слово ёлка Москва " * 5 + "word " * 6]) == ["word", "слово", "ёлка"]
    assert frequent_words(["für große " * 5]) == ["für", "große"]
    assert frequent_words(["हिन्दी भाषा كتاب 학교에서 "] * 5) == sorted(["हिन्दी", "كتاب", "학교에서"])
    assert frequent_words(["我们今天去学校 ฉันไปตลาด "] * 9) == []  # nothing says where a word ends
    assert frequent_words(["word " * 1000 + "café " * 5]) == ["word"]  # one foreign word in English text
