import inspect
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.paths import slug
from nanochat.tasks import registry, spelling
from nanochat.tasks.arc import ARC
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import Task
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.registry import (
    CHATCORE_TASKS,
    TASKS,
    TaskSpec,
    canonical_name,
    make_task,
    parse_spec,
    parse_tasks,
    task_inputs,
)
from scripts.chat_rl import GradedMixture, question_task
from tests.tasks.hub_rows import arc_row, gsm8k_row, mmlu_row, put, talk_row


@pytest.fixture
def data(store, tmp_path):
    """A few items of each hub data set but HumanEval."""
    put(tmp_path, "GSM8K", train=[gsm8k_row(i) for i in range(10)], test=[gsm8k_row(20)])
    put(tmp_path, "MMLU", train=[mmlu_row(1)], test=[mmlu_row(2), mmlu_row(3)])
    put(tmp_path, "ARC-Easy", train=[arc_row(1)], test=[arc_row(2)])
    put(tmp_path, "ARC-Challenge", train=[arc_row(3)], test=[arc_row(4)])
    put(tmp_path, "SmolTalk", train=[talk_row(1), talk_row(2)], test=[talk_row(3)])
    return tmp_path


# ---- the spec


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("GSM8K", [TaskSpec("GSM8K")]),
        ("gsm8k, arc-easy", [TaskSpec("GSM8K"), TaskSpec("ARC-Easy")]),
        ("SmolTalk:10_000|GSM8K*4", [TaskSpec("SmolTalk", 10_000), TaskSpec("GSM8K", None, 4)]),
        (" MMLU : 5 * 2 ", [TaskSpec("MMLU", 5, 2)]),
        ("Reasoning-Gym/leg_counting:7", [TaskSpec("reasoning-gym/leg_counting", 7)]),
        ("My/Own.jsonl:3*2,b:5*3.jsonl", [TaskSpec("My/Own.jsonl", 3, 2), TaskSpec("b:5*3.jsonl")]),
    ],
)
def test_specs(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "no tasks given: expected some of SmolTalk, "),
        ("  ", "no tasks given"),
        (
            "GSM9K",
            f"unknown task 'GSM9K': expected {', '.join(TASKS)}, reasoning-gym/<generator>, or a .jsonl file",
        ),
        ("reasoning-gym/", "unknown task 'reasoning-gym/'"),
        ("GSM8K,", "tasks 'GSM8K,': an item without a name"),
        (":5", "tasks ':5': an item without a name"),
        ("GSM8K:many", "tasks 'GSM8K:many': count 'many' of GSM8K, expected a whole number from 1"),
        ("GSM8K:0", "tasks 'GSM8K:0': count '0'"),
        ("GSM8K:-1", "tasks 'GSM8K:-1': count '-1'"),
        ("GSM8K:1.5", "tasks 'GSM8K:1.5': count '1.5'"),
        ("GSM8K*0", "tasks 'GSM8K*0': repeats '0'"),
        ("GSM8K*", "tasks 'GSM8K*': repeats ''"),
        ("GSM8K*2:5", "tasks 'GSM8K*2:5': repeats '2:5'"),
    ],
)
def test_malformed_specs_are_one_line_errors(spec, message):
    with pytest.raises(UserError) as caught:
        parse_tasks(spec, "train")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


ITEMS = st.builds(TaskSpec, st.sampled_from(list(TASKS)), st.none() | st.integers(1, 10**9), st.integers(1, 100))


@given(st.lists(ITEMS, min_size=1), st.sampled_from([",", "|", " , "]), st.sampled_from([str.lower, str.upper, str]))
def test_what_is_written_is_what_is_read(items, joint, case):
    texts = []
    for item in items:
        count = "" if item.count is None else f":{item.count}"
        texts.append(f"{case(item.name)}{count}" + (f"*{item.repeats}" if item.repeats > 1 else ""))
    assert parse_spec(joint.join(texts)) == items


# ---- the tasks


def test_counts_take_the_first_items_and_repeats_give_a_task_several_times(data):
    found = parse_tasks("GSM8K:3*2,ARC-Easy:100", "train")
    assert [(task.name, len(task)) for task in found] == [("GSM8K", 3), ("GSM8K", 3), ("ARC-Easy", 1)]
    assert [found[0][i] for i in range(3)] == [GSM8K("train")[i] for i in range(3)]


@pytest.mark.parametrize("name", ["SmolTalk", "MMLU", "GSM8K", "ARC-Easy", "ARC-Challenge"])
def test_hub_tasks_of_both_splits(data, name):
    for split in ("train", "test"):
        task = make_task(name.lower(), split)
        assert task.name == name
        assert len(task) >= 1
        assert task[0]["messages"]
    assert isinstance(make_task("arc-challenge", "test"), ARC)


def test_a_jsonl_file_is_a_task(tmp_path):
    path = tmp_path / "Mine.jsonl"
    path.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n' * 3)
    (task,) = parse_tasks(f"{path}:2", "train")
    assert (task.name, len(task)) == ("Mine.jsonl", 2)


def test_counts_of_generated_tasks_are_their_size_and_others_are_cut(store, monkeypatch):
    monkeypatch.setattr(spelling, "load_words", lambda source, split: ["bolts", "keys"])
    found = parse_tasks("SpellingBee:30_000,SimpleSpelling,Arithmetic:70_000,Identity:7", "train", "pydocs")
    assert [len(task) for task in found] == [30_000, 20_000, 70_000, 7]
    assert [task.stop for task in found] == [None, None, None, 7]


def test_tasks_that_need_no_data(store):
    for split in ("train", "test"):
        found = parse_tasks("Arithmetic:3,Identity:2", split)
        assert [(task.name, len(task)) for task in found] == [("Arithmetic", 3), ("Identity", 2)]


@pytest.mark.parametrize("name", ["SimpleSpelling", "SpellingBee", "TextChoice"])
def test_tasks_made_from_text_need_a_source(store, name):
    with pytest.raises(UserError, match=f"{name} is made from text: name the run's text source with --source"):
        make_task(name, "train")
    with pytest.raises(UserError, match="--source=moon: expected fineweb-edu"):
        make_task(name, "train", "moon")
    with pytest.raises(UserError, match=r"python -m scripts\.chat_data"):
        make_task(name, "train", "pydocs")  # a source, but nothing has been made from it


def test_every_name_is_known_by_itself():
    assert [canonical_name(name.upper()) for name in TASKS] == list(TASKS)
    assert set(CHATCORE_TASKS) < set(TASKS)


def test_the_table_says_of_each_task_what_its_class_does():
    for name, row in TASKS.items():
        task_class = row.load()
        assert issubclass(task_class, Task)
        assert name == getattr(task_class, "name", "") or name in row.arguments
        assert row.graded == (task_class.eval_type is not None)
        # to be made from text is to read what was made of it
        assert row.from_text == ("source" in inspect.signature(task_class).parameters)


def test_inputs_are_paths_below_the_store_each_once():
    folder = slug("local:/data/a b")
    assert task_inputs("SpellingBee:5*2,HumanEval,SmolTalk,SimpleSpelling,Identity,TextChoice", "local:/data/a b") == [
        f"task_data/{folder}/words.txt",
        f"task_data/{folder}/words.json",
        "task_data/hub/SmolTalk",
    ]
    assert task_inputs("Arithmetic,reasoning-gym/maze", "pydocs") == []
    assert task_inputs("/data/own.jsonl", "pydocs") == ["/data/own.jsonl"]
    with pytest.raises(UserError, match="--source=moon"):
        task_inputs("Arithmetic", "moon")


def test_importing_the_registry_imports_no_task_and_no_torch():
    code = """if True:
        import sys, nanochat.tasks.registry
        print(*[name for name in sys.modules if name.startswith(('nanochat', 'torch', 'pyarrow'))])"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) == {
        "nanochat",
        "nanochat.errors",
        "nanochat.paths",
        "nanochat.tasks",
        "nanochat.tasks.common",
        registry.__name__,
    }


def test_a_graded_mixture_has_each_answer_graded_by_its_own_task(store):
    sums, few = Arithmetic("train", size=20), Arithmetic("train", size=5)
    few.reward = lambda conversation, completion: 0.5  # type: ignore[method-assign]
    mixture = GradedMixture([sums, few])
    assert len(mixture) == 25 and mixture.name == "Arithmetic" and mixture.eval_type == "generative"
    rewards: Counter[float] = Counter()
    for index in range(25):
        conversation = mixture[index]
        answer = conversation["messages"][-1]["content"][-1]["text"]
        assert mixture.evaluate(conversation, answer) and not mixture.evaluate(conversation, "#### -1")
        rewards[mixture.reward(conversation, answer)] += 1
    assert rewards == {1.0: 20, 0.5: 5}


def test_what_reinforcement_learning_can_practise_on(store):
    assert isinstance(question_task("arithmetic", "train", None), Arithmetic)
    mixture = question_task("Arithmetic:30,Arithmetic:10*2", "train", None)
    assert len(mixture) == 50 and len(question_task("Arithmetic:30,Arithmetic:10*2", "test", None)) == 256
    with pytest.raises(UserError, match="--task=Identity: its answers are not generated"):
        question_task("Arithmetic,Identity", "train", None)
