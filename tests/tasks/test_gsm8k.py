import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.chat_format import conversation_pieces
from nanochat.errors import UserError
from nanochat.tasks import hub
from nanochat.tasks.gsm8k import GSM8K, answer_parts, final_number
from tests.tasks.hub_rows import gsm8k_row, put

DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def kinds(answer):
    return [(part["type"], part["text"]) for part in answer_parts(answer)]


# ---- answers into parts


def test_calls_become_parts_in_their_order():
    answer = "Boxes: 4*5=<<4*5=20>>20.\nLeft: 20-3 = <<20-3=17>>17.\n#### 17"
    assert kinds(answer) == [
        ("text", "Boxes: 4*5="),
        ("python", "4*5"),
        ("python_output", "20"),
        ("text", "20.\nLeft: 20-3 = "),
        ("python", "20-3"),
        ("python_output", "17"),
        ("text", "17.\n#### 17"),
    ]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("15", [("text", "15")]),
        ("<<1+1=2>>2", [("python", "1+1"), ("python_output", "2"), ("text", "2")]),
        ("It is <<5*3>>15.", [("text", "It is 15.")]),
        ("It is <<=15>>15.", [("text", "It is 15.")]),
        ("It is <<5*3= >>15.", [("text", "It is 15.")]),
        ("It is <<>>15.", [("text", "It is 15.")]),
        ("a <<1+1=2", [("text", "a <<1+1=2")]),
        ("1 < 2 >> 1", [("text", "1 < 2 >> 1")]),
        ("<<1+1=1+1=2>>2", [("python", "1+1=1+1"), ("python_output", "2"), ("text", "2")]),
        ("", [("text", "")]),
    ],
)
def test_odd_marks(answer, expected):
    assert kinds(answer) == expected


PLAIN = st.text(st.characters(exclude_characters="<>=", exclude_categories=["Cs"]))
CALLS = st.tuples(PLAIN.filter(str.strip), PLAIN.filter(str.strip))


@given(st.lists(PLAIN | CALLS))
def test_parts_hold_all_text_and_all_calls(pieces):
    answer = "".join(piece if isinstance(piece, str) else f"<<{piece[0]}={piece[1]}>>" for piece in pieces)
    parts = answer_parts(answer)
    calls = [part["text"] for part in parts if part["type"] != "text"]
    assert calls == [text for piece in pieces if not isinstance(piece, str) for text in piece]
    texts = "".join(part["text"] for part in parts if part["type"] == "text")
    assert texts == "".join(piece for piece in pieces if isinstance(piece, str))
    assert parts[-1]["type"] == "text"


# ---- grading


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 10", "10"),
        ("so it is 3.\n#### 1,234.50", "1234.5"),
        ("#### $18", "18"),
        ("#### -$18", "-18"),
        ("#### $-18", "-18"),
        ("#### 10.", "10"),
        ("#### 10...", "10"),
        ("#### .5", "0.5"),
        ("####7", "7"),
        ("#### 7 apples, #### 8", "7"),
        ("#### 25%", "25"),
        ("#### " + "9" * 5000, "9" * 5000),
    ],
)
def test_the_number_after_the_marks_is_read(text, number):
    assert final_number(text) == final_number(f"#### {number}")
    assert final_number(text) is not None


@pytest.mark.parametrize(
    "text", ["", "10", "### 10", "####", "#### none", "#### NaN", "####\n10", "#### --5", "#### ,"]
)
def test_no_number_is_none(text):
    assert final_number(text) is None


def test_numbers_are_compared_as_numbers():
    item = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer_parts("#### 10")}]}
    task = GSM8K.__new__(GSM8K)
    right = ["#### 10", "#### 10.0", "#### $10.00", "is 9+1\n#### 010", "#### 10."]
    wrong = [
        "#### 10/7",
        "#### 10 or 11",
        "#### 10e3",
        "#### 10 thousand",
        "#### 1",
        "#### 100",
        "#### -10",
        "#### 10.01",
        "10",
        "",
        "#### ten",
        "#### 11 or #### 10",
    ]
    assert [task.evaluate(item, text) for text in right] == [True] * len(right)
    assert [task.evaluate(item, text) for text in wrong] == [False] * len(wrong)
    assert (task.reward(item, right[0]), task.reward(item, wrong[0])) == (1.0, 0.0)


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_change_nothing(number):
    assert final_number(f"#### {number:,}") == number == final_number(f"#### {number}")


def test_a_reference_without_a_number_is_a_users_error(store, tmp_path):
    put(tmp_path, "GSM8K", train=[{"question": "?", "answer": "I do not know."}])
    task = GSM8K("train")
    with pytest.raises(UserError, match="without `#### number`"):
        task.evaluate(task[0], "#### 1")


# ---- the task


def test_items_of_own_making(store, tmp_path):
    put(tmp_path, "GSM8K", train=[gsm8k_row(i) for i in range(20)], test=[gsm8k_row(50)])
    task = GSM8K("train")
    assert (task.name, task.eval_type, task.baseline, task.published) == ("GSM8K", "generative", 0.0, True)
    questions = {task[i]["messages"][0]["content"] for i in range(20)}
    assert questions == {gsm8k_row(i)["question"] for i in range(20)}
    assert len(GSM8K("test")) == 1
    assert [GSM8K("train", stop=3)[i] for i in range(3)] == [task[i] for i in range(3)]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The published data set in a store of its own."""
    if not (DATA / "gsm8k").is_dir():
        pytest.skip(f"needs the published GSM8K in {DATA}/gsm8k (or set NANOCHAT_TEST_DATA)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("real")))
        assert hub.take_local("GSM8K", DATA) == ["train", "test"]
        yield GSM8K("train"), GSM8K("test")


def test_every_published_item_parses_and_its_own_answer_is_right(real):
    assert [len(task) for task in real] == [7473, 1319]
    for task in real:
        for index in range(len(task)):
            item = task[index]
            conversation_pieces(item)
            parts = item["messages"][1]["content"]
            said = "".join(part["text"] for part in parts if part["type"] == "text")
            number = said.rpartition("#### ")[2]
            assert task.evaluate(item, said)
            assert task.evaluate(item, f"It is {number}.\n#### {number}.00" if "." not in number else said)
            assert not task.evaluate(item, f"#### {number}1")
            assert number == "0" or not task.evaluate(item, f"#### -{number}")


def test_calls_of_published_items_are_those_of_the_data(real):
    for task, split in zip(real, ("train", "test"), strict=True):
        answers = {row["question"]: row["answer"] for row in hub.load_rows("GSM8K", split)}
        total = 0
        for index in range(len(task)):
            question, answer = task[index]["messages"]
            text = answers[question["content"]]
            # another way to the same: cut at every mark, then at the last equals sign
            expected = [mark.split(">>")[0].rsplit("=", 1) for mark in text.split("<<")[1:]]
            parts = answer["content"]
            outputs = [part["text"] for part in parts if part["type"] == "python_output"]
            calls = [part["text"] for part in parts if part["type"] == "python"]
            assert [list(pair) for pair in zip(calls, outputs, strict=True)] == expected
            said = "".join(part["text"] for part in parts if part["type"] == "text")
            assert said == re.sub("<<.*?>>", "", text)
            total += len(calls)
        assert total == {"train": 23716, "test": 4282}[split]


def test_no_published_test_question_is_trained_on(real):
    train, test = (
        {" ".join(row["question"].lower().split()) for row in hub.load_rows("GSM8K", split)}
        for split in ("train", "test")
    )
    assert len(test) == 1319
    assert not train & test
