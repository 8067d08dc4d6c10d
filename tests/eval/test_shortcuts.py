"""shortcuts.py, and that generated tasks leave them nothing: what ignores the question is right by chance."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.eval.bundle import Bundle
from nanochat.eval.bundle import Task as BundleTask
from nanochat.eval.core import evaluate_task
from nanochat.eval.offline_bundle import write_offline_bundle
from nanochat.eval.scores import TaskScore, mean_stderr
from nanochat.eval.shortcuts import best_of, measure, of_answers, of_bundle_task, of_choices, of_task
from nanochat.gpt import GPT, GPTConfig
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.common import GeneratedTask, Task, answered, multiple_choice
from nanochat.tasks.spelling import SimpleSpelling, SpellingBee
from nanochat.tasks.text_choice import TextChoice
from nanochat.tokenizer import RustBPETokenizer
from tests.eval.test_offline_bundle import documents as prose
from tests.tasks.test_words import documents, source  # noqa: F401  (the fixture)

CPU = torch.device("cpu")
TOKENIZER = RustBPETokenizer.train_from_iterator(documents(60), 600)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return write_offline_bundle(prose(), "pydocs", tmp_path_factory.mktemp("bundle") / "eval_bundle")


# ---- the measurement


def test_shortcuts_by_hand():
    items = [(["a b", "c c c", "a"], 1), (["a", "bb b", "cc"], 1), (["x", "yy", "zzz z"], 2)]
    found = of_choices(items, ["a a a a"])
    assert found["always 2 of 3"] == pytest.approx(2 / 3) and found["always 1 of 3"] == 0
    assert found["the longest"] == 1 and found["the shortest"] == 0
    assert found["the most frequent words"] == pytest.approx((0 + 0 + 1 / 3) / 3)  # x, yy, zzz: each once
    assert 0 < found["an untrained model"] < 0.7
    assert of_answers(["2", "1", "1", "3"]) == {"always 1": 0.5} and of_answers(["1", "2"]) == of_answers([]) == {}
    assert best_of({"guessing": 0.25, "b": 0.25}) == (0.25, "guessing") and best_of({}) == (0.0, "")


@settings(max_examples=20)
@given(st.lists(st.tuples(st.lists(st.text(max_size=5), min_size=2, max_size=4), st.integers(0, 1)), max_size=6))
def test_shortcuts_are_accuracies(items):
    found = of_choices(items)
    assert all(0 <= value <= 1 for value in found.values())
    places = [value for name, value in found.items() if name.startswith("always")]
    assert sum(places) == pytest.approx(1 if items else 0)


def test_what_is_published_stays_the_definition_of_core():
    items = [{"query": "?", "choices": ["a", "b b"], "gold": 1}] * 4
    task = BundleTask(label="copa", kind="multiple_choice", num_fewshot=0, delimiter=" ", baseline=50.0, items=items)
    (published,) = measure(Bundle(kind="published", source="", tasks=[task])).tasks
    assert published.baseline == 50 and published.guess == "published; always 2 of 2: 100.0"
    (custom,) = measure(Bundle(kind="custom", source="", tasks=[task])).tasks
    assert custom.baseline == 100 and custom.guess == "always 2 of 2"


class Yes(GeneratedTask):
    """Two questions of three have the same answer."""

    def get_example(self, index):
        return answered("?", [{"type": "text", "text": f"so\n#### {'1,000' if index % 3 else index}"}])


class Longest(Task):
    eval_type, baseline = "categorical", 0.25

    def num_examples(self):
        return 8

    def get_example(self, index):
        return multiple_choice("?", ["a"] * (index % 4) + ["aaa"] + ["a"] * (3 - index % 4), "ABCD", "ABCD"[index % 4])


def test_chat_tasks():
    assert best_of(of_task(Yes("test", 9))) == (pytest.approx(2 / 3, abs=1e-6), "always 1000")
    assert best_of(of_task(Longest())) == (1.0, "the longest")
    solved = TaskScore(name="x", baseline=1.0, records=[{"passed": True}, {"passed": False}])
    assert solved.centered == solved.centered_stderr == 0  # nothing is above that, and no mean is infinite
    centred = TaskScore(name="bee", baseline=best_of(of_task(Yes("test", 9)))[0], records=[{"passed": False}] * 9)
    assert centred.centered < 0  # below guessing it lowers a mean


# ---- intervals


@given(st.integers(1, 500), st.data())
def test_wilson_interval_solves_its_equation(n, data):
    right = data.draw(st.integers(0, n))
    score = TaskScore(name="x", baseline=0.0, records=[{"passed": i < right} for i in range(n)])
    low, high = score.interval
    assert 0 <= low <= score.accuracy <= high <= 1 and score.stderr > 0
    for end in {low, high} - {0.0, 1.0, score.accuracy}:
        assert abs(score.accuracy - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)


def test_none_right_of_a_hundred():
    score = TaskScore(name="x", baseline=0.0, records=[{"passed": False}] * 100)
    assert score.stderr == pytest.approx(1 / 202) and score.interval == (0.0, pytest.approx(0.0370, abs=1e-4))
    assert mean_stderr(0.25, 10_000) == pytest.approx(0.005, rel=1e-3)


# ---- generated tasks


def random_model(seed: int) -> GPT:
    """With weights at random everywhere: a head of zeros, as it starts, would choose the first of equals."""
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len=512, vocab_size=TOKENIZER.get_vocab_size(), n_layer=1, n_head=1, n_kv_head=1,
                       n_embd=16)  # fmt: skip
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def unigram_model():
    counts = Counter(token for text in documents(60) for token in TOKENIZER.encode(text))
    logits = torch.tensor([math.log(counts[token] + 1) for token in range(TOKENIZER.get_vocab_size())])
    return lambda idx: logits.expand(*idx.shape, -1)


def test_no_task_of_the_bundle_has_a_shortcut(bundle: Bundle):
    assert len(bundle.tasks) == 6
    for task in bundle.tasks:
        found = of_bundle_task(task)
        chance = {"multiple_choice": 1 / len(task.items[0].get("choices", "1234")), "schema": 0.5}.get(task.kind, 0.0)
        assert max(found.values()) <= chance + 1e-9, (task.label, found)
        assert task.baseline == pytest.approx(100 * chance)


def test_an_untrained_model_is_at_chance_in_the_bundle(bundle: Bundle):
    for task in bundle.tasks:
        score = evaluate_task(random_model(1), TOKENIZER, task, CPU, sequence_len=512, max_per_task=60)
        assert abs(score.centered) < 3.5 * score.centered_stderr + 0.01, (task.label, str(score))


def test_a_unigram_model_is_at_chance_in_the_bundle(bundle: Bundle):
    model = unigram_model()
    for task in bundle.tasks:
        score = evaluate_task(model, TOKENIZER, task, CPU, sequence_len=512)
        # by construction exactly so, but for choices that begin alike: what they share is not scored
        assert abs(score.centered) < 0.1, (task.label, str(score))


def test_no_chat_task_has_a_shortcut(source: str):  # noqa: F811
    SpellingBee.prepare("SpellingBee", source)
    bars = {Arithmetic("test"): 0.05, SimpleSpelling("test", source): 0.02, SpellingBee("test", source): 0.45,
            TextChoice("test", source): 0.26}  # fmt: skip
    for task, bar in bars.items():
        assert max(of_task(task).values()) < bar, (task.name, of_task(task))


def test_what_is_measured_is_written_into_the_table_of_a_bundle(bundle: Bundle, tmp_path: Path):
    again = write_offline_bundle(prose(), "pydocs", tmp_path / "eval_bundle")
    rows = (tmp_path / "eval_bundle" / "eval_meta_data.csv").read_text().splitlines()
    assert rows[0].split(",")[4:6] == ["Random baseline", "Guess"] and rows[1].split(",")[4:6] == ["25", "guessing"]
    assert again.tasks == bundle.tasks and measure(again).tasks[0].guess == "guessing"
