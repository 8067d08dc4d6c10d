"""scripts/make_eval_bundle.py, base_loss.py and base_eval.py on a tiny store: real shards, tokenizer and model."""

import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import cli, dataset, report
from nanochat.data import sources
from nanochat.errors import UserError
from nanochat.eval import baselines
from nanochat.eval.bundle import load_bundle
from nanochat.eval.samples import PROMPTS
from nanochat.files import read_jsonl
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import checkpoint_dir, get_base_dir, run_dir, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes
from scripts import base_eval, base_loss, make_eval_bundle
from tests.checkpoints import save_checkpoint
from tests.eval.test_offline_bundle import document


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[Path, str]:
    """A base dir with the shards of a local source, a tokenizer trained on it and a checkpoint; and the source."""
    folder = tmp_path_factory.mktemp("store")
    texts = folder / "texts"
    texts.mkdir()
    for shard in range(2):  # the last one is for validation
        documents = [document(100 * shard + number) for number in range(100)]
        pq.write_table(pa.table({"text": documents}), texts / f"shard_{shard:05d}.parquet", row_group_size=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        source = f"local:{texts}"
        dataset.main(dataset.Settings(source=source))
        tokenizer = RustBPETokenizer.train_from_iterator(sources.iter_documents(source, "train"), 400)
        tokenizer.save(tokenizer_dir())
        config = GPTConfig(
            sequence_len=128, vocab_size=tokenizer.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32
        )
        model = GPT(config)
        model.init_weights(head_std=0.0)
        meta = {"model_config": vars(config), "settings": {"source": source}, "tokenizer_hash": tokenizer.hash}
        save_checkpoint(checkpoint_dir("base", "d1"), 7, model, None, meta)
    return folder / "base", source


@pytest.fixture
def trained(store, monkeypatch) -> str:
    """The source of the store; its checkpoint is an untrained model, whose loss is ln V exactly."""
    base, source = store
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")
    return source


def section(stage: str) -> dict:
    found = next(section for section in report.read_sections(run_dir()) if section["stage"] == stage)
    return {**found, "notes": report.notes(found)}


def test_base_loss_of_an_untrained_model(trained, capsys):
    base_loss.main(base_loss.Settings(split_tokens=4096, device_batch_size=5, device_type="cpu"))
    found = section("base_loss")
    sizes = get_token_bytes().numpy()
    splits = {row[0]: row for row in found["tables"][0]["rows"]}
    for split in ("train", "val"):
        _, value, stderr, tokens, size = splits[split]
        assert value == pytest.approx(np.log2(len(sizes)) * tokens / size, rel=1e-5)  # ln V nats a token
        assert 0 < stderr < 0.2 * value and 3000 < tokens <= 4096
    predictors = dict(found["tables"][1]["rows"])
    assert predictors["this model"] == found["metrics"]["val_bpb"] == splits["val"][1]
    assert predictors["xz -9e"] < predictors["byte 3-gram (Witten-Bell)"] < predictors["order-0 bytes"] < 8
    assert [sample["prompt"] for sample in found["samples"]] == [*PROMPTS, "", ""]
    for sample in found["samples"]:
        assert sample["text"].startswith(sample["prompt"])
    (path,) = (get_base_dir() / "base_loss").glob("*.jsonl")
    lines = read_jsonl(path)
    for kind in ("", "_in_full"):
        nats, size = (sum(line[f"{name}{kind}"] for line in lines) for name in ("nats", "bytes"))
        assert nats / size / np.log(2) == pytest.approx(found["metrics"][f"val_bpb{kind}"], rel=1e-6)
    assert len({line["document"] for line in lines}) == len(lines) > 10
    documents = found["tables"][3]["rows"]  # all share some: they are generated from a few templates
    assert [row[0] for row in documents] == ["with some"] and "val_bpb_without_overlap" not in found["metrics"]
    assert documents[0][4] == splits["val"][4] and 0 < found["metrics"]["val_overlap"] < 0.5
    assert trained in found["notes"][0] and f"{found['facts']['lines']:,} lines" in found["notes"][2]
    assert found["synthetic"] is False
    assert "xz -9e" in capsys.readouterr().out


def test_a_row_file_is_scored_as_the_rows_it_was_written_from(trained, tmp_path, capsys):
    settings = base_loss.Settings(split_tokens=4096, device_batch_size=5, device_type="cpu")
    base_loss.main(replace(settings, write_rows=tmp_path / "rows.npy"))
    written = section("base_loss")
    base_loss.main(replace(settings, rows=tmp_path / "rows.npy", device_batch_size=3))
    scored = section("base_loss_rows")
    kinds = written["tables"][2]["rows"]
    assert (kinds[0][0], kinds[-1][0]) == ("packed rows", "documents in full")
    for before, after in zip(kinds, scored["tables"][0]["rows"], strict=True):
        assert after == [before[0], pytest.approx(before[1]), pytest.approx(before[2]), *before[3:]]
    assert scored["metrics"]["rows_bpb"] == pytest.approx(written["metrics"]["val_bpb"])
    assert scored["metrics"]["rows_bpb_in_full"] == pytest.approx(written["metrics"]["val_bpb_in_full"])
    assert scored["notes"] == ["Standard errors are over documents."] and "documents in full" in written["notes"][0]
    assert "rows.npy, packed rows" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--rows=\S+absent\.npy: cannot be read"):
        base_loss.main(replace(settings, rows=tmp_path / "absent.npy"))
    with pytest.raises(UserError, match="expected one of them"):
        base_loss.main(replace(settings, rows=tmp_path / "rows.npy", write_rows=tmp_path / "other.npy"))


def test_baselines_see_exactly_the_bytes_that_the_model_is_scored_on(trained):
    tokenizer = RustBPETokenizer.from_directory(tokenizer_dir())
    sizes = get_token_bytes().numpy()
    rows = base_loss.TextData(trained, tokenizer).fixed_rows("val", 128, 4096)
    text = baselines.scored_bytes(tokenizer, rows, sizes)
    assert len(text) == sizes[rows[:, 1:].astype(np.int64)].sum()
    assert b"<|bos|>" not in text
    table = baselines.baselines(b"abc", text)
    assert table["xz -9e after train text"] <= table["xz -9e"]
    assert table["xz -9e"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def test_base_eval_on_a_generated_bundle(trained, capsys):
    make_eval_bundle.main(make_eval_bundle.Settings(source=trained))
    base_eval.main(base_eval.Settings(max_per_task=20, device_type="cpu"))
    found = section("base_eval")
    name = "CORE-offline (6 tasks)"
    assert found["title"].startswith(name) and found["synthetic"] is True
    table = found["tables"][0]
    assert {row[3] for row in table["rows"]} == {20}
    centered = [row[table["columns"].index("Centered")] for row in table["rows"]]
    assert found["metrics"][name] == pytest.approx(sum(centered) / 6)
    assert found["metrics"][f"{name} standard error"] > 0
    written = get_base_dir() / "base_eval" / "d1_000007.csv"
    assert written.read_text().splitlines()[-1].startswith(name)
    assert len(written.with_suffix(".jsonl").read_text().splitlines()) == 120
    assert name in capsys.readouterr().out


def test_a_published_bundle_is_never_replaced_by_a_generated_one(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_eval_bundle, "eval_bundle_dir", lambda: tmp_path / "eval_bundle")
    (tmp_path / "eval_bundle").mkdir()  # a run of the pipeline starts with an empty folder of its own
    make_eval_bundle.main(make_eval_bundle.Settings(source=trained))
    assert load_bundle(tmp_path / "eval_bundle").kind == "offline"
    origin = tmp_path / "origin"
    (origin / "eval_data").mkdir(parents=True)
    entry = "{label: copa, dataset_uri: copa.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}"
    (origin / "core.yaml").write_text(f"icl_tasks: [{entry}]\n")
    (origin / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncopa,50\n")
    (origin / "eval_data" / "copa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    make_eval_bundle.main(make_eval_bundle.Settings(from_dir=origin))
    assert load_bundle(tmp_path / "eval_bundle").kind == "published"
    assert "source" not in section("eval_bundle")["settings"]  # the report's title would name it as used
    make_eval_bundle.main(make_eval_bundle.Settings(source=trained))
    assert load_bundle(tmp_path / "eval_bundle").kind == "published"
    assert "kept" in capsys.readouterr().out


def test_user_mistakes_are_one_line(trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="expected fineweb-edu"):
        base_loss.main(base_loss.Settings(source="nowhere", device_type="cpu"))
    with pytest.raises(UserError, match=r"core\.yaml is missing"):
        make_eval_bundle.main(make_eval_bundle.Settings(from_dir=tmp_path))
    monkeypatch.setattr(base_eval, "eval_bundle_dir", lambda: tmp_path)
    with pytest.raises(UserError, match="no evaluation bundle"):
        base_eval.main(base_eval.Settings(device_type="cpu"))
    foreign = tmp_path / "eval_bundle"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    monkeypatch.setattr(make_eval_bundle, "eval_bundle_dir", lambda: foreign)
    with pytest.raises(UserError, match="holds no"):
        make_eval_bundle.main(make_eval_bundle.Settings(source=trained))
    assert (foreign / "notes.txt").exists()


@pytest.mark.parametrize("script", [base_loss, base_eval, make_eval_bundle])
def test_flags_in_both_spellings(script):
    words = {
        base_loss: ["--device_batch_size=4", "--split-tokens=2e6", "--model-tag", "d4", "--model_step=3"],
        base_eval: ["--max-per-task=10", "--device-batch-size=2", "--device-type=cpu", "--stage=sft"],
        make_eval_bundle: ["--source=local:/x", "--from-dir=/y"],
    }[script]
    parsed = cli.parse(script.Settings, words)
    assert parsed != script.Settings()
    with pytest.raises(SystemExit):
        cli.parse(script.Settings, ["--devize-type=cpu"])
