import json
import shutil

import pytest
import torch

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import checkpoint_dir, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer

TEXT = ["the quick brown fox jumps over the lazy dog " * 20]


def small(seed=1):
    model = GPT(GPTConfig(sequence_len=16, vocab_size=270, n_layer=1, n_head=1, n_kv_head=1, n_embd=16))
    model.init_weights(seed=seed)
    return model


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = RustBPETokenizer.train_from_iterator(TEXT, 270)
    tokenizer.save(tokenizer_dir())
    return tokenizer


def save(tag, step, model, tokenizer, stage="base"):
    config = {"sequence_len": 16, "vocab_size": 270, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 16}
    meta = {"tokenizer_hash": tokenizer.hash, "model_config": config, "settings": {}}
    return checkpoint.save(checkpoint_dir(stage, tag), step, model, None, meta)


def test_round_trip(tokenizer):
    model = small()
    save("d1", 7, model, tokenizer)
    loaded, _, meta = checkpoint.load_model("base", torch.device("cpu"), tag="d1")
    assert meta["step"] == 7 and meta["tag"] == "d1" and not loaded.training
    idx = torch.randint(270, (2, 10))
    assert torch.equal(loaded(idx), model.eval()(idx))


def test_last_step_of_the_newest_run_is_the_default_and_uncommitted_ones_do_not_exist(tokenizer):
    save("a", 3, small(), tokenizer)
    save("b", 2, small(), tokenizer)
    path = save("b", 10, small(), tokenizer)
    (path / "COMMITTED").unlink()
    _, _, meta = checkpoint.load_model("base", torch.device("cpu"))
    assert (meta["tag"], meta["step"]) == ("b", 2)


def test_rewriting_a_step_leaves_one_whole_folder(tokenizer):
    save("a", 3, small(), tokenizer)
    path = save("a", 3, small(seed=2), tokenizer)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_000003"]


def test_optimizer_state_returns_under_its_names(tokenizer, tmp_path):
    model, other = small(), small()
    optimizers = [m.setup_optimizer() for m in (model, other)]
    for _ in range(2):
        model(torch.randint(270, (2, 8)), torch.randint(270, (2, 8))).backward()
        optimizers[0].step()
    checkpoint.save(tmp_path / "x", 2, model, optimizers[0], {})
    checkpoint.load_optimizer(tmp_path / "x", 2, optimizers[1], 2)
    assert optimizers[1].num_steps == 2
    for name, tensor in optimizers[0].named_state().items():
        assert torch.equal(tensor, optimizers[1].named_state()[name])
    assert any(tensor.abs().max() > 0 for tensor in optimizers[1].named_state().values())


@pytest.mark.parametrize(
    ("name", "content"),
    [("meta.json", b"{"), ("meta.json", b"[]"), ("model.safetensors", b"garbage"), ("model.safetensors", None)],
)
def test_damaged_files_are_one_line_errors(tokenizer, name, content):
    path = save("a", 3, small(), tokenizer) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        checkpoint.load_model("base", torch.device("cpu"))


def test_truncated_weights_and_state(tokenizer, tmp_path):
    path = save("a", 3, small(), tokenizer) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_model("base", torch.device("cpu"))
    model = small()
    optimizer = model.setup_optimizer()
    folder = checkpoint.save(tmp_path / "x", 1, model, optimizer, {})
    for file in (folder / "state").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match="state is damaged"):
        checkpoint.load_optimizer(tmp_path / "x", 1, optimizer, 1)


def test_newer_format_and_other_model(tokenizer):
    folder = save("a", 3, small(), tokenizer).parent
    meta = folder / "step_000003" / "meta.json"
    document = json.loads(meta.read_text())
    meta.write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load_model("base", torch.device("cpu"))
    meta.write_text(json.dumps({**document, "model_config": {**document["model_config"], "n_embd": 32}}))
    with pytest.raises(UserError, match=r"weight is \(270, 16\), the model has \(270, 32\)"):
        checkpoint.load_model("base", torch.device("cpu"))


def test_other_tokenizer_is_refused(tokenizer):
    save("a", 3, small(), tokenizer)
    RustBPETokenizer.train_from_iterator(["completely different words and letters " * 9], 270).save(tokenizer_dir())
    with pytest.raises(UserError, match="trained with tokenizer"):
        checkpoint.load_model("base", torch.device("cpu"))


@pytest.mark.parametrize(
    ("tag", "step", "message"),
    [(None, None, "run `python -m scripts.base_train` first"), ("zz", None, "tagged zz.*there are: none")],
)
def test_nothing_there(tokenizer, tag, step, message):
    with pytest.raises(UserError, match=message):
        checkpoint.load_model("base", torch.device("cpu"), tag=tag, step=step)


def test_wrong_tag_or_step_lists_what_exists(tokenizer):
    save("a", 3, small(), tokenizer)
    with pytest.raises(UserError, match="there are: a"):
        checkpoint.load_model("base", torch.device("cpu"), tag="zz")
    with pytest.raises(UserError, match="there are: step 3"):
        checkpoint.load_model("base", torch.device("cpu"), step=4)


def test_a_failed_save_leaves_the_earlier_checkpoint_and_no_litter(tokenizer, monkeypatch):
    folder = save("a", 3, small(), tokenizer).parent

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save("a", 4, small(), tokenizer)
    assert [p.name for p in folder.iterdir()] == ["step_000003"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tokenizer, monkeypatch):
    folder = save("a", 3, small(), tokenizer).parent
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(UserError, match="disk full: the checkpoint needs"):
        save("a", 4, small(), tokenizer)
    assert [p.name for p in folder.iterdir()] == ["step_000003"]


def test_rng_state_round_trip():
    import random

    import numpy as np

    state = json.loads(json.dumps(checkpoint.rng_state()))
    draws = (torch.rand(3), random.random(), np.random.rand())
    checkpoint.set_rng_state(state)
    again = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(draws[0], again[0]) and draws[1:] == again[1:]


def test_set_aside_never_overwrites(tmp_path):
    for expected in ("d1.1", "d1.2"):
        (tmp_path / "d1").mkdir()
        assert checkpoint.set_aside(tmp_path / "d1").name == expected
