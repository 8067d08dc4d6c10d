"""studies/coord_check.py, scripts/coord_check.py: what is measured, and that nothing passes by being empty."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from nanochat import cli
from nanochat.errors import UserError
from nanochat.studies.coord_check import (
    RECORDS,
    Settings,
    Slope,
    get_coord_data,
    judge,
    main,
    markov_batches,
    plot_coord_data,
    read_records,
    slopes,
    steepest,
)
from nanochat.train.coordinates import COORD, measure, record
from tests.train.test_coordinates import ROWS, hook_count, make_config, make_model

# ---- measuring


def test_records_begin_before_the_first_update_and_end_after_the_last():
    made, learned = [], []

    def make(seed):
        made.append(make_model(make_config(), seed))
        return made[-1]

    def make_optimizer(model):
        learned.append(model.setup_optimizer(0.02, 0.2, 0.004, 0.0))
        return learned[-1]

    batches = markov_batches(2, rows=2, length=16, vocab_size=64)
    records = get_coord_data({32: make}, batches, make_optimizer, nsteps=3, nseeds=2)
    assert {(r["seed"], r["t"]) for r in records} == {(seed, t) for seed in (0, 1) for t in (1, 2, 3, 4)}
    assert [optimizer.num_steps for optimizer in learned] == [3, 3]
    fresh, trained = make_model(make_config(), 1), made[1]

    def of(t):
        return {r["module"]: r["l1"] for r in records if r["seed"] == 1 and r["t"] == t}

    assert of(1) == {module: stats["l1"] for module, stats in measure(fresh, batches[0][0]).items()}
    assert of(4) == {module: stats["l1"] for module, stats in measure(trained, batches[1][0]).items()}
    assert of(1) != of(4)


def test_the_text_can_be_learned():
    (first, targets), *others = markov_batches(20, rows=4, length=32, vocab_size=16)
    assert first.shape == targets.shape == (4, 32) and len(others) == 19
    assert torch.equal(first[:, 1:], targets[:, :-1])
    successors = [set() for _ in range(16)]
    for inputs, targets in others:
        for a, b in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True):
            successors[a].add(b)
    assert max(map(len, successors)) <= 4 and min(map(len, successors)) >= 1
    assert torch.equal(markov_batches(20, rows=4, length=32, vocab_size=16)[0][0], first)


# ---- judging


def fake_records(law, widths=(64, 128, 512), seeds=3, modules=("h.0", "lm_head"), times=(1, 11)):
    return [
        {"width": w, "seed": s, "module": m, "t": t, "l1": law(w, s, m, t)}
        for w in widths
        for s in range(seeds)
        for m in modules
        for t in times
    ]


def test_slopes_against_polyfit():
    noise = np.random.default_rng(0)
    table = {}

    def law(w, s, m, t):
        return table.setdefault((w, s, m, t), w**0.3 * math.exp(noise.normal()))

    for found in slopes(fake_records(law)):
        widths = (64, 128, 512)
        fits = [
            np.polyfit(np.log2(widths), [math.log2(table[w, s, found.module, found.t]) for w in widths], 1)[0]
            for s in range(3)
        ]
        assert found.slope == pytest.approx(np.mean(fits))
        assert found.stderr == pytest.approx(np.std(fits, ddof=1) / math.sqrt(3))


def test_a_power_law_has_its_power_and_no_spread():
    found = {(s.module, s.t): s for s in slopes(fake_records(lambda w, s, m, t: (s + 1) * w ** (-t / 10)))}
    assert found["h.0", 11].slope == pytest.approx(-1.1) and found["h.0", 11].stderr == pytest.approx(0, abs=1e-12)
    assert len(found) == 4


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_what_is_zero_or_not_finite_has_no_slope(value):
    with pytest.raises(ValueError, match=r"h\.0 at width 128, t = 11"):
        slopes(fake_records(lambda w, s, m, t: value if (w, m, t) == (128, "h.0", 11) else 1.0))


def test_projections_that_begin_at_zero_are_an_error_and_not_flat():
    batches = markov_batches(1, rows=2, length=16, vocab_size=64)
    models = {w: lambda seed, w=w: make_model(make_config(w), seed, zero_proj=True) for w in (32, 64)}
    records = get_coord_data(models, batches, lambda model: model.setup_optimizer(), nsteps=0, nseeds=1)
    with pytest.raises(ValueError, match=r"h\.0\.attn at width 32, t = 1: l1 = 0\.0"):
        slopes(records)


def test_missing_widths_are_an_error():
    with pytest.raises(ValueError, match="two widths"):
        slopes(fake_records(lambda w, s, m, t: 1.0, widths=(64,)))
    records = [r for r in fake_records(lambda w, s, m, t: 1.0) if (r["seed"], r["width"]) != (2, 64)]
    with pytest.raises(ValueError, match="seed 2 has widths"):
        slopes(records)


def make_slopes(changes=()):
    flat = {(m, t): 0.0 for m in ("wte", "h.0", "lm_head") for t in (1, 2, 11, 101)}
    return [Slope(m, t, value, 0.01) for (m, t), value in (flat | dict(changes)).items()]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({("h.0", 1): 0.049, ("h.0", 11): -0.099, ("lm_head", 11): 0.249}, []),
        ({("lm_head", 1): -0.5, ("lm_head", 2): -0.4}, []),  # 1/√width at first
        ({("h.0", 101): 0.5, ("lm_head", 101): 0.5}, []),  # there are no bars so late
        ({("h.0", 1): -0.051}, ["h.0 at t = 1"]),
        ({("wte", 2): 0.11, ("h.0", 11): -0.11}, ["wte at t = 2", "h.0 at t = 11"]),
        ({("lm_head", 11): -0.26}, ["lm_head at t = 11"]),
    ],
)
def test_bars(changes, wrong):
    lines = judge(make_slopes(changes))
    assert [line.split(":")[0] for line in lines] == wrong


def test_with_fewer_steps_the_logits_are_judged_at_the_last():
    found = [s for s in make_slopes({("lm_head", 2): 0.3}) if s.t <= 2]
    assert [line.split(":")[0] for line in judge(found)] == ["lm_head at t = 2"]


def test_times_that_were_not_recorded_judge_nothing_by_silence():
    every_fourth = [s for s in make_slopes({("lm_head", 9): 0.3}) if s.t in (5, 9, 13)]
    sparse = [*every_fourth, every_fourth[-1]._replace(t=51)]
    assert [line.split(":")[0] for line in judge(sparse)] == ["lm_head at t = 9"]
    with pytest.raises(UserError, match="no coordinates up to t = 11"):
        judge([s._replace(t=51) for s in every_fourth])


def test_steepest_either_way():
    found = make_slopes({("wte", 2): -0.3, ("h.0", 11): 0.2, ("lm_head", 1): 0.9})
    assert steepest(found)[:3] == ("wte", 2, -0.3)
    assert steepest(found, logits=True)[:3] == ("lm_head", 1, 0.9)


def test_plot_has_a_panel_for_each_time():
    records = fake_records(lambda w, s, m, t: w**0.5 * (1 + s))
    svg = plot_coord_data(records)
    texts = ["".join(node.itertext()) for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"l1, t = 1", "l1, t = 11", "h.0", "lm_head"} <= set(texts)
    many = plot_coord_data(fake_records(lambda w, s, m, t: w**0.5, times=range(1, 60)))
    assert 8 <= many.count("l1, t = ") <= 12


# ---- during a run


def test_recorder_and_what_reads_it(tmp_path):
    paths = []
    for index, (width, seed) in enumerate([(32, 0), (64, 0), (32, 1), (64, 1)]):
        model = make_model(make_config(width, 16), seed)
        paths.append(tmp_path / f"run{index}" / RECORDS)
        for step in (0, 10, 10):  # 10 again: the run was resumed
            metrics = record(model, paths[-1], ROWS, step)
        assert metrics[f"{COORD}/wte"] == pytest.approx(measure(model, ROWS)["wte"]["l1"])
        assert hook_count(model) == 0
    records = read_records(paths)
    assert {(r["width"], r["seed"], r["t"]) for r in records} == {
        (w, s, t) for w in (32, 64) for s in (0, 1) for t in (1, 11)
    }
    assert len(records) == 4 * 2 * len(metrics)
    found = slopes(records)
    assert abs(steepest(found).slope) < 1
    assert read_records(paths[:1])[0].keys() == {"width", "seed", "module", "t", "l1", "l2", "mean", "std"}


# ---- the script


def test_script_passes_mup_and_writes_what_it_saw(tmp_path, capsys):
    arguments = ["--widths=64,128", "--steps=1", "--seeds=2", f"--out={tmp_path / 'out'}", "--base-width=64"]
    settings = cli.parse(Settings, arguments)
    try:
        main(settings)
        code = 0
    except SystemExit as end:
        code = end.code
    result = json.loads((tmp_path / "out" / "coord_check.json").read_text())
    assert code == (1 if result["missed"] else 0)  # two seeds of two widths are too few to be sure of either
    assert {r["t"] for r in result["records"]} == {1, 2}
    assert result["slopes"] == [s._asdict() for s in slopes(result["records"])]
    assert ET.parse(tmp_path / "out" / "coord_check.svg").getroot().tag.endswith("svg")
    out = capsys.readouterr().out
    assert "lm_head.weight" in out and "coordinate check: " in out


def test_script_compares_runs(tmp_path):
    folders = []
    for width in (64, 128):
        model = make_model(make_config(width, 64))
        folders.append(str(tmp_path / str(width)))
        record(model, tmp_path / str(width) / RECORDS, ROWS, 0)
    settings = cli.parse(Settings, [f"--from={','.join(folders)}", f"--out={tmp_path}", "--no-mup"])
    with pytest.raises(SystemExit):  # at init, the standard parametrisation shows in the logits alone
        main(settings)
    missed = json.loads((tmp_path / "coord_check.json").read_text())["missed"]
    assert "too weak" in missed[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--widths=100,128"], "100 is no multiple of 64"),
        (["--widths=64;128"], "whole numbers"),
        (["--from=nowhere"], "nowhere"),
        (["--widths=128", "--steps=0", "--seeds=1"], "two widths"),
        (["--widths=64,96"], "96"),
        (["--widths=192,384", "--base-width=100"], "--base-width=100"),
    ],
)
def test_script_says_what_it_cannot_do(arguments, words, tmp_path):
    settings = cli.parse(Settings, [*arguments, f"--out={tmp_path}"])
    with pytest.raises(UserError, match=words):
        main(settings)
