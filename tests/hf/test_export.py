"""nanochat.hf.export: transformers computes what we do."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.hf.export import export
from nanochat.hf.names import classic_config, is_classic
from scripts.tok_eval import TEXTS
from tests.hf.conftest import ARCHS, meta_of

TOLERANCE = 1e-4


@pytest.fixture
def loaded(exports, transformers, request):
    """(our model, transformers' of its export)."""
    model, folder = exports(request.param)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


every_arch = pytest.mark.parametrize("loaded", ARCHS, indirect=True)


def real_rows(tokenizer, count: int, length: int) -> torch.Tensor:
    ids = [i for text in TEXTS.values() for i in tokenizer.encode(text, prepend="<|bos|>")]
    starts = range(0, len(ids) - length, max(1, (len(ids) - length) // count))
    return torch.tensor([ids[start : start + length] for start in starts][:count])


@every_arch
@torch.no_grad()
def test_logits_are_ours(loaded, tokenizer):
    model, theirs = loaded
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(model.config.vocab_size, (100, 64), generator=generator)
    for rows in (random, real_rows(tokenizer, 20, 64)):
        assert (theirs(rows).logits - model(rows)).abs().max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("depth", [4, 12])
@pytest.mark.parametrize("name", ["nanochat", "speedrun", "ngram"])
@torch.no_grad()
def test_shapes_that_are_trained(name, depth, make_model, tokenizer, tmp_path, transformers):
    """1,000 random and 100 real rows where there is a GPU, else a part of them; and 200 greedy tokens."""
    device, share = ("cuda", 1) if torch.cuda.is_available() else ("cpu", 25)
    shape = {"n_layer": depth, "n_embd": 64 * depth, "head_dim": 128 if depth == 12 else 64, "sequence_len": 128}
    model = make_model(name, **shape).to(device)
    export(model, tokenizer, meta_of(model, tokenizer), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    theirs.to(device).eval()
    random = torch.randint(model.config.vocab_size, (1000 // share, 128), generator=torch.Generator().manual_seed(0))
    for rows in (random, real_rows(tokenizer, 100 // share, 128)):
        worst = max((theirs(part).logits - model(part)).abs().max().item() for part in rows.to(device).split(25))
        print(f"{name} d{depth}: {len(rows)} rows of 128, {worst:.1e}")
        assert worst <= TOLERANCE
    prompt = tokenizer.encode("Once upon a time", prepend="<|bos|>")  # the classic has no tie on its way
    ((wanted,), _), *_ = Engine(model, tokenizer).generate_many([prompt], Sampling(max_new_tokens=200, temperature=0.0))
    found = theirs.generate(torch.tensor([prompt], device=device), max_new_tokens=200, do_sample=False)[0].tolist()
    assert found == wanted and len(wanted) == len(prompt) + 200


@every_arch
@torch.no_grad()
def test_padding_in_front_or_behind_changes_nothing(loaded, tokenizer):
    model, theirs = loaded
    texts = [real_rows(tokenizer, 3, length)[-1].tolist() for length in (30, 11, 1)]
    alone = [model(torch.tensor([ids]))[0] for ids in texts]
    for side in ("left", "right"):
        pads = [[5] * (30 - len(ids)) for ids in texts]
        rows = torch.tensor([p + i if side == "left" else i + p for i, p in zip(texts, pads, strict=True)])
        there = torch.tensor([[0] * len(p) + [1] * len(i) for i, p in zip(texts, pads, strict=True)])
        there = there if side == "left" else there.flip(1)
        logits = theirs(rows, attention_mask=there).logits
        for own, found, mask in zip(alone, logits, there.bool(), strict=True):
            assert (found[mask] - own).abs().max() <= TOLERANCE


@every_arch
def test_greedy_answers_are_ours(loaded, tokenizer):
    """200 tokens: beyond windows and sequence_len; in a batch with padding, as lm-eval generates, too."""
    model, theirs = loaded
    prompts = [
        tokenizer.encode(text[: 60 - 30 * i], prepend="<|bos|>") for i, text in enumerate(list(TEXTS.values())[:2])
    ]
    wanted = Engine(model, tokenizer).generate_many(prompts, Sampling(max_new_tokens=200, temperature=0.0))
    width = max(map(len, prompts))
    pads = [[0] * (width - len(prompt)) for prompt in prompts]
    rows = torch.tensor([pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    options = {"max_new_tokens": 200, "do_sample": False}
    together = theirs.generate(rows, attention_mask=mask, **options)
    for prompt, row, (sequences, _) in zip(prompts, together.tolist(), wanted, strict=True):
        answer = sequences[0][len(prompt) :]
        assert row[width:][: len(answer)] == answer
    assert max(len(sequences[0]) for sequences, _ in wanted) > 150, "answers that go on"
    alone = theirs.generate(torch.tensor(prompts[:1]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert alone == wanted[0][0][0][: len(alone)]


@pytest.mark.parametrize("loaded", ["ngram"], indirect=True)
def test_beams_and_losses(loaded, tokenizer):
    """Rows change places in our cache as they do in transformers' own without one."""
    model, theirs = loaded
    rows = real_rows(tokenizer, 2, 12)
    options = {"max_new_tokens": 30, "do_sample": False, "num_beams": 3}
    with_cache = theirs.generate(rows, **options)
    assert torch.equal(with_cache, theirs.generate(rows, use_cache=False, **options))
    loss = theirs(rows, labels=rows).loss
    targets = torch.cat([rows[:, 1:], torch.full((2, 1), -1)], dim=1)
    assert loss.item() == pytest.approx(model(rows, targets).item(), abs=1e-5)
    with pytest.raises(ValueError, match="0 between tokens"):
        theirs(rows, attention_mask=torch.tensor([[1, 0] * 6] * 2))


def test_a_long_prompt_goes_through_windows_in_parts(make_model, tokenizer, tmp_path, transformers):
    model = make_model("ngram", n_layer=3, n_embd=32, sequence_len=2048)
    export(model, tokenizer, meta_of(model, tokenizer), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    rows = torch.randint(1, 400, (2, 1300), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(rows)
    mask[1, :700] = 0
    found = theirs.generate(rows, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 1300:].tolist()
    prompts = [rows[0].tolist(), rows[1, 700:].tolist()]
    wanted = Engine(model, tokenizer).generate_many(prompts, Sampling(max_new_tokens=8, temperature=0.0))
    for row, prompt, (sequences, _) in zip(found, prompts, wanted, strict=True):
        answer = sequences[0][len(prompt) :]
        assert row[: len(answer)] == answer


def test_the_classic_is_transformers_own(exports, transformers, tokenizer):
    model, folder = exports("nanochat")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nanochat" and "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert config["intermediate_size"] == 4 * model.config.n_embd
    assert config["rms_norm_eps"] == pytest.approx(1.1920929e-07, rel=1e-6)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__module__ == "transformers.models.nanochat.modeling_nanochat"
    ends = tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == ends[::-1]
    assert theirs.generation_config.eos_token_id == list(ends)
    assert classic_config(config) == model.config
    other = {
        "hidden_act": "gelu",
        "intermediate_size": 8192,
        "rope_parameters": {"rope_type": "yarn"},
        "vocab_size": "9",
    }
    for name, value in other.items():
        with pytest.raises(UserError, match=rf"config\.json.*({name}|rope_type)"):
            classic_config({**config, name: value})


def test_what_is_no_classic_has_its_own_file(exports):
    for name in ARCHS:
        model, folder = exports(name)
        assert is_classic(model.config) == (name == "nanochat")
        if name != "nanochat":
            weights = load_file(folder / "model.safetensors")
            assert {key.removeprefix("model.") for key in weights} == set(model.state_dict())


def test_the_file_needs_nothing_of_ours(exports, tmp_path):
    """As somebody else loads it: in another folder, without nanochat."""
    model, folder = exports("everything")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "logits = model(torch.arange(40).view(2, 20)).logits\n"
        "assert 'nanochat.gpt' not in sys.modules, 'it has found nanochat'\n"
        "model.save_pretrained('again'); torch.save(logits.detach(), 'logits.pt')\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        wanted = model(torch.arange(40).view(2, 20))
    assert (torch.load(tmp_path / "logits.pt") - wanted).abs().max() <= TOLERANCE
    assert (tmp_path / "again" / "modeling_nanochat_gpt.py").read_text() == (
        folder / "modeling_nanochat_gpt.py"
    ).read_text()


def test_no_folder_of_this_machine_goes_out(make_model, tokenizer, tmp_path):
    """What is pushed is public: names of own text and conversations, and not where they lie."""
    model = make_model("nanochat", n_layer=1, n_embd=32)
    own = {"source": "local:/home/me/secret/texts", "depth": 4}
    tasks = "reasoning-gym/chess, ~/secret/my chats.jsonl:20*2|/home/me/secret/b.jsonl,near.jsonl,GSM8K"
    meta = meta_of(model, tokenizer, settings={**own, "tasks": tasks}, recipe=own)
    export(model, tokenizer, meta, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes(), path
    about = json.loads((tmp_path / "out" / "nanochat.json").read_text())
    assert about["recipe"] == {"source": "local:texts", "depth": 4}
    assert about["settings"]["tasks"] == "reasoning-gym/chess,my chats.jsonl:20*2|b.jsonl,near.jsonl,GSM8K"


def test_nothing_is_written_over(make_model, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is there already: remove it"):
        export(make_model("nanochat"), tokenizer, {}, tmp_path / "out")
