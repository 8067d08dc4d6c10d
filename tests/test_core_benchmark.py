"""The benchmark of CORE, with a tiny model on the CPU."""

import json

import pytest

from benchmarks import core
from nanochat.errors import UserError
from nanochat.tokenizer import RustBPETokenizer
from tests.eval.test_core import make_task, write_bundle

TINY = {"depth": 1, "aspect_ratio": 32, "head_dim": 16, "max_seq_len": 64, "device_type": "cpu", "vocab_size": 400}


def test_three_ways_are_timed_and_answer_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    RustBPETokenizer.train_from_iterator(["alpha beta gamma delta"] * 9, 270).save(tmp_path / "tokenizer")
    kinds = ["multiple_choice", "schema", "language_modeling"]
    bundle = write_bundle(tmp_path / "bundle", [make_task(kind, 9, 2, seed=5) for kind in kinds])
    out = tmp_path / "out.json"
    core.main(core.Settings(**TINY, bundle=bundle, max_per_task=6, out=str(out)))
    result = json.loads(out.read_text())
    assert [row["task"] for row in result["rows"]] == kinds and result["items"] == 18
    assert list(result["seconds"]) == ["single", "batched", "shared"] and min(result["seconds"].values()) > 0
    for row in result["rows"]:
        assert [row["agree"][way]["same"] for way in ("single", "batched")] == [6, 6]
        assert max(one["loss"] for one in row["agree"].values()) < 1e-4
    assert "for 9,345" in capsys.readouterr().out
    with pytest.raises(UserError, match="--ways=shared,all: use some of single,batched,shared"):
        core.main(core.Settings(**TINY, bundle=bundle, ways="shared,all"))
