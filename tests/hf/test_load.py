"""nanochat.hf.load and the two scripts: a checkpoint goes out and comes back as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.checkpoint import load_model
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.hf.load import load
from nanochat.paths import checkpoint_dir, tokenizer_dir
from scripts import chat_cli, export_hf, import_hf
from tests.checkpoints import save_checkpoint
from tests.hf.conftest import ARCHS, meta_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ARCHS)
def test_the_same_checkpoint_comes_back(name, store, tokenizer, make_model, tmp_path, capsys):
    model = make_model(name, n_layer=2)
    meta = meta_of(model, tokenizer)
    tokenizer.save(tokenizer_dir())
    save_checkpoint(checkpoint_dir("sft", "m"), 7, model, None, meta)
    export_hf.main(export_hf.Settings(model_tag="m", out=tmp_path / "out"))
    tokenizer_dir().rename(tmp_path / "gone")  # it comes from the export alone
    import_hf.main(import_hf.Settings(str(tmp_path / "out"), model_tag="again"))
    again, its_tokenizer, its_meta = load_model("sft", CPU, tag="again")
    assert its_tokenizer.hash == tokenizer.hash
    assert {key: its_meta[key] for key in meta if key not in ("loop", "tag")} == {
        key: meta[key] for key in meta if key not in ("loop", "tag")
    }
    assert again.config == model.config
    for (key, found), (wanted_key, wanted) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert key == wanted_key and torch.equal(found, wanted)
    chat_cli.main(chat_cli.Settings(model_tag="again", prompt="hi", max_tokens=3, device_type="cpu"))
    assert "chat_cli -i sft -g again" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds checkpoints already: choose another --model-tag"):
        import_hf.main(import_hf.Settings(str(tmp_path / "out"), model_tag="again"))


def test_a_model_of_others(exports, tokenizer, tmp_path, store):
    """In several files, and without nanochat.json."""
    model, folder = exports("nanochat")
    shutil.copytree(folder, tmp_path / "theirs")
    (tmp_path / "theirs" / "nanochat.json").unlink()
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    for part in range(2):
        names = sorted(weights)[part::2]
        save_file({name: weights[name] for name in names}, tmp_path / "theirs" / f"model-0000{part}-of-2.safetensors")
    found, its_tokenizer, about = load(tmp_path / "theirs")
    assert found.config == model.config and its_tokenizer.hash == tokenizer.hash and about == {}
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    with pytest.raises(UserError, match="give --stage and --model-tag"):
        import_hf.main(import_hf.Settings(str(tmp_path / "theirs")))
    import_hf.main(import_hf.Settings(str(tmp_path / "theirs"), stage="base", model_tag="x"))
    assert isinstance(load_model("base", CPU, tag="x")[0], GPT)


def damaged(name: str, **changes):
    def change(folder) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json is damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no model for nanochat: KeyError: 'model'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks 26 weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors is damaged"),
        (damaged("config.json", model_type="llama"), "model_type is 'llama', expected nanochat or nanochat_gpt"),
        (damaged("config.json", hidden_act="silu"), "hidden_act is 'silu', nanochat computes with 'relu2'"),
        (
            damaged("config.json", hidden_size=128, intermediate_size=512, head_dim=32),
            r"is \(.*\), the model has \(.*\)",
        ),
        (damaged("nanochat.json", stage="final"), "nanochat.json is damaged"),
        (damaged("nanochat.json", step="7"), "nanochat.json is damaged"),
    ],
)
def test_what_cannot_be_imported(damage, message, exports, tmp_path):
    _, folder = exports("nanochat")
    shutil.copytree(folder, tmp_path / "it")
    if "nanochat.json" not in message:
        (tmp_path / "it" / "nanochat.json").unlink()
    damage(tmp_path / "it")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "it")
    assert "\n" not in str(caught.value)


def test_what_is_no_folder(store):
    with pytest.raises(UserError, match="no such folder, and no OWNER/NAME of the hub"):
        import_hf.main(import_hf.Settings("nowhere"))
