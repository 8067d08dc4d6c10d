"""scripts/mup_transfer.py: what is planned, done once, and said of it."""

import json
import math
import xml.etree.ElementTree as ET

import pytest

from nanochat.cli import parse
from nanochat.errors import UserError
from nanochat.paths import run_dir, tokenizer_dir
from nanochat.studies.mup_transfer import Settings, main, plan_sweep, report
from nanochat.studies.sweep import Run, append_run, finished_runs
from nanochat.tokenizer import RustBPETokenizer
from tests.scripts.test_base_train import words
from tests.studies.test_sweep import TINY, fill_store

SMALL = {**TINY, "widths": "32,64", "multipliers": "0.25,1,4", "seeds": 1, "device_type": "cpu"}


@pytest.fixture
def prepared(store):
    fill_store()


# ---- the plan


def test_the_plan_goes_seed_by_seed_and_shares_the_base_width():
    plan = plan_sweep(Settings(control=True, seeds=2))
    assert len(plan.runs) == len(set(plan.runs)) == 2 * (4 + 3) * 7
    assert [run.seed for run in plan.runs] == sorted(run.seed for run in plan.runs)
    assert {run.width for run in plan.runs if not run.mup} == {256, 512, 1024}
    assert plan.log2_rates == [-3, -2, -1, 0, 1, 2, 3]
    assert {run.mup for run in plan_sweep(Settings()).runs} == {True}


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": "128,100"},
        {"widths": "128,256,wide"},
        {"widths": "256,512"},
        {"widths": "128,128,256"},
        {"widths": ""},
        {"multipliers": "0.5,1"},
        {"multipliers": "0,1,2"},
        {"multipliers": "nan,1,2"},
        {"multipliers": "0.5,1,-2"},
    ],
)
def test_nonsense_is_refused(changes):
    with pytest.raises(UserError):
        plan_sweep(Settings(**changes))


def test_flags():
    given = parse(Settings, ["--widths=128,256", "--sweep=head", "--optimizer=adamw", "--control", "--arch=speedrun"])
    assert (given.widths, given.sweep, given.optimizer, given.control) == ("128,256", "head", "adamw", True)


# ---- a sweep


def test_a_sweep_is_resumed_where_it_stopped(prepared, tmp_path, capsys):
    settings = Settings(**SMALL, out=str(tmp_path / "out"), control=True)
    budget = Settings(**SMALL, out=str(tmp_path / "out"), control=True, time_budget_minutes=1e-9)
    main(budget)
    out = capsys.readouterr().out
    assert "the time is up" in out and "9 of 9 runs are not done" in out and "nothing to report yet" in out
    assert finished_runs(tmp_path / "out") == {}
    main(settings)
    out = capsys.readouterr().out
    assert "9/9 SP width 64 x4 seed 0" in out and "met " in out and "MISSED at least 4 widths" in out
    lines = (tmp_path / "out/runs.jsonl").read_text().splitlines()
    assert len(lines) == 9
    (tmp_path / "out/runs.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])
    main(settings)
    assert "5 of 9 runs to do" in capsys.readouterr().out
    again = finished_runs(tmp_path / "out")
    same = {Run(r["mup"], r["width"], r["log2_rate"], r["seed"]): r["loss"] for r in map(json.loads, lines)}
    assert {run: record["loss"] for run, record in again.items()} == same
    main(settings)
    assert "runs to do" not in capsys.readouterr().out
    flags = {name: SMALL[name] for name in ("widths", "multipliers")}  # the rest is on record
    main(Settings(**flags, out=str(tmp_path / "out"), report_only=True))
    out = capsys.readouterr().out
    assert "runs to do" not in out and "SP" not in out and "met " in out
    written = json.loads((tmp_path / "out/transfer.json").read_text())
    assert written["settings"]["steps"] == 6 and len(written["results"]["muP"]) == 2


def test_runs_of_another_recipe_are_not_mixed_in_but_more_of_them_are_welcome(prepared, tmp_path, capsys):
    out = {"out": str(tmp_path / "out")}
    main(Settings(**SMALL, **out))
    for changes in ({"steps": 7}, {"arch": "speedrun"}, {"sweep": "head"}, {"eval_tokens": 512}):
        with pytest.raises(UserError, match=f"holds runs with {next(iter(changes))}="):
            main(Settings(**{**SMALL, **changes}, **out))
    RustBPETokenizer.train_from_iterator([words(7)], 290).save(tokenizer_dir())
    with pytest.raises(UserError, match="holds runs with tokens="):
        main(Settings(**SMALL, **out))
    capsys.readouterr()


def test_a_report_of_nothing_is_refused(prepared, tmp_path):
    with pytest.raises(UserError, match="no runs in"):
        main(Settings(**SMALL, out=str(tmp_path), report_only=True))


def write_runs(folder, seeds, best, skip=(), control=None):
    """Runs whose losses are parabolas around best[width], 0.1 lower for each doubling."""
    folder.mkdir(exist_ok=True)
    for mup, places in ((True, best), (False, control or {})):
        for width, at in places.items():
            for seed in range(seeds):
                for log2 in (-2.0, -1.0, 0.0, 1.0, 2.0):
                    run = Run(mup, width, log2, seed)
                    if run in skip:
                        continue
                    loss = 4 - 0.1 * math.log2(width) + 0.05 * (log2 - at) ** 2 + 0.01 * seed
                    curve = [(step, loss + 1 / step) for step in range(1, 11)]
                    append_run(folder, {**run._asdict(), "loss": loss, "curve": curve, "seconds": 1.0})


WIDE = {"widths": "32,64,128,256", "multipliers": "0.25,0.5,1,2,4", "control": True}


def test_the_report_says_what_the_runs_say(tmp_path, capsys):
    settings = Settings(**{**SMALL, **WIDE})
    write_runs(tmp_path, 2, {32: 0.1, 64: 0.2, 128: -0.1, 256: 0.0}, control={64: -0.4, 128: -0.8, 256: -1.4})
    verdicts = report(settings, plan_sweep(settings), tmp_path)
    assert [verdict.passed for verdict in verdicts] == [True] * 5
    out = capsys.readouterr().out
    assert out.count("met ") == 5 and "SP, muon, factors on all rates" in out
    written = json.loads((tmp_path / "transfer.json").read_text())
    found = {
        name: [result["vertex"]["log2_rate"] for result in results] for name, results in written["results"].items()
    }
    assert found["muP"] == pytest.approx([0.1, 0.2, -0.1, 0.0]) and found["SP"] == pytest.approx(
        [0.1, -0.4, -0.8, -1.4]
    )
    for name in ("transfer.svg", "curves.svg"):
        assert "width 256" in ET.tostring(ET.parse(tmp_path / name).getroot(), encoding="unicode")


def test_what_is_not_finished_is_left_out_of_the_report_and_named(tmp_path, capsys):
    settings = Settings(**{**SMALL, **WIDE})
    places = {32: 0.1, 64: 0.2, 128: -0.1, 256: 0.0}
    write_runs(tmp_path, 2, places, skip={Run(True, 64, 1.0, 1), Run(True, 256, 2.0, 0), Run(True, 256, 0.0, 1)})
    verdicts = report(settings, plan_sweep(settings), tmp_path)
    assert [verdict.passed for verdict in verdicts] == [False, True, True, None, True]
    out = capsys.readouterr().out
    assert "muP width 256: left out" in out and "SP width 64: left out" in out
    seeds = {
        result["width"]: result["seeds"]
        for result in json.loads((tmp_path / "transfer.json").read_text())["results"]["muP"]
    }
    assert seeds == {32: 2, 64: 1, 128: 2}


def test_seeds_that_not_all_widths_have_are_left_out(tmp_path, capsys):
    settings = Settings(**{**SMALL, **WIDE, "control": False})
    places = {32: 0.1, 64: 0.2, 128: -0.1, 256: 0.0}
    write_runs(tmp_path, 2, places, skip={Run(True, 128, 1.0, 1)})
    report(settings, plan_sweep(settings), tmp_path)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.count("|") == 5]
    assert [row[1].strip() for row in rows[1:]] == ["1 of 2", "1 of 2", "1", "1 of 2"]
    results = json.loads((tmp_path / "transfer.json").read_text())["results"]["muP"]
    # a second seed would add 0.005 to the mean of its width
    assert [result["losses"]["0"]["mean"] for result in results] == pytest.approx(
        [4 - 0.1 * math.log2(width) + 0.05 * at**2 for width, at in places.items()]
    )


def test_no_seed_that_all_widths_have_is_nothing_to_report(tmp_path, capsys):
    settings = Settings(**{**SMALL, **WIDE, "control": False})
    skip = {Run(True, 128, 1.0, 1), Run(True, 64, 1.0, 0)}
    write_runs(tmp_path, 2, {32: 0.1, 64: 0.2, 128: -0.1, 256: 0.0}, skip=skip)
    assert report(settings, plan_sweep(settings), tmp_path) == []
    assert "muP: left out, no seed has been through all rates at all of its widths" in capsys.readouterr().out


def test_a_control_that_diverged_at_one_width_is_said_and_the_rest_reported(tmp_path, capsys):
    settings = Settings(**{**SMALL, **WIDE})
    write_runs(tmp_path, 1, {32: 0.1, 64: 0.2, 128: -0.1, 256: 0.0}, control={64: -0.4, 128: -0.8})
    nothing = {"loss": None, "curve": [(step, None) for step in range(1, 11)], "seconds": 1.0}
    for log2 in (-2.0, -1.0, 0.0, 1.0, 2.0):
        append_run(tmp_path, {**Run(False, 256, log2, 0)._asdict(), **nothing})
    verdicts = report(settings, plan_sweep(settings), tmp_path)
    assert [verdict.passed for verdict in verdicts] == [True, True, True, False, True]
    out = capsys.readouterr().out
    assert out.count("diverged at every rate") == 2 and (tmp_path / "transfer.json").exists()  # table and verdict
    assert "width 256" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(("by", "passed"), [(0.003, True), (0.005, False)])
def test_one_seed_is_judged_by_the_noise_between_seeds(tmp_path, by, passed):
    settings = Settings(**{**SMALL, "widths": "32,64", "multipliers": "0.5,1,2"})
    for width, more in ((32, 0.0), (64, by)):
        for log2 in (-1.0, 0.0, 1.0):
            curve = [(step, 3 + 1 / step + more) for step in range(1, 11)]
            record = {"loss": 3 + log2**2, "curve": curve, "seconds": 1.0}
            append_run(tmp_path, {**Run(True, width, log2, 0)._asdict(), **record})
    assert report(settings, plan_sweep(settings), tmp_path)[-1].passed is passed


def test_a_diverged_run_is_infinite_in_the_report_and_null_in_the_file(tmp_path, capsys):
    settings = Settings(**{**SMALL, **WIDE, "control": False})
    write_runs(tmp_path, 1, {32: 0.1, 64: 0.2, 128: -0.1, 256: 0.0}, skip={Run(True, 64, 2.0, 0)})
    nothing = {"loss": None, "curve": [(step, None) for step in range(1, 11)], "seconds": 1.0}
    append_run(tmp_path, {**Run(True, 64, 2.0, 0)._asdict(), **nothing})
    report(settings, plan_sweep(settings), tmp_path)
    assert "inf" in capsys.readouterr().out
    written = json.loads((tmp_path / "transfer.json").read_text())
    assert written["results"]["muP"][1]["losses"]["2"]["mean"] is None


# ---- runs of base_train


def write_metrics(tag, shift, held_out="val_bpb"):
    folder = run_dir(tag)
    folder.mkdir(parents=True)
    records = [{"stage": "base", "step": step, "Loss/train_loss": 5 - shift - 0.01 * step} for step in range(1, 61)]
    records += [
        {"stage": "base", "step": 30, f"Loss/{held_out}": 7.0},
        {"stage": "base", "step": 60, f"Loss/{held_out}": 1.0 - shift},
        {"stage": "sft", "step": 1, "Loss/val_bpb": 9},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_two_runs_of_base_train_are_compared(store, capsys):
    write_metrics("narrow", 0.0)
    write_metrics("wide", 0.1)
    main(Settings(widths="256,512", compare_runs="narrow,wide"))
    out = capsys.readouterr().out
    assert "wider is better at all 30 recorded steps" in out
    table = [line.split() for line in out.splitlines() if "|" in line]
    assert [row[0] for row in table] == ["width", "256", "512"] and table[0][-1] == "val_bpb"
    assert [float(row[2]) for row in table[1:]] == pytest.approx([4.405, 4.305])  # of steps 59 and 60
    assert [float(row[4]) for row in table[1:]] == pytest.approx([1.0, 0.9])
    with pytest.raises(UserError, match="wider is not better at 30"):
        main(Settings(widths="256,512", compare_runs="wide,narrow"))
    for widths, tags in (("256,512", "narrow"), ("512,256", "narrow,wide"), ("256,512", "narrow,absent")):
        with pytest.raises(UserError):
            main(Settings(widths=widths, compare_runs=tags))


def test_runs_on_token_files_are_compared_by_their_loss(store, capsys):
    write_metrics("narrow", 0.0, "val_loss")
    write_metrics("wide", 0.1, "val_loss")
    main(Settings(widths="256,512", compare_runs="narrow,wide"))
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert table[0][-1] == "val_loss" and [float(row[4]) for row in table[1:]] == pytest.approx([1.0, 0.9])
