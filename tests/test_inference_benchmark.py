"""The benchmark of decoding, with a tiny model on the CPU."""

import json

import pytest

from benchmarks import inference
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import REPO

TINY = {"depth": 1, "aspect_ratio": 32, "head_dim": 16, "vocab_size": 64, "max_seq_len": 64, "device_type": "cpu",
        "context": 6, "new_tokens": 4, "batch_sizes": "1,3"}  # fmt: skip


def test_each_batch_size_is_measured_and_a_program_beside_it(tmp_path, capsys):
    out = tmp_path / "out.json"
    inference.main(inference.Settings(**TINY, out=str(out), peer=REPO))  # we are of this family, too
    result = json.loads(out.read_text())
    assert [row["batch_size"] for row in result["rows"]] == [row["batch_size"] for row in result["peer"]] == [1, 3]
    for row in result["rows"] + result["peer"]:
        assert 0 < row["token_ms"] < 1e4 and row["first_ms"] > 0 and row["memory_gib"] > 0 and row["mbu"] is None
        assert row["tokens_per_second"] == pytest.approx(1000 * row["batch_size"] / row["token_ms"])
    assert {"device", "torch", "date", "settings", "dtype", "parameters"} <= set(result)
    printed = capsys.readouterr().out
    assert "batch 3: first token" in printed and "peer: batch 1" in printed


def test_bytes_are_those_that_must_be_read():
    """Against numbers counted by hand: two layers, one of which looks back 2 positions."""
    config = {"sequence_len": 64, "vocab_size": 100, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**config, window_pattern="SL", short_window=2))
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 4 * 32 * 32  # queries, keys and values, output, MLP
    weights = 2 * block + 100 * 32 + sum(p.numel() for p in model.parameters() if p.ndim < 2)
    # steps behind a prompt of 5: of 6, 7 and 8 positions; of which the first layer sees its own and two more
    positions = (6 + 7 + 8) / 3 + 3
    for rows in (1, 10):
        assert inference.step_bytes(model, rows, 5, 4) == 4 * (weights + rows * 2 * 2 * 8 * positions)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({"batch_sizes": "1,x"}, "--batch-sizes"), ({"batch_sizes": "0"}, "--batch-sizes"),
     ({"context": 61}, "--max-seq-len"), ({"peer": REPO / "docs"}, "no nanochat/gpt.py")],
)  # fmt: skip
def test_mistakes_are_one_line(changes, wanted):
    with pytest.raises(UserError, match=wanted):
        inference.main(inference.Settings(**TINY | changes))
