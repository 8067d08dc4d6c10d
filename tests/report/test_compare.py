"""compare.py: differences against their definitions, and against runs whose answer is known."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.report.compare import compare, paired_mean, paired_ratio, reached
from tests.report.runs import TASKS, write, write_run

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


@given(PAIRS)
def test_a_paired_mean_is_that_of_the_differences(pairs):
    first, second = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    found = paired_mean(first, second)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    assert found.difference == pytest.approx(statistics.fmean(differences))
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(len(pairs)))
    assert (found.better, found.worse) == (pairs.count((False, True)), pairs.count((True, False)))


@given(st.lists(st.tuples(*[st.floats(0, 9)] * 2, st.integers(1, 50)), min_size=2, max_size=20))
def test_a_paired_ratio_of_equal_weights_is_a_paired_mean_and_changes_its_sign_with_the_order(rows):
    first, second, weights = (list(column) for column in zip(*rows, strict=True))
    forth, back = paired_ratio(first, second, weights), paired_ratio(second, first, weights)
    assert forth.difference == pytest.approx(-back.difference) and forth.stderr == pytest.approx(back.stderr)
    equal, mean = paired_ratio(first, second, [1] * len(rows)), paired_mean(first, second)
    assert equal.difference == pytest.approx(mean.difference, abs=1e-9)
    assert equal.stderr == pytest.approx(mean.stderr, abs=1e-9)


def test_pairing_takes_out_what_both_find_hard():
    """Documents whose bits per byte differ by 1, and a model that is better by 0.01 on each."""
    weights, hard = [100] * 50, [100 * (1 + i % 2) for i in range(50)]
    found = paired_ratio(hard, [bits - 1 for bits in hard], weights)
    assert found.difference == pytest.approx(-0.01) and found.stderr < 1e-12


@given(st.floats(0.05, 7.9), st.floats(0.1, 0.9))
def test_a_curve_is_read_where_it_comes_down_to_a_loss(loss, power):
    points = [(float(x), 8 * x**-power) for x in range(5, 400)]
    expected = (8 / loss) ** (1 / power)
    if 5 < expected <= 399:
        assert reached(points, loss) == pytest.approx(expected, rel=0.01)
    else:
        assert reached(points, loss) is None


def read(folder):
    return json.loads((folder / "compare.json").read_text())


def test_a_run_that_needs_half_the_compute_is_found(store, monkeypatch, tmp_path):
    slow = write_run("slow", monkeypatch, slower=2.0, matrix_lr=0.02, nats=2.1)
    fast = write_run("fast", monkeypatch, matrix_lr=0.04)
    page = compare([slow, fast], tmp_path)
    found = read(tmp_path)
    (each,) = found["multipliers"]
    assert (each["better"], each["other"]) == ("fast", "slow")
    for axis, spent, needed, factor, low, high in each["rows"]:
        assert axis in ("tokens", "training FLOPs", "minutes of training")
        assert factor == pytest.approx(2.0, rel=0.03) and spent == pytest.approx(needed * factor, rel=0.01)
        assert (low is None or low <= factor + 1e-9) and (high is None or factor <= high + 1e-9)
    assert len(each["rows"]) == 3 and each["rows"][1][1] == 100.0 * 6000
    assert found["settings"] == [["base_train", "matrix_lr", "0.0200", "0.0400"]]
    text = page.read_text()
    assert text.count("<svg") == 6 and "<script" not in text
    assert "| tokens |" in (tmp_path / "compare.md").read_text()


def test_the_same_items_and_documents_are_paired(store, monkeypatch, tmp_path):
    wrong = [{**record, "correct": record["correct"] and record["line"] != 3} for record in TASKS]
    runs = [write_run("a", monkeypatch), write_run("b", monkeypatch, right=wrong, nats=2.2)]
    compare(runs, tmp_path)
    bits, core = read(tmp_path)["results"][0]["rows"]
    assert bits[1] == "bits per byte (20 documents)" and bits[4].startswith(f"{0.2 / math.log(2):+.4f} ± 0.0000")
    assert bits[5:] == ["yes", "0 / 20"]
    assert (
        core[:2] == ["base_eval", "copy (30 items)"] and core[4] == "-0.0333 ± 0.0333" and core[5:] == ["no", "0 / 1"]
    )


def test_items_that_may_not_be_the_same_are_not_paired_and_this_is_said(store, monkeypatch, tmp_path):
    compare([write_run("a", monkeypatch), write_run("b", monkeypatch, bundle="10 bb")], tmp_path)
    (found,) = read(tmp_path)["results"]
    assert found["rows"][1] == ["base_eval", "CORE (not paired)", 0.2, 0.2, "+0.0000 ± 0.0707", "no", "-"]
    assert found["notes"] == [
        "base_eval: not paired, since not all of its results are there or come from the same files"
    ]


def test_losses_of_different_text_are_not_compared(store, monkeypatch, tmp_path):
    compare([write_run("a", monkeypatch), write_run("b", monkeypatch, text="u", slower=2.0)], tmp_path)
    found = read(tmp_path)
    assert found["plots"] == [] and found["multipliers"][0]["rows"] == []
    assert "different text" in (tmp_path / "compare.md").read_text()


def test_of_few_validations_the_training_losses_are_taken(store, monkeypatch, tmp_path):
    runs = [write_run(name, monkeypatch, slower=slower) for name, slower in (("fast", 1.0), ("slow", 2.0))]
    for folder in runs:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        write(folder / "metrics.jsonl", [record for record in records if "Loss/train_loss" in record])
    compare(runs, tmp_path)
    (each,) = read(tmp_path)["multipliers"]
    assert each["of"].startswith("training loss") and each["rows"][0][3] == pytest.approx(2.0, rel=0.03)


def test_one_run_is_not_compared(store, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="expected two runs or more"):
        compare([write_run("a", monkeypatch)] * 2, tmp_path)


def test_a_run_that_was_stopped_early_is_compared_by_what_there_is(store, monkeypatch, tmp_path):
    early = write_run("early", monkeypatch, steps=4)
    for path in (early / "report").iterdir():
        path.unlink()
    compare([write_run("a", monkeypatch), early], tmp_path)
    found = read(tmp_path)
    assert found["results"][0]["rows"] == [] and "They have no scores" in (tmp_path / "compare.md").read_text()
    assert [row[0] for row in found["multipliers"][0]["rows"]] == ["tokens", "minutes of training"]
