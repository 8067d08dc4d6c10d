"""Ablations: the training of scripts.base_train on rows that all runs share."""

import json
from pathlib import Path

import pytest

from benchmarks import ablate
from nanochat.errors import UserError
from nanochat.files import read_jsonl
from nanochat.paths import run_dir
from scripts import base_train
from tests.scripts.test_base_train import SMALL, prepared

__all__ = ["prepared"]
FLAGS = "--depth=1 --aspect-ratio=32 --head-dim=32 --device-batch-size=4"


def test_a_run_is_that_of_base_train_and_is_made_once(prepared, tmp_path, capsys):
    features = {"arch": "ngram", "ngram_slots": 1, "long_window": 16, "short_window": 8}
    base_train.main(base_train.Settings(**{**SMALL, **features, "eval_every": -1}))
    section = json.loads((run_dir() / "report" / "base_train.json").read_text())
    runs, out = tmp_path / "runs.txt", tmp_path / "out.jsonl"
    line = f"--arch=ngram --ngram-slots=1 --long-window=16 --short-window=8 {FLAGS}"
    runs.write_text(f"{line}\n{line} --seed=43\n\n--arch=nanochat {FLAGS}\n")
    settings = ablate.Settings(
        runs=runs,
        source="pydocs",
        out=out,
        steps=6,
        total_batch_size=256,
        max_seq_len=32,
        eval_tokens=512,
        device_type="cpu",
    )
    ablate.main(settings)
    records = read_jsonl(out)
    assert [record["run"] for record in records] == runs.read_text().replace("\n\n", "\n").splitlines()
    assert records[0]["bpb"] == pytest.approx(section["metrics"]["final val_bpb"], rel=1e-6)
    assert len({record["bpb"] for record in records}) == 3
    ablate.main(settings)
    assert read_jsonl(out) == records


def bench(tmp_path):
    shape = {"steps": 6, "total_batch_size": 256, "max_seq_len": 32, "eval_tokens": 512, "device_type": "cpu"}
    return ablate.Bench(ablate.Settings(runs=tmp_path, source="pydocs", **shape))


def test_what_has_no_flag_is_changed_and_nothing_else(prepared, tmp_path):
    shared, base = bench(tmp_path), f"--arch=speedrun --long-window=16 --short-window=8 {FLAGS} --weight-decay=.1"
    plain = shared.run(base)
    given = "momentum=.85:.95:300 matrices.beta2=.95 embedding.beta2=.95 head.warmdown=.45 x0_lambdas=0 wte.init=1"
    assert shared.run(f"{base} {given} batch=256")["bpb"] == plain["bpb"]  # to the last bit
    changes = (
        "x0_lambdas=.2:.05",
        "c_fc.init=.5",
        "embedding.beta2=.5",
        "matrices.beta2=.5",
        "embedding.lr=.5",
        "matrices.warmdown=.9",
        "momentum=.2:.9:5",
        "decay=cosine",
        "equilibrate=1",
        "average=.5",
        "batch=128",
        "passes=2",
    )
    scores = [shared.run(f"{base} {change}")["bpb"] for change in changes]
    assert len({plain["bpb"], *scores}) == 1 + len(changes)
    assert shared.run(base)["bpb"] == plain["bpb"]


@pytest.mark.parametrize("word", ["typo=1", "matrices.typo=1", "typo.lr=1", "momentum", "batch=100", "batch=x"])
def test_changes_that_there_are_not(prepared, tmp_path, word):
    with pytest.raises(UserError) as error:
        bench(tmp_path).recipe(f"{FLAGS} {word}")
    assert word in str(error.value) and "\n" not in str(error.value)


def test_all_changes_of_the_list_are_known(prepared, tmp_path):
    shared = bench(tmp_path)
    lines = [line for line in Path("benchmarks/ablations.txt").read_text().splitlines() if line and line[0] != "#"]
    for line in lines:
        if not line.startswith("batch="):
            shared.recipe(f"--arch=ngram --depth=8 {line}")
    assert len(lines) == len(set(lines)) > 50
