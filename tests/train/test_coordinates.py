"""train/coordinates.py: what is measured, and that measuring leaves no trace."""

import math

import numpy as np
import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.train.coordinates import COORD, measure, record, statistics, watching


def make_config(width=32, base_width=0, **changes):
    return GPTConfig(
        sequence_len=16,
        vocab_size=64,
        n_layer=2,
        n_head=width // 16,
        n_kv_head=width // 16,
        n_embd=width,
        mup_base_width=base_width,
        **changes,
    )


def make_model(config, seed=0, **init):
    model = GPT(config)
    model.init_weights(seed=seed, **({"head_std": 0.02, "zero_proj": False} | init))
    return model


def hook_count(model):
    return sum(len(module._forward_hooks) for module in model.modules())


ROWS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def test_statistics_against_numpy():
    x = torch.randn(5, 7, 3) * 3 + 1
    values = x.double().numpy()
    found = statistics(x)
    assert found["l1"] == pytest.approx(np.abs(values).mean())
    assert found["l2"] == pytest.approx(math.sqrt((values**2).mean()))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.std(ddof=1))


def test_what_is_measured_is_what_modules_put_out():
    model = make_model(make_config(64, 16))
    seen = measure(model, ROWS)
    for part in ("attn", "attn.c_q", "attn.c_k", "attn.c_v", "mlp.c_fc", "mlp"):
        assert {f"h.0.{part}", f"h.1.{part}"} <= seen.keys()
    assert {"wte", "h.0", "h.1", "lm_head"} <= seen.keys()
    assert seen["wte"]["l1"] == pytest.approx(model.transformer.wte(ROWS).abs().mean().item())
    with torch.no_grad():
        raw = 15 * torch.atanh(model(ROWS).double() / 15)  # logits before the softcap: those of lm_head / 4
    assert seen["lm_head"]["l1"] == pytest.approx(raw.abs().mean().item(), rel=1e-4)


def test_hooks_are_gone_afterwards_whatever_happens():
    model = make_model(make_config())
    with pytest.raises(RuntimeError, match="on purpose"), watching(model):
        assert hook_count(model) > 10
        raise RuntimeError("on purpose")
    assert hook_count(model) == 0
    measure(model, ROWS)
    assert hook_count(model) == 0


def test_a_module_that_is_called_twice_is_seen_twice():
    model = make_model(make_config(smear=True))
    seen = measure(model, ROWS)
    assert seen["wte"]["l1"] != seen["wte#2"]["l1"]
    assert "lm_head#2" not in seen


def test_tables_are_measured_once_they_are_not_zero():
    model = make_model(make_config(value_embeds="layers", ngram_embeds=3, ngram_slots=1))
    assert {name for name in measure(model, ROWS) if "_embeds" in name} == {"value_embeds.0", "value_embeds.1"}
    torch.nn.init.ones_(model.transformer.ngram_embeds[1].weight)
    seen = measure(model, ROWS)
    assert seen["ngram_embeds.1"]["l1"] == 1 and "ngram_embeds.0" not in seen


def test_a_layer_without_attention_is_left_out():
    seen = measure(make_model(make_config(attention_free_layer=1)), ROWS)
    assert "h.0.attn" in seen and "h.1.attn" not in seen and "h.1.mlp" in seen


def test_recorder_sees_a_compiled_model_too(tmp_path):
    model = make_model(make_config())
    model.transformer.h[0].forward = torch.compile(model.transformer.h[0].forward, backend="eager")
    with torch.no_grad():
        model(ROWS)
    metrics = record(model, tmp_path / "x.jsonl", ROWS, 1)
    assert f"{COORD}/h.0.attn" in metrics and f"{COORD}/h.0.mlp" in metrics
