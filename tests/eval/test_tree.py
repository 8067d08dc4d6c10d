"""tree.py: what rows share is read once, against the same rows read in full; and what CORE is besides that."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.eval import core
from nanochat.eval.core import CoreResult, CoreScore, evaluate_core, evaluate_task
from nanochat.eval.scores import Composite
from nanochat.eval.tree import OVERHEAD, Row, batches, make_stems
from nanochat.gpt import GPT
from tests.eval.test_core import BOS, CPU, ByteTokenizer, make_task, values
from tests.models import make_config

ARCHS = {
    "classic": {},
    "windows": {"window_pattern": "SSL", "short_window": 20},
    "speedrun": {"arch": "speedrun", "long_window": 40, "short_window": 12, "document_token": BOS},
    "ngram": {"arch": "ngram", "long_window": 40, "short_window": 12, "document_token": BOS, "ngram_heads": 2},
    "everything": {"arch": "ngram", "long_window": 60, "short_window": 9, "document_token": BOS, "smear": True,
                   "backout": True, "attn_gate": True, "value_embeds": "gated"},
}  # fmt: skip
KINDS = ["multiple_choice", "schema", "language_modeling"]


@pytest.fixture(autouse=True)
def keep_overhead(monkeypatch):
    monkeypatch.setitem(OVERHEAD, "cpu", OVERHEAD["cpu"])


def random_gpt(seed: int, **changes) -> GPT:
    """Every parameter random, so that nothing is the identity."""
    config = make_config(**{"n_layer": 4, "n_embd": 32, "head_dim": 8, "vocab_size": 257, "sequence_len": 64} | changes)
    model = GPT(config)
    model.init_weights(seed=seed, head_std=0.5, zero_proj=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim < 2 or "gate" in name or "ngram" in name:
                param += 0.4 * torch.randn(param.shape, generator=generator)
    return model.eval()


def both(model: GPT, task, sequence_len: int, **limits) -> tuple[CoreScore, CoreScore]:
    """Scored as a tree, and as rows in full."""
    tree = evaluate_task(model, ByteTokenizer(), task, CPU, sequence_len=sequence_len, **limits)
    return tree, evaluate_task(lambda idx: model(idx), ByteTokenizer(), task, CPU, sequence_len=sequence_len, **limits)


def check(tree: CoreScore, full: CoreScore) -> None:
    for name in ("line", "chosen", "correct"):
        assert values(tree, name) == values(full, name)
    np.testing.assert_allclose(values(tree, "loss"), values(full, "loss"), atol=2e-5)


@pytest.mark.parametrize("arch", ARCHS)
@given(
    st.sampled_from([0, 0, 10**6]),
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.integers(0, 3),
    st.sampled_from([30, 60, 100, 400]),
    st.integers(1, 4),
    st.sampled_from([" ", "\nAnswer: ", ""]),
)
@hypothesis_settings(max_examples=8, deadline=None)
def test_a_tree_is_scored_as_its_rows_in_full(arch, overhead, kind, seed, shots, sequence_len, batch, delimiter):
    """Answers and losses, item by item; prompts that fit, that are cut at one place, and that are cut at several; one
    forward pass for all that fit into it, and as many as pad least."""
    OVERHEAD["cpu"] = overhead
    task = make_task(kind, 9, shots, seed=seed, delimiter=delimiter)
    check(*both(random_gpt(seed, **ARCHS[arch]), task, sequence_len, device_batch_size=batch))


def test_windows_are_those_that_the_model_has_now():
    model = random_gpt(3, **ARCHS["speedrun"])
    task = make_task("multiple_choice", 9, 2)
    grown, _ = both(model, task, 400)
    model.windows[:] = torch.tensor([3.0, 7.0])
    small, full = both(model, task, 400)
    check(small, full)
    assert values(small, "loss") != pytest.approx(values(grown, "loss"), abs=1e-4)


def test_prompts_longer_than_the_rotary_table_are_cut():
    model = random_gpt(1, sequence_len=16)  # a table of 160
    for kind in KINDS:
        task = make_task(kind, 6, 5)
        tree = evaluate_task(model, ByteTokenizer(), task, CPU, sequence_len=10**6, device_batch_size=1)
        check(tree, both(model, task, 80)[1])


def test_options_that_are_the_same_tie_and_the_first_is_chosen():
    item = {"query": "to be or", "choices": ["not to be", "a question", "a question", "not to be"], "gold": 3}
    task = dataclasses.replace(make_task("multiple_choice", 1, 0), items=[item])
    for seed in range(6):
        chosen = evaluate_task(random_gpt(seed), ByteTokenizer(), task, CPU, sequence_len=64).records[0]["chosen"]
        assert chosen in (0, 1)


def test_shared_tokens_are_read_once():
    rows = [Row([9, 1, 2, 3, 4, 5], 4, 6), Row([9, 1, 2, 3, 6], 4, 5), Row([9, 1, 2, 3, 4, 5], 4, 6)]
    other = [Row([8, 7], 1, 2)]
    alone, stem = make_stems([other, rows], 8)
    assert list(alone.trunk.tokens) == [8] and not alone.branches
    assert stem.trunk.tokens == [9, 1, 2, 3] and [number for number, _ in stem.trunk.answers] == [1, 2, 3]
    assert [list(branch.tokens) for branch in stem.branches] == [[4], []]  # the last token predicts nothing
    cut_apart = make_stems([[Row([1, 2, 3], 2, 3), Row([2, 3, 4], 2, 3)]], 0)
    assert [list(stem.trunk.tokens) for stem in cut_apart] == [[1, 2], [2, 3]]
    in_full = make_stems([other, rows], 9)  # 8 tokens are saved
    assert [list(stem.trunk.tokens) for stem in in_full] == [[8], [9, 1, 2, 3, 4], [9, 1, 2, 3]]
    assert [[number for number, _ in stem.trunk.answers] for stem in in_full] == [[0], [1, 3], [2]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 60), st.integers(0, 20))
@hypothesis_settings(max_examples=60, deadline=None)
def test_batches_waste_least(lengths, most, overhead):
    """Against every way to cut the sorted rows into batches."""

    def cost(groups) -> float:
        sizes = [len(group) * max(group) for group in groups]
        fits = all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
        return sum(size + overhead for size in sizes) if fits else np.inf

    ordered = sorted(lengths, reverse=True)
    every = []
    for cuts in range(2 ** (len(lengths) - 1)):
        groups = [[ordered[0]]]
        for i, length in enumerate(ordered[1:]):
            groups.append([length]) if cuts >> i & 1 else groups[-1].append(length)
        every.append(cost(groups))
    found = list(batches(lengths, most, overhead))
    assert sorted(number for batch in found for number in batch) == list(range(len(lengths)))
    assert cost([[lengths[number] for number in batch] for batch in found]) == min(every)
    assert [lengths[batch[0]] for batch in found] == sorted((lengths[batch[0]] for batch in found), reverse=True)


def test_prompts_are_encoded_once_for_a_tokenizer_and_a_bundle(monkeypatch):
    class Counting(ByteTokenizer):
        calls = 0
        hash = "a"

        def encode(self, text, prepend=None):
            Counting.calls += isinstance(text, list)
            return super().encode(text, prepend)

    monkeypatch.setattr(core, "_remembered", {})
    tokenizer, model, task = Counting(), random_gpt(0), make_task("schema", 8, 1)
    first = evaluate_task(model, tokenizer, task, CPU, sequence_len=64)
    assert evaluate_task(model, tokenizer, task, CPU, sequence_len=64) == first and Counting.calls == 1
    for changes in ({"sequence_len": 60}, {"sequence_len": 64, "max_per_task": 7}):
        evaluate_task(model, tokenizer, task, CPU, **changes)
    evaluate_task(model, tokenizer, dataclasses.replace(task, items=task.items[::-1]), CPU, sequence_len=64)
    assert Counting.calls == 4
    monkeypatch.setattr(Counting, "hash", "b")
    evaluate_task(model, tokenizer, task, CPU, sequence_len=64)
    assert Counting.calls == 5
    monkeypatch.setattr(core, "_MOST_REMEMBERED", 2)
    for seed in range(4):
        evaluate_task(model, tokenizer, make_task("schema", 5, 0, seed=seed), CPU, sequence_len=64)
    assert len(core._remembered) <= 5


# ---- the interval of the mean over tasks


def score_of(outcomes: list[bool], baseline: float) -> CoreScore:
    records = [{"correct": outcome} for outcome in outcomes]
    return CoreScore(name="x", baseline=baseline, records=records, kind="schema", num_fewshot=0)


def test_bootstrap_interval_is_that_of_items_drawn_again():
    """Against drawing the items of each task themselves."""
    rng = np.random.default_rng(0)
    sizes = [(40, 0.3, 0.25), (300, 0.8, 0.5), (25, 0.1, 0.0)]
    tasks = [score_of((rng.random(n) < p).tolist(), baseline) for n, p, baseline in sizes]
    result = Composite(name="mean", tasks=tasks)
    means = np.zeros(20_000)
    for task in tasks:
        right = np.array(values(task, "correct"), dtype=float)
        drawn = right[rng.integers(0, task.n, (len(means), task.n))].mean(axis=1)
        means += (drawn - task.baseline) / (1 - task.baseline) / len(tasks)
    np.testing.assert_allclose(result.interval, np.quantile(means, (0.025, 0.975)), atol=0.006)
    assert result.interval == result.interval and result.interval[0] < result.value < result.interval[1]
    assert (result.interval[1] - result.interval[0]) / 2 == pytest.approx(1.96 * result.stderr, rel=0.1)


def test_bootstrap_interval_without_spread():
    result = Composite(name="mean", tasks=[score_of([True] * 5, 0.5), score_of([False, True], 1.0)])
    assert result.interval == (0.5, 0.5) == (result.value, result.value)


def test_the_interval_stands_in_the_row_of_the_mean_and_in_the_report(tmp_path):
    tasks = [score_of([True, False] * 20, 0.25), score_of([True] * 9 + [False], 0.0)]
    result = CoreResult(name="CORE", kind="published", source="", tasks=tasks)
    *_, last = core.write_results(result, tmp_path, "d4").read_text().splitlines()
    low, high = result.interval
    assert last.split(",")[5:7] == [f"{low:.6f}", f"{high:.6f}"]
    assert core.report_data(result)["facts"]["interval"] == f"{low:.4f} to {high:.4f}"


def test_a_bundle_is_scored_alike_both_ways():
    tasks = [make_task(kind, 12, shots, seed=random.randrange(10**6)) for kind in KINDS for shots in (0, 2)]
    bundle = core.Bundle(kind="custom", source="", tasks=tasks)
    model = random_gpt(random.randrange(10**6))
    results = [
        evaluate_core(one, ByteTokenizer(), bundle, CPU, sequence_len=100) for one in (model, lambda idx: model(idx))
    ]
    for tree, full in zip(results[0].tasks, results[1].tasks, strict=True):
        check(tree, full)
    assert results[0].value == results[1].value
