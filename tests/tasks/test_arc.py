import pytest

from nanochat.errors import UserError
from nanochat.tasks.arc import ARC
from tests.tasks.hub_rows import arc_row, put


@pytest.fixture
def items(store, tmp_path):
    rows = [arc_row(0), arc_row(1, "1234", "4"), arc_row(2, "ABC", "C"), arc_row(3, "ABCDE", "E")]
    put(tmp_path, "ARC-Easy", train=rows, test=[arc_row(9)])
    task = ARC("ARC-Easy", "train")
    return {task[i]["messages"][0]["content"].split("?")[0][-1]: task[i] for i in range(len(task))}


def test_choices_are_lettered_from_a_whatever_their_labels(items):
    assert {key: item["letters"] for key, item in items.items()} == {
        "0": list("ABCD"),
        "1": list("ABCD"),
        "2": list("ABC"),
        "3": list("ABCDE"),
    }
    assert {key: item["messages"][1]["content"] for key, item in items.items()} == {
        "0": "B",
        "1": "D",
        "2": "C",
        "3": "E",
    }
    assert "- thing 1 4=D\n" in items["1"]["messages"][0]["content"]


def test_the_right_letter_is_right_and_no_other(items):
    task = ARC("ARC-Easy", "train")
    for item in items.values():
        right = item["messages"][1]["content"]
        assert [letter for letter in item["letters"] if task.evaluate(item, letter)] == [right]


def test_what_the_task_says_of_itself(items):
    task = ARC("ARC-Easy", "test")
    assert (task.name, task.eval_type, task.baseline, task.published) == ("ARC-Easy", "categorical", 0.25, True)
    assert len(task) == 1
    assert task.source.startswith("local directory")
    with pytest.raises(UserError, match="--tasks=ARC-Challenge"):
        ARC("ARC-Challenge", "test")


def test_an_answer_that_is_no_choice_is_named(store, tmp_path):
    put(tmp_path, "ARC-Challenge", test=[arc_row(5, "ABC", "D")])
    with pytest.raises(UserError, match="ARC-Challenge test, row 0: answer 'D' is none of A, B, C"):
        ARC("ARC-Challenge", "test")[0]
