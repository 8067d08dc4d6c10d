"""foreign.py: a model of a Hugging Face folder, made here, through the evaluator; and folders that are none."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanochat.errors import UserError
from nanochat.eval import foreign
from nanochat.eval.core import evaluate_task
from nanochat.paths import get_base_dir, run_dir
from nanochat.report import read_sections
from scripts import base_eval
from tests.eval.test_core import CPU, make_task, slow_task, values, write_bundle

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of two layers with random weights and one token a byte."""
    path = tmp_path_factory.mktemp("models") / "tiny gpt2"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<|end|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=257, n_positions=96, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_a_foreign_model_is_scored_as_one_prompt_at_a_time(folder, kind):
    model, tokenizer, length = foreign.load(folder, CPU, trust=False)
    assert length == 96 and tokenizer.get_bos_token_id() == 256
    task = make_task(kind, 8, 2)

    class Slow:
        def encode(self, text, prepend):
            return tokenizer.encode([text] if isinstance(text, str) else text, 256)[
                0 if isinstance(text, str) else slice(None)
            ]

    with torch.no_grad():
        expected = slow_task(model, Slow(), task, length)
    found = evaluate_task(model, tokenizer, task, CPU, sequence_len=length)
    assert values(found, "correct") == [correct for correct, _, _ in expected]
    np.testing.assert_allclose(values(found, "loss"), [loss for _, _, loss in expected], rtol=1e-4)


def test_base_eval_of_a_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    write_bundle(tmp_path / "base" / "eval_bundle", [make_task("schema", 6, 1)])
    base_eval.main(base_eval.Settings(hf_path=folder, device_type="cpu"))
    (written,) = (get_base_dir() / "base_eval").glob("hf_tiny-gpt2-*.csv")
    assert len(written.with_suffix(".jsonl").read_text().splitlines()) == 6
    (section,) = read_sections(run_dir())
    assert section["stage"] == "base_eval_hf" and section["title"].endswith("tiny gpt2")
    assert ", 95 % " in capsys.readouterr().out
    for changes in ({"model_tag": "d4"}, {"model_step": 3}, {"stage": "sft"}):
        flag = next(iter(changes)).replace("_", "-")
        with pytest.raises(UserError, match=f"--hf-path=.* and --{flag}: one model"):
            base_eval.main(base_eval.Settings(hf_path=folder, device_type="cpu", **changes))


def test_folders_that_are_no_model_are_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--hf-path=\S+: no config.json"):
        foreign.load(tmp_path, CPU, trust=False)
    config = json.loads((folder / "config.json").read_text())
    for damage in ({"model_type": "nonesuch"}, {}, {"n_layer": "two"}):
        (tmp_path / "config.json").write_text(json.dumps(config | damage if damage else {}))
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            foreign.load(tmp_path, CPU, trust=False)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="needs the package transformers"):
        foreign.load(folder, CPU, trust=False)
