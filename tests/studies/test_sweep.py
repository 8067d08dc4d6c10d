"""Runs of a sweep: which text they see, and that they differ in what they are told to and in nothing else."""

import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from nanochat import dataset
from nanochat.data.bins import write_tokens
from nanochat.errors import UserError
from nanochat.paths import data_dir, tokenizer_dir
from nanochat.studies import sweep
from nanochat.studies.sweep import Bench, Run, SweepSettings, claim, in_turn, open_text, train_run, use_rates_of
from nanochat.tokenizer import RustBPETokenizer
from tests.data.test_text_rows import write_source
from tests.scripts.test_base_train import words

CPU = torch.device("cpu")
TINY = {"base_width": 32, "head_dim": 16, "depth": 1, "max_seq_len": 16, "steps": 6, "total_batch_size": 64,
        "eval_tokens": 256, "source": "pydocs"}  # fmt: skip


def fill_store():
    """A small data set and tokenizer, for the store of a test."""
    documents = [words(seed, 60) for seed in range(120)]
    write_source([documents[:50], documents[50:100], documents[100:]])
    RustBPETokenizer.train_from_iterator(documents, 300).save(tokenizer_dir())


@pytest.fixture
def prepared(store):
    fill_store()


def bench(**changes):
    settings = SweepSettings(**{**TINY, **changes})
    return Bench(settings, open_text(settings), CPU)


# ---- text


def test_text_is_new_at_every_step_the_same_for_a_seed_and_ends_in_an_error(prepared):
    settings = SweepSettings(**{**TINY, "steps": 12})
    text = open_text(settings)
    first, again, other = (list(text.train(seed)) for seed in (0, 0, 1))
    assert len(first) == 12 and {batch.shape for batch in first} == {(4, 17)}
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    rows = np.concatenate(first)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert text.val().shape == (16, 17) and text.vocab_size == 300
    with pytest.raises(UserError, match=r"new text for \d+ of --steps=500"):
        list(open_text(SweepSettings(**{**TINY, "steps": 500})).train(0))


def test_the_recipe_tells_texts_apart(prepared, tmp_path):
    """Other documents under the name of the same source are other text."""

    def of():
        settings = SweepSettings(**TINY)
        return sweep.recipe(settings, open_text(settings).identity)

    first = of()
    assert first == of() and first["source"] == "pydocs"
    sweep.open_folder(tmp_path / "out", first)
    documents = [words(seed, 60) for seed in range(1, 121)]
    shutil.rmtree(data_dir("pydocs"))
    write_source([documents[:50], documents[50:100], documents[100:]])
    other = of()
    assert {name for name in first if first[name] != other[name]} == {"text"}
    with pytest.raises(UserError, match="holds runs with text="):
        sweep.open_folder(tmp_path / "out", other)


def test_a_folder_is_the_same_text_however_it_is_named(store, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jsonl").write_text("".join(json.dumps({"text": words(seed, 60)}) + "\n" for seed in range(60)))
    dataset.main(dataset.Settings(source=f"local:{tmp_path}/texts"))
    RustBPETokenizer.train_from_iterator([words(7)], 290).save(tokenizer_dir())
    monkeypatch.chdir(tmp_path)
    named = [SweepSettings(**{**TINY, "source": f"local:{name}"}) for name in ("texts", str(tmp_path / "texts"))]
    one, other = (sweep.recipe(settings, open_text(settings).identity) for settings in named)
    assert one == other and one["source"] == f"local:{tmp_path}/texts"


def test_no_document_is_seen_twice(prepared):
    """The rows of a run as long as there is text for, against the documents themselves."""
    taken = []
    with pytest.raises(UserError):
        for batch in open_text(SweepSettings(**{**TINY, "steps": 500})).train(0):
            taken.append(batch)
    rows = np.concatenate(taken)
    bos = rows[0, 0]
    starts = [tuple(row[1:13]) for row in rows if bos not in row[1:]]  # of rows that one document fills
    assert len(starts) > 20 and len(set(starts)) == len(starts)


def test_token_files_give_each_seed_a_stretch_of_its_own(tmp_path):
    stream = np.arange(4000, dtype=np.uint16)
    stream[::20] = 50256
    for name, part in (("fineweb_train_000001", stream), ("fineweb_val_000000", stream[:400])):
        write_tokens(tmp_path / f"{name}.bin", part)
    text = open_text(SweepSettings(**{**TINY, "source": f"bin:{tmp_path}", "steps": 5}))
    first, other = (np.concatenate(list(text.train(seed))) for seed in (0, 1))
    assert first.shape == other.shape == (20, 17) and set(first[:, 0]) == {50256}
    assert not set(first[:, 1]) & set(other[:, 1]) and len(set(first[:, 1])) == 20
    assert text.document_token == 50256 and text.val().shape[1] == 17
    with pytest.raises(UserError, match="new text for"):
        list(text.train(20))


# ---- runs


def test_a_run_depends_on_nothing_but_itself(prepared):
    shared = bench()
    run = Run(True, 64, 0.0, 0)
    first = train_run(shared, run)
    for other in (Run(True, 64, 2.0, 0), Run(True, 32, 0.0, 1), Run(True, 64, 0.0, 1)):
        record = train_run(shared, other)
        assert record["loss"] != first["loss"] and record["width"] == other.width
    again, fresh = train_run(shared, run), train_run(bench(), run)
    assert first["loss"] == again["loss"] == fresh["loss"] and first["curve"] == again["curve"] == fresh["curve"]
    assert [step for step, _ in first["curve"]] == [1, 2, 3, 4, 5, 6]
    assert first["curve"][0][1] == pytest.approx(math.log(300), rel=1e-5)  # the head begins at zero
    assert first["curve"][-1][1] < first["curve"][0][1] and first["loss"] < math.log(300)


@pytest.mark.parametrize("arch", ["nanochat", "speedrun"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_at_the_base_width_the_control_is_the_same_run(prepared, arch, optimizer):
    shared = bench(arch=arch, optimizer=optimizer, depth=2)
    ours, control = (train_run(shared, Run(mup, 32, 1.0, 0)) for mup in (True, False))
    assert ours["loss"] == control["loss"] and ours["curve"] == control["curve"]
    wide = [train_run(shared, Run(mup, 64, 1.0, 0)) for mup in (True, False)]
    assert wide[0]["loss"] != wide[1]["loss"]


def test_micro_batches_do_not_change_the_run(prepared):
    run = Run(True, 64, 0.0, 0)
    whole, parts = train_run(bench(), run), train_run(bench(device_batch_size=1), run)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts["curve"] == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in whole["curve"]]


def test_a_diverged_run_has_no_loss(prepared, monkeypatch):
    monkeypatch.setattr(sweep, "evaluate", lambda *_: math.nan)
    assert train_run(bench(), Run(True, 32, 0.0, 0))["loss"] is None


def test_a_run_with_a_step_that_was_not_finite_has_diverged(prepared):
    """The loop leaves such a step out, so that the model itself may go on."""
    shared = bench()
    model, forward = shared.model(32, True)
    calls = itertools.count()
    shared.models[True, 32] = (
        model,
        lambda *args, **more: forward(*args, **more) * (math.inf if next(calls) == 2 else 1.0),
    )
    record = train_run(shared, Run(True, 32, 0.0, 0))
    losses = [loss for _, loss in record["curve"]]
    assert record["loss"] is None and losses[2:] == [None] * 4 and all(map(math.isfinite, losses[:2]))


def rates(optimizer):
    return {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_control_has_the_rates_of_the_base_width_at_every_width(prepared, optimizer):
    shared = bench(optimizer=optimizer)
    at = {(mup, width): rates(shared.optimizer(shared.model(width, mup)[0], Run(mup, width, 1.0, 0)))
          for mup in (True, False) for width in (32, 64)}  # fmt: skip
    assert at[False, 64] == at[False, 32] == at[True, 32]
    matrix = "transformer.h.0.mlp.c_fc.weight"
    assert at[True, 64][matrix] == pytest.approx(at[True, 32][matrix] * (0.5 if optimizer == "adamw" else 1))
    wide = shared.model(64, False)[0].setup_optimizer()
    assert rates(wide) != at[False, 64]
    use_rates_of(shared.model(32, False)[0].setup_optimizer(), wide)
    assert all(group["initial_lr"] == group["lr"] for group in wide.param_groups)


@pytest.mark.parametrize(
    ("which", "moved"),
    [
        ("all", {"lm_head", "wte", "value_embeds", "c_fc", "x0_lambdas"}),
        ("matrix", {"c_fc"}),
        ("embedding", {"wte", "value_embeds"}),
        ("head", {"lm_head"}),
    ],
)
def test_a_sweep_moves_the_rates_it_names_and_no_others(prepared, which, moved):
    shared = bench(arch="speedrun", sweep=which, depth=2)
    model = shared.model(64, True)[0]
    base, swept = (rates(shared.optimizer(model, Run(True, 64, log2, 0))) for log2 in (0.0, 2.0))
    changed = {name for name in base if swept[name] != base[name]}
    for part in ("lm_head", "wte", "value_embeds", "c_fc", "x0_lambdas"):
        names = {name for name in base if part in name}
        assert names and (names <= changed if part in moved else not names & changed)
    assert all(swept[name] == pytest.approx(4 * base[name]) for name in changed)


# ---- sharing


def runs_of(*widths):
    return [Run(True, width, rate, seed) for seed in (0, 1) for width in widths for rate in (0.0, 1.0)]


def test_a_run_belongs_to_one_process_and_is_free_again_when_that_ends(tmp_path):
    run, other = runs_of(32)[:2]
    with claim(tmp_path, run) as mine, claim(tmp_path, run) as again, claim(tmp_path, other) as free:
        assert (mine, again, free) == (True, False, True)
    with claim(tmp_path, run) as mine:
        assert mine
        sweep.append_run(tmp_path, {**run._asdict(), "loss": 1.0})
    with claim(tmp_path, run) as mine:
        assert not mine  # it is made
    assert list(in_turn(tmp_path, runs_of(32), set())) == runs_of(32)[1:]


def test_processes_leave_the_models_of_others_for_last(tmp_path):
    runs = runs_of(32, 64, 96)
    assert list(in_turn(tmp_path, runs, set())) == runs  # seed by seed
    with claim(tmp_path, runs[0]), claim(tmp_path, runs[2]):  # widths 32 and 64
        order = list(in_turn(tmp_path, runs, {(True, 64)}))
    assert order == [run for run in runs if run.width != 32] + [run for run in runs if run.width == 32]


def share(rank, environment, folder, names):
    os.environ.update(environment)  # the server that processes are forked from may be older than the test
    settings = SweepSettings(**TINY)
    text = open_text(settings)
    sweep.open_folder(folder, sweep.recipe(settings, text.identity))
    ours = Bench(settings, text, CPU)
    for run in runs_of(32, 48):
        with claim(folder, run) as mine:
            if mine:
                sweep.append_run(folder, train_run(ours, run))
                names.append(str(run))


def test_two_processes_make_each_run_once_and_the_same(prepared, tmp_path):
    with mp.get_context("forkserver").Manager() as manager:
        names = manager.list()
        mp.start_processes(share, (dict(os.environ), tmp_path, names), nprocs=2, start_method="forkserver")
        assert sorted(names) == sorted(map(str, runs_of(32, 48)))
    alone = bench()
    for run, record in sweep.finished_runs(tmp_path).items():
        assert record["loss"] == train_run(alone, run)["loss"]
