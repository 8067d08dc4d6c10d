from nanochat.tasks.mmlu import MMLU
from tests.tasks.hub_rows import mmlu_row, put


def test_items_carry_subject_and_letters(store, tmp_path):
    put(tmp_path, "MMLU", train=[{"train": mmlu_row(i, "")} for i in range(30)], test=[mmlu_row(i) for i in range(3)])
    task = MMLU("test")
    assert (task.name, task.eval_type, task.baseline, task.published) == ("MMLU", "categorical", 0.25, True)
    questions = set()
    for index in range(len(task)):
        item = task[index]
        questions.add(item["messages"][0]["content"])
        assert (item["subject"], item["letters"]) == ("bolts", list("ABCD"))
        assert [letter for letter in "ABCD" if task.evaluate(item, letter)] == ["C"]
    assert len(questions) == 3
    assert "What is 0 + 2?\n- 0=A\n- 1=B\n- 2=C\n- 3=D\n" in "".join(sorted(questions))
    assert len(MMLU("train")) == 30  # the auxiliary set


def test_the_first_items_are_not_all_of_one_subject(store, tmp_path):
    put(tmp_path, "MMLU", test=[mmlu_row(i, f"subject {i // 100}") for i in range(1000)])
    task = MMLU("test", stop=50)
    assert len({item["subject"] for item in (task[i] for i in range(50))}) > 5
