"""text_choice.py: questions with one right choice, train and test from texts that share no sentence."""

import json
from collections import Counter

import pytest

from nanochat.errors import TooLittleText, UserError
from nanochat.paths import task_data_dir
from nanochat.tasks import text_choice
from nanochat.tasks.text_choice import MAX_ITEM, MIN_ITEMS, TextChoice, make_items
from tests.tasks.test_words import documents, other_process, put_text, source  # noqa: F401  (the fixture)

NEXT = "Which sentence comes next? "
SEEN = "Text: "


def fields(item: dict) -> tuple[str, list[str], int]:
    return item["question"], item["choices"], "ABCD".index(item["answer"])


def check(items: list[dict], texts: list[str]) -> Counter[str]:
    """Each item has one true choice and three that are not; returns how many there are of each kind."""
    whole = [" ".join(text.split()) for text in texts]
    kinds: Counter[str] = Counter()
    for item in items:
        question, choices, gold = fields(item)
        assert len(choices) == 4 and len(question) - len(NEXT) + sum(map(len, choices)) <= MAX_ITEM
        if question.startswith(NEXT):
            follows = [any(f"{question.removeprefix(NEXT)} {choice}" in text for text in whole) for choice in choices]
            assert follows == [place == gold for place in range(4)]
            kinds["next"] += 1
        else:
            sentence = question.removeprefix(SEEN).removesuffix("\nA word from the text:")
            assert any(sentence in text for text in whole)
            assert [choice in sentence for choice in choices] == [place == gold for place in range(4)]
            kinds["seen"] += 1
    return kinds


def test_items_have_one_right_choice_and_stand_in_their_own_text():
    train, held_out = documents(150), documents(40, seed=1)
    items = make_items(train, held_out)
    for split, texts in (("train", train), ("test", held_out)):
        kinds = check(items[split], texts)
        assert kinds["next"] > MIN_ITEMS and kinds["seen"] > MIN_ITEMS
        golds = Counter(item["answer"] for item in items[split])
        assert all(abs(golds[letter] - len(items[split]) / 4) <= 2 for letter in "ABCD")
        assert len({json.dumps(item) for item in items[split]}) == len(items[split])


def test_no_more_than_asked_for_and_half_of_each_kind(monkeypatch):
    monkeypatch.setattr(text_choice, "COUNTS", {"train": 60, "test": 40})
    items = make_items(documents(150), documents(40, seed=1))
    assert check(items["train"], documents(150)) == {"next": 30, "seen": 30}
    assert check(items["test"], documents(40, seed=1)) == {"next": 20, "seen": 20}


def test_sentences_of_the_train_text_are_not_asked_about_in_test():
    train, fresh = documents(60), documents(40, seed=1)
    alone = make_items(train, fresh)["test"]
    mixed = [f"{copied}\n\n{text}" for copied, text in zip(train, fresh, strict=False)]
    assert make_items(train, mixed)["test"] == alone
    assert make_items(train, train)["test"] == []


@pytest.mark.parametrize("held_out", [["Nothing."], ["No prose here."] * 50])
def test_too_little_text_for_one_split(store, held_out):
    """What there is can be trained on."""
    put_text("pydocs", documents(60, seed=2), held_out)
    TextChoice.prepare("TextChoice", "pydocs")
    assert len(TextChoice("train", "pydocs")) > 100
    with pytest.raises(TooLittleText, match=r"^too little prose in pydocs: 0 test items, at least 20 are needed"):
        TextChoice("test", "pydocs")


def test_a_few_long_documents_are_enough(monkeypatch):
    """Wrong choices then come from other passages of the same document."""
    items = make_items(documents(60, seed=2), ["\n\n".join(documents(20, seed=1))])
    assert check(items["test"], documents(20, seed=1))["next"] > MIN_ITEMS


def test_the_task(source):  # noqa: F811
    TextChoice.prepare("TextChoice", source)
    for split in ("train", "test"):
        task = TextChoice(split, source)
        assert task.eval_type == "categorical" and task.baseline == 0.25 and not task.published
        assert len(task) == len((task_data_dir() / "pydocs" / f"text_choice_{split}.jsonl").read_text().splitlines())
        assert len(TextChoice(split, source, stop=25)) == 25
        conversation = task[3]
        question, answer = (message["content"] for message in conversation["messages"])
        assert question.startswith("Multiple Choice question: ") and f"={answer}\n" in question
        assert conversation["letters"] == ["A", "B", "C", "D"]
        assert [task.evaluate(conversation, letter) for letter in "ABCD"].count(True) == 1
        assert task.evaluate(conversation, answer)
    assert task.source == "generated from the validation text of pydocs"


def test_made_once_for_the_same_text(source):  # noqa: F811
    TextChoice.prepare("TextChoice", source)
    path = task_data_dir() / "pydocs" / "text_choice_test.jsonl"
    before, made = path.read_text(), path.stat()
    TextChoice.prepare("TextChoice", source)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    put_text(source, documents(150), documents(30, seed=7))
    TextChoice.prepare("TextChoice", source)
    assert path.read_text() != before


@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_items_are_refused_and_made_again(source, split):  # noqa: F811
    TextChoice.prepare("TextChoice", source)
    path = task_data_dir() / "pydocs" / f"text_choice_{split}.jsonl"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-20]), path.unlink):
        damage()
        command = r"`python -m scripts\.chat_data --source=pydocs --tasks=TextChoice`"
        with pytest.raises(UserError, match=rf"text_choice_{split}\.jsonl absent or damaged: run {command}") as caught:
            TextChoice(split, source)
        assert "\n" not in str(caught.value)
        TextChoice.prepare("TextChoice", source)
        assert path.read_bytes() == whole


def test_absent_items_name_the_command(store):
    command = r"`python -m scripts\.chat_data --source=pydocs --tasks=TextChoice`"
    with pytest.raises(UserError, match=f"no text_choice of pydocs in .*{command}"):
        TextChoice("test", "pydocs")


def test_same_items_in_every_process(source):  # noqa: F811
    TextChoice.prepare("TextChoice", source)
    path = task_data_dir() / "pydocs" / "text_choice_train.jsonl"
    code = (
        "from nanochat.tasks.text_choice import make_items; from tests.tasks.test_words import documents; import json; "
        "[print(json.dumps(item)) for item in make_items(documents(150), documents(40, seed=1))['train']]"
    )
    assert path.read_text() == other_process(code, "1")
