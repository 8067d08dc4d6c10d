"""The pretraining script with the speedrun architecture, muP, token files, and all that looks inside."""

import json

import numpy as np
import pytest
import torch

from nanochat import checkpoint
from nanochat.data.bins import write_tokens
from nanochat.dataloader import open_data
from nanochat.errors import UserError
from nanochat.paths import checkpoint_dir, run_dir, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer
from scripts.base_train import Settings, main
from tests.data.test_text_rows import write_source
from tests.scripts.test_base_train import words

SMALL = {"arch": "speedrun", "depth": 6, "width": 64, "head_dim": 32, "max_seq_len": 32, "device_batch_size": 4,
         "total_batch_size": 256, "num_iterations": 6, "eval_tokens": 512, "core_metric_every": -1, "save_every": 3,
         "sample_every": -1, "eval_every": 3, "source": "pydocs", "device_type": "cpu"}  # fmt: skip


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A store with a small data set and tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")
    documents = [words(seed) for seed in range(24)]
    write_source([documents[:10], documents[10:20], documents[20:]])
    RustBPETokenizer.train_from_iterator(documents, 300).save(tokenizer_dir())
    return tmp_path


@pytest.fixture
def community(prepared):
    """A folder of token files as they are published: no word of a tokenizer."""
    folder = prepared / "tokenized_data" / "fineweb10B"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        tokens = random.integers(0, 50_000, 6_000, dtype=np.uint16)
        tokens[::50] = 50256
        write_tokens(folder / name, tokens)
    return folder


def records():
    return [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]


def bits():
    return [(record["step"], record["Loss/val_bpb"]) for record in records() if "Loss/val_bpb" in record]


def tensors(tag, step=6):
    from nanochat.gpt import GPT, GPTConfig

    folder = checkpoint_dir("base", tag)
    model = GPT(GPTConfig(**checkpoint.read_meta(folder, step)["model_config"]))
    checkpoint.load_weights(folder, step, model)
    return dict(model.named_parameters())


def test_speedrun_under_mup_is_watched_recorded_and_reported(prepared, capsys):
    changes = {"mup": True, "base_width": 32, "monitor_interval": "3", "coord_check": True, "coord_check_every": 2}
    main(Settings(**{**SMALL, **changes, "smear": True, "window_warmup": False, "long_window": 16, "short_window": 8}))
    out = capsys.readouterr().out
    assert "lm_head.weight" in out and "transformer.value_embeds" in out  # the table of what width does
    meta = checkpoint.read_meta(checkpoint_dir("base", "speedrun_d6_w64_mup_base32"), 6)
    assert meta["model_config"]["mup_base_width"] == 32 and meta["recipe"]["scalar_lr"] > 0
    assert meta["settings"]["unet"] is True
    coordinates = [json.loads(line) for line in (run_dir() / "coord_check.jsonl").read_text().splitlines()]
    assert {record["t"] for record in coordinates} == {3, 5, 7} and {record["width"] for record in coordinates} == {64}
    seen = {name for record in records() for name in record}
    for group in ("Model/spectral_norm/0.attn.c_q", "Model/update_ratio/5.mlp.c_fc", "Activations/std/5.mlp",
                  "Optimization/grad_norm", "Hardware/peak_memory_gib", "Loss/val_bpb"):  # fmt: skip
        assert group in seen, sorted(seen)
    section = json.loads((run_dir() / "report" / "base_train.json").read_text())
    (table,) = section["tables"]
    assert any("lm_head" in str(row) for row in table["rows"])


def test_windows_grow_tables_fade_and_a_resumed_run_goes_on_with_them(prepared, monkeypatch, capsys):
    from nanochat.gpt import GPT

    seen = []
    set_window = GPT.set_window
    monkeypatch.setattr(GPT, "set_window", lambda model, long: (seen.append(long), set_window(model, long)))
    settings = {**SMALL, "long_window": 300, "short_window": 150, "max_seq_len": 64, "arch": "ngram", "ngram_slots": 1}
    settings |= {"total_batch_size": 4096, "device_batch_size": 64}  # the text is read more than once
    main(Settings(**settings))
    assert "tables decay" in capsys.readouterr().out
    assert seen == [128, 128, 128, 256, 256, 300]
    whole, losses = tensors("ngram_d6_w64"), bits()
    folder = checkpoint_dir("base", "ngram_d6_w64")
    checkpoint.discard(checkpoint.step_dir(folder, 6))
    (folder / "COMPLETE").unlink()
    seen.clear()
    main(Settings(**{**settings, "resume": "auto"}))
    assert seen[0] == 128 and seen[-3:] == [256, 256, 300]
    assert bits() == losses  # also of step 3, which is evaluated again
    for name, param in tensors("ngram_d6_w64").items():
        assert torch.equal(param, whole[name]), name


def test_looking_inside_and_warming_up_change_nothing(prepared):
    main(Settings(**SMALL, model_tag="plain"))
    watched = {"monitor_interval": "1", "coord_check": True, "coord_check_every": 1, "warm_kernels": True}
    main(Settings(**SMALL, **watched, model_tag="watched"))
    plain, watched = tensors("plain"), tensors("watched")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_token_files_of_others(community, capsys):
    main(Settings(**{**SMALL, "source": "bin:fineweb10B", "depth": 2, "core_metric_every": 2, "sample_every": 2}))
    assert "GPT-2's tokenizer: losses per token, no samples, no CORE" in capsys.readouterr().out
    losses = {r["step"]: r["Loss/val_loss"] for r in records() if "Loss/val_loss" in r}
    assert sorted(losses) == [3, 6] and 8 < losses[6] < np.log(50304) + 0.1
    meta = checkpoint.read_meta(checkpoint_dir("base", "speedrun_d2_w64"), 6)
    assert meta["model_config"]["vocab_size"] == 50304 and meta["model_config"]["document_token"] == 50256
    assert meta["tokenizer_hash"] == "gpt2"
    with pytest.raises(UserError, match="gpt2"):  # a model whose tokens nobody here can read
        checkpoint.load_model("base", torch.device("cpu"))


def test_what_a_source_is(community, prepared):
    folder = open_data(f"bin:{community}")
    assert (folder.vocab_size, folder.document_token, folder.tokenizer) == (50304, 50256, None)
    assert folder.fingerprint and folder.tokenizer_hash == "gpt2"
    text = open_data("pydocs")
    assert text.vocab_size == 300 and text.fingerprint is None and text.tokenizer_hash == text.tokenizer.hash
    with pytest.raises(UserError, match="bin:nowhere"):
        open_data("bin:nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 70}, "--width=70"),
        ({"mup": True, "base_width": 48}, "48"),
        ({"monitor_interval": "often"}, "--monitor-interval=often"),
        ({"fp8": "all", "width": 72, "head_dim": 36}, "--fp8=all"),
    ],
)
def test_mistakes_are_one_line(prepared, changes, message):
    with pytest.raises(UserError, match=message):
        main(Settings(**{**SMALL, **changes}))
