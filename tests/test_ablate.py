"""Ablations: the training of scripts.base_train on rows that all runs share."""

import json

import pytest

from benchmarks import ablate
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
