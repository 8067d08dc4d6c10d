"""The tokenizer benchmark on a little text: what it compares, and what it says of tokenizers that are missing."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import tokenizer as benchmark
from nanochat.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh é", k=rng.randint(1, 9))) for _ in range(3000)]
    for shard in range(2):
        texts = [" ".join(rng.choices(words, k=2000)) + f" {rng.random()}\n" for _ in range(120)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard:05d}.parquet")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["default", "gpt4", "gpt2"])
def test_outputs_are_compared_and_what_is_missing_is_said(source, tmp_path, capsys, pattern):
    out = tmp_path / "out.json"
    settings = benchmark.Settings(
        source=source, out=str(out), pattern=pattern, vocab_size=600, megabytes=1, held_out_megabytes=1, threads=2,
        repeats=1,
    )  # fmt: skip
    benchmark.main(settings)
    rows = json.loads(out.read_text())["rows"]
    measured = {(row["what"], row["tokenizer"], row["threads"]): row for row in rows}
    for key in [
        ("train", "ours", 1),
        ("train", "tokenizers", 2),
        ("encode one by one", "tiktoken", 1),
        ("encode batch", "tokenizers", 1),
        ("encode batch, arrays", "ours", 2),
    ]:
        assert measured[key]["same"], key
    assert measured["train", "rustbpe", 1]["error"] == "not installed"
    assert measured["encode", "gigatoken", 1]["error"]
    assert "not installed" in capsys.readouterr().out


def test_too_little_text_is_an_error(source, tmp_path):
    settings = benchmark.Settings(source=source, megabytes=500)
    with pytest.raises(UserError, match="500 MB are asked for"):
        benchmark.main(settings)
    with pytest.raises(UserError, match="no parquet files"):
        benchmark.main(benchmark.Settings(source=str(tmp_path)))
