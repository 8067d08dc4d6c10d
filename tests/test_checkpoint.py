import json
import math
import os
import runpy
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import checkpoint_dir, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer
from tests.checkpoints import save_checkpoint

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
    return save_checkpoint(checkpoint_dir(stage, tag), step, model, None, meta)


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
    save_checkpoint(tmp_path / "x", 2, model, optimizers[0], {})
    checkpoint.load_optimizer(tmp_path / "x", 2, optimizers[1], 2)
    assert optimizers[1].num_steps == 2
    for name, tensor in optimizers[0].named_state().items():
        assert torch.equal(tensor, optimizers[1].named_state()[name])
    assert any(tensor.abs().max() > 0 for tensor in optimizers[1].named_state().values())


@pytest.mark.parametrize(
    ("name", "content"),
    [("meta.json", b"{"), ("meta.json", b"[]"), ("model.safetensors", b"garbage"), ("meta.json", None)],
)
def test_damaged_files_are_one_line_errors(tokenizer, name, content):
    path = save("a", 3, small(), tokenizer) / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        checkpoint.load_model("base", torch.device("cpu"))


def flip(path, place=-20):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def load(**which):
    return checkpoint.load_model("base", torch.device("cpu"), **which)[2]["step"]


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "state/.metadata", "state/__0_0.distcp"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(tokenizer, capsys, name):
    save("a", 3, small(), tokenizer)
    path = save("a", 5, small(), tokenizer)
    if name.startswith("state/"):
        (path / "model.safetensors").unlink()
    (path.parent / checkpoint.COMPLETE).touch()
    flip(path / name)
    with pytest.raises(UserError, match=rf"{name.partition('/')[0]} is damaged .*take another step"):
        load(step=5)
    assert path.exists()  # a step that is asked for stays where it is
    capsys.readouterr()
    assert load() == 3
    out = capsys.readouterr().out
    assert f"{path}" in out and "kept as step_000005.damaged.1, step 3 is used" in out
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_000003", "step_000005.damaged.1"]
    assert (path.parent / "step_000005.damaged.1" / name).exists()
    assert load() == 3 and "damaged" not in capsys.readouterr().out


def test_where_nothing_is_whole_nothing_is_moved(tokenizer):
    folders = [save("a", step, small(), tokenizer) for step in (3, 5)]
    for path in folders:
        flip(path / "model.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=r"step_000005/model\.safetensors is damaged"):
            load()
    assert all(path.exists() for path in folders)


@pytest.mark.parametrize("name", ["meta.json", "model.safetensors", "COMMITTED", "state/__0_0.distcp", "more"])
def test_what_is_no_file_is_damage_and_not_read_for_ever(tokenizer, name):
    path = save("d1", 3, small(), tokenizer)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(UserError, match=f"is damaged .beside it {(path / name).name} is no file") as caught:
        checkpoint.load_model("base", torch.device("cpu"), tag="d1", step=3)
    assert "\n" not in str(caught.value)


def test_weights_of_whole_numbers_are_refused(tokenizer):
    path = save("d1", 3, small(), tokenizer) / "model.safetensors"
    weights = {name: tensor.to(torch.int8) for name, tensor in small().state_dict().items()}
    save_file(weights, path)
    (path.parent / "COMMITTED").write_bytes(b"")  # as before there were checksums
    with pytest.raises(UserError, match="is I8, no floating-point numbers"):
        checkpoint.load_model("base", torch.device("cpu"), tag="d1", step=3)


def test_in_a_store_that_may_only_be_read_the_damaged_one_is_passed_over(tokenizer, monkeypatch, capsys):
    save("a", 3, small(), tokenizer)
    flip(save("a", 5, small(), tokenizer) / "model.safetensors")
    monkeypatch.setattr(checkpoint, "set_aside", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert load() == 3
    assert "left where it is (Permission denied), step 3 is used" in capsys.readouterr().out


def test_what_training_changes_while_it_is_read_is_no_damage(tokenizer, monkeypatch):
    save("a", 3, small(), tokenizer)
    path = save("a", 5, small(), tokenizer)
    real = checkpoint.sha256_file

    def amended_meanwhile(file):
        monkeypatch.setattr(checkpoint, "sha256_file", real)
        checkpoint.update_meta(path.parent, 5, {"val_bpb": 1.5})
        return real(file)

    monkeypatch.setattr(checkpoint, "sha256_file", amended_meanwhile)
    assert load() == 5

    def deleted_meanwhile(file):
        checkpoint.discard(path)
        return real(file)

    monkeypatch.setattr(checkpoint, "sha256_file", deleted_meanwhile)
    with pytest.raises(UserError):  # the mock deletes whatever is read next, too
        load(step=5)
    assert load() == 3 and sorted(p.name for p in path.parent.iterdir()) == ["step_000003"]


def test_committed_is_what_sha256sum_reads_and_follows_later_changes(tokenizer):
    path = save("a", 3, small(), tokenizer)
    (path / "model.safetensors").unlink()
    checkpoint.export(path.parent, 3)
    checkpoint.update_meta(path.parent, 3, {"val_bpb": 1.5})
    run = subprocess.run(["sha256sum", "-c", "COMMITTED"], cwd=path, capture_output=True, text=True, check=True)
    names = ["meta.json", "model.safetensors", "state/.metadata", "state/__0_0.distcp"]
    assert sorted(run.stdout.splitlines()) == [f"{name}: OK" for name in names]


def test_killed_while_meta_is_amended(tokenizer, monkeypatch):
    path = save("a", 3, small(), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_write_text", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.update_meta(path.parent, 3, {"val_bpb": 1.5})
    assert load() == 3
    checkpoint.update_meta(path.parent, 3, {"val_bpb": 1.5})
    assert load() == 3


def test_a_checkpoint_from_before_there_were_checksums(tokenizer, capsys):
    save("a", 3, small(), tokenizer)
    path = save("a", 5, small(), tokenizer)
    (path / "COMMITTED").write_bytes(b"")
    checkpoint.update_meta(path.parent, 5, {"val_bpb": 1.5})
    checkpoint.export(path.parent, 5)
    assert (path / "COMMITTED").read_bytes() == b"" and load() == 5
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-50])  # what shows without
    assert load() == 3 and "kept as step_000005.damaged.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"x", b"0" * 64 + b"  ../../../secret\n", b"0" * 64 + b"  x\n", b"00  meta.json\n"]
)
def test_committed_that_is_garbage(tokenizer, content):
    (save("a", 3, small(), tokenizer) / "COMMITTED").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        load()


ODD = [10**9, 10**30, -1, 0, -(10**30), 1.5, math.nan, math.inf, True, None, "x", "", [], [[]], {}, {"x": 1}]
CONFIG = tuple(asdict(GPTConfig()))


def one_line(document, tokenizer_hash=None):
    """meta.json without checksums, as a stranger would write it: what loading says, at once."""
    path = checkpoint_dir("base", "a") / "step_000003"
    (path / "COMMITTED").write_bytes(b"")
    (path / "meta.json").write_text(document if isinstance(document, str) else json.dumps(document))
    started = time.monotonic()
    try:
        load()
        said = ""
    except UserError as error:
        said = str(error)
    assert time.monotonic() - started < 10 and "\n" not in said and len(said) < 600
    return said


def test_any_value_anywhere_in_meta_is_one_line_and_no_hang(tokenizer):
    document = json.loads((save("a", 3, small(), tokenizer) / "meta.json").read_text())
    for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"):
        for value in ODD:
            changed = {**document, "model_config": {**document["model_config"], name: value}}
            assert one_line(changed), (name, value)
    for name in CONFIG:
        for value in ODD:
            one_line({**document, "model_config": {**document["model_config"], name: value}})
    for name in ("format", "step", "model_config", "tokenizer_hash", "settings"):
        assert one_line({key: value for key, value in document.items() if key != name}) or name == "step"
        for value in ODD:
            said = one_line({**document, name: value})
            assert said or (name, value) in (("settings", {}), ("settings", {"x": 1})), (name, value)
    recipe = {"source": "x", "total_batch_size": 8, "matrix_lr": 0.1, "use_muon": True}
    order = {"seed": 2**64 - 1, "files": "a", "positions": [[1, 2, 3]] * 4}
    assert one_line({**document, "recipe": recipe, "loader": order}) == ""
    for name, value in product(recipe, [-1, 10**10, math.nan, math.inf, None, [], "0"]):
        said = one_line({**document, "recipe": {**recipe, name: value}})
        assert said or (name, value) == ("source", "0"), (name, value)
    assert one_line({**document, "recipe": {**recipe, "total_batch_size": 0}})
    for value in (-1, 1.5, math.nan, None, {}, [], True, 10**30, [[1, 2], [3]], [["a"]], [[1, -2]], [[[[]]]]):
        assert one_line({**document, "loader": {**order, "positions": value}}), value
    assert "n_layer is 1000000000, the weights have 1 layers" in one_line(
        {**document, "model_config": {**document["model_config"], "n_layer": 10**9}}
    )
    assert "unexpected keyword argument 'n_moe'" in one_line(
        {**document, "model_config": {**document["model_config"], "n_moe": 1}}
    )


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "", "null", '"x"', "\x00", '{"format": ' + "[" * 5000]
)
def test_meta_that_is_nested_without_end_or_no_object(tokenizer, text):
    save("a", 3, small(), tokenizer)
    assert "meta.json is damaged" in one_line(text)


def test_truncated_weights_and_state(tokenizer, tmp_path):
    path = save("a", 3, small(), tokenizer)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        checkpoint.load_model("base", torch.device("cpu"))
    weights.unlink()
    for file in (path / "state").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match="state is damaged"):
        checkpoint.load_model("base", torch.device("cpu"))
    (path / "state" / ".metadata").write_bytes(b"garbage")
    with pytest.raises(UserError, match="state is damaged"):
        checkpoint.load_model("base", torch.device("cpu"))
    model = small()
    optimizer = model.setup_optimizer()
    folder = save_checkpoint(tmp_path / "x", 1, model, optimizer, {})
    for file in (folder / "state").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match="state is damaged"):
        checkpoint.load_optimizer(tmp_path / "x", 1, optimizer, 1)


def test_weights_come_from_the_parts_where_there_is_no_single_file(tokenizer):
    model = small()
    (save("a", 3, model, tokenizer) / "model.safetensors").unlink()
    loaded, _, _ = checkpoint.load_model("base", torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize("single_file", [True, False])
def test_weights_of_another_model_are_refused(tokenizer, tmp_path, single_file):
    folder = tmp_path / "x"
    path = save_checkpoint(folder, 1, small(), None, {})
    if not single_file:
        (path / "model.safetensors").unlink()
    deeper, shallower = (
        GPT(GPTConfig(sequence_len=16, vocab_size=270, n_layer=n, n_head=1, n_kv_head=1, n_embd=16)) for n in (2, 0)
    )
    with pytest.raises(UserError, match=r"lacks 6 tensors: .*, \.\.\."):
        checkpoint.load_weights(folder, 1, deeper)
    with pytest.raises(UserError, match=r"h\.0\..* is \(.*, 16\), the model has None"):
        checkpoint.load_weights(folder, 1, shallower)
    other = GPT(GPTConfig(sequence_len=16, vocab_size=270, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))
    with pytest.raises(UserError, match=r"weight is \(.*\), the model has \(.*32.*\)"):
        checkpoint.load_weights(folder, 1, other)


def test_state_of_another_optimizer_is_refused(tmp_path):
    model = small()
    save_checkpoint(tmp_path / "x", 1, model, None, {})
    with pytest.raises(UserError, match=r"state lacks .* tensors: optimizer"):
        checkpoint.load_optimizer(tmp_path / "x", 1, model.setup_optimizer(), 1)


def test_export_equals_what_safetensors_itself_writes(tokenizer, tmp_path):
    model = small()
    path = save("a", 3, model, tokenizer)
    written_at_once = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").unlink()
    assert checkpoint.export(path.parent, 3) == path / "model.safetensors"
    assert (path / "model.safetensors").read_bytes() == written_at_once
    out = checkpoint.export(path.parent, 3, tmp_path / "out.safetensors")
    assert out.stat().st_mode == (path / "meta.json").stat().st_mode  # safetensors' own are for their owner alone
    save_file(dict(model.state_dict()), tmp_path / "reference.safetensors")
    ours, reference = load_file(out), load_file(tmp_path / "reference.safetensors")
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == torch.float32 and torch.equal(ours[name], tensor)
    with pytest.raises(UserError, match="there are: step 3"):
        checkpoint.export(path.parent, 4)


def command_line(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["checkpoint", *words])
    monkeypatch.delitem(sys.modules, "nanochat.checkpoint", raising=False)  # which it would warn of
    runpy.run_module("nanochat.checkpoint", run_name="__main__")


def test_export_from_the_command_line(tokenizer, tmp_path, monkeypatch, capsys):
    path = save("a", 3, small(), tokenizer)
    save("a", 5, small(seed=2), tokenizer)
    out = tmp_path / "out.safetensors"
    command_line(monkeypatch, "export", "--stage=base", "--tag=a", "--step", "3", "--out", str(out))
    assert out.read_bytes() == (path / "model.safetensors").read_bytes()
    assert f"wrote {out}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        command_line(monkeypatch, "export", "--tag=zz")
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: no base checkpoint tagged zz")


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


@pytest.mark.parametrize("place", ["checkpoints/base/a/tokenizer", "checkpoints/mid/b/tokenizer", "runs/r/tokenizer"])
def test_a_model_is_read_with_the_tokenizer_that_it_was_trained_with(tokenizer, store, place):
    save("a", 3, small(), tokenizer)
    tokenizer.save(store / place)
    RustBPETokenizer.train_from_iterator(["completely different words and letters " * 9], 270).save(tokenizer_dir())
    assert checkpoint.load_model("base", torch.device("cpu"))[1].hash == tokenizer.hash
    damaged = store / "checkpoints/base/a/tokenizer/meta.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text("{")
    tokenizer.save(store / "runs/other/tokenizer")
    assert checkpoint.load_model("base", torch.device("cpu"))[1].hash == tokenizer.hash


@pytest.mark.parametrize(
    ("tag", "step", "message"),
    [(None, None, "run `python -m scripts.base_train` first"), ("zz", None, "tagged zz.*there are none at all")],
)
def test_nothing_there(tokenizer, tag, step, message):
    with pytest.raises(UserError, match=message):
        checkpoint.load_model("base", torch.device("cpu"), tag=tag, step=step)


def test_wrong_tag_or_step_lists_what_exists(tokenizer):
    save("a", 3, small(), tokenizer)
    with pytest.raises(UserError, match="there are base: a"):
        checkpoint.load_model("base", torch.device("cpu"), tag="zz")
    with pytest.raises(UserError, match="there are: step 3"):
        checkpoint.load_model("base", torch.device("cpu"), step=4)


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
