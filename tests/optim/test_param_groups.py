"""nanochat/optim/param_groups.py: every parameter in one group, at the rate that is documented."""

import pytest
import torch
from torch import nn

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from tests.models import make_config

RATES = {"matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004, "weight_decay": 0.1}
EVERYTHING = {"value_embeds": "gated", "attn_gate": True, "smear": True, "backout": True}


def make_model(width=128, base_width=0, arch="speedrun", **changes):
    if arch == "speedrun":
        changes = EVERYTHING | changes
    config = make_config(
        arch,
        n_layer=4,
        n_embd=width,
        head_dim=32,
        vocab_size=64,
        sequence_len=16,
        mup_base_width=base_width,
        **changes,
    )
    model = GPT(config)
    model.init_weights(zero_proj=False)
    return model


def by_name(optimizer):
    """name -> its group; a name that occurs twice is an error."""
    pairs = [(name, group) for group in optimizer.param_groups for name in group["names"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize("base_width", [0, 64])
@pytest.mark.parametrize("value_embeds", ["none", "ends", "gated"])
def test_every_parameter_is_in_exactly_one_group(use_muon, base_width, value_embeds):
    model = make_model(base_width=base_width, value_embeds=value_embeds)
    optimizer = model.setup_optimizer(**RATES, use_muon=use_muon)
    named = dict(model.named_parameters())
    assert by_name(optimizer).keys() == named.keys()
    for group in optimizer.param_groups:
        assert all(named[name] is param for name, param in zip(group["names"], group["params"], strict=True))


def test_a_frozen_parameter_is_in_none():
    model = make_model()
    model.backout_lambda.requires_grad_(False)
    assert "backout_lambda" not in by_name(model.setup_optimizer(**RATES))


@pytest.mark.parametrize("use_muon", [True, False])
def test_muon_gets_the_hidden_matrices_and_nothing_else(use_muon):
    groups = by_name(make_model().setup_optimizer(**RATES, use_muon=use_muon))
    matrices = {name for name in groups if ".c_" in name}
    assert len(matrices) == 4 * 6
    assert {name for name, group in groups.items() if group["kind"] == "muon"} == (matrices if use_muon else set())
    assert {name for name, group in groups.items() if group["weight_decay"] > 0} == matrices


def test_standard_parametrisation_has_its_published_rates():
    factor = (128 / 768) ** -0.5
    groups = by_name(make_model().setup_optimizer(**RATES))
    adamw = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    expected = {
        "lm_head.weight": adamw | {"lr": 0.004 * factor},
        "transformer.wte.weight": adamw | {"lr": 0.2 * factor},
        "transformer.value_embeds.0.weight": adamw | {"lr": 0.2 * factor},
        "resid_lambdas": adamw | {"lr": 0.04},
        "smear_lambda": adamw | {"lr": 0.04},
        "smear_gate.weight": adamw | {"lr": 0.04 * 0.2},
        "transformer.h.1.attn.gate.weight": adamw | {"lr": 0.04 * 0.2},
        "transformer.h.1.attn.value_gate.weight": adamw | {"lr": 0.04 * 0.2},
        "transformer.h.0.mlp.c_fc.weight": {
            "kind": "muon",
            "lr": 0.02,
            "momentum": 0.95,
            "ns_steps": 5,
            "beta2": 0.95,
            "weight_decay": 0.1,
        },
    }
    for name, wanted in expected.items():
        assert {key: groups[name][key] for key in wanted} == wanted, name  # exactly: no factor is applied by the way


def test_adamw_for_matrices_goes_with_one_over_width():
    for width in (64, 128):
        group = by_name(make_model(width).setup_optimizer(**RATES, use_muon=False))["transformer.h.0.mlp.c_fc.weight"]
        assert group["lr"] == pytest.approx(0.02 * 0.05 * 768 / width)
        assert (group["eps"], group["betas"], group["weight_decay"]) == (1e-8, (0.9, 0.95), 0.1)


def test_rates_of_scalars_and_value_embeddings_can_be_given():
    groups = by_name(make_model().setup_optimizer(**RATES, scalar_lr=0.5, value_embedding_lr=0.7))
    factor = (128 / 768) ** -0.5
    assert groups["x0_lambdas"]["lr"] == 0.5
    assert groups["transformer.h.0.attn.gate.weight"]["lr"] == pytest.approx(0.1)
    assert groups["transformer.value_embeds.0.weight"]["lr"] == pytest.approx(0.7 * factor)
    assert groups["transformer.wte.weight"]["lr"] == pytest.approx(0.2 * factor)


@pytest.mark.parametrize("use_muon", [True, False])
def test_rates_under_mup_are_those_of_the_base_width_times_its_rules(use_muon):
    base = by_name(make_model(64).setup_optimizer(**RATES, use_muon=use_muon))
    wide = by_name(make_model(256, base_width=64).setup_optimizer(**RATES, use_muon=use_muon))
    for name in base:
        hidden = ".c_" in name
        grows = hidden or any(part in name for part in ("wte", "value_embeds", "lm_head", ".gate", "value_gate"))
        adamw_matrix = hidden and not use_muon
        assert wide[name]["lr"] == base[name]["lr"] / (4 if adamw_matrix else 1), name
        assert wide[name]["weight_decay"] == base[name]["weight_decay"] * (4 if adamw_matrix else 1), name
        if wide[name]["kind"] == "adamw":
            assert wide[name]["eps"] == base[name]["eps"] / (4 if grows else 1), name


def test_parametrisation_of_optimizer_and_model_must_agree():
    standard, mup = make_model(arch="nanochat"), make_model(arch="nanochat", base_width=64)
    for fine in (
        (standard, None, None),
        (standard, False, 64),
        (standard, None, 64),
        (mup, None, None),
        (mup, True, 64),
        (mup, True, None),
    ):
        model, use_mup, base_width = fine
        model.setup_optimizer(**RATES, use_mup=use_mup, base_width=base_width)
    for model, use_mup, base_width, words in (
        (standard, True, 64, "mup_base_width=64"),
        (mup, False, None, "mup_base_width=64"),
        (mup, True, 128, "base_width=128"),
        (mup, None, 128, "base_width=128"),
    ):
        with pytest.raises(UserError, match=words):
            model.setup_optimizer(**RATES, use_mup=use_mup, base_width=base_width)


def test_a_parameter_without_a_rule_is_named():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    model.adapter = nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match="adapter"):
        model.setup_optimizer(**RATES)
