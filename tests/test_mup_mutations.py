"""The coordinate check sees each mistake that muP is open to: with any one rule changed it fails, for that reason.

Widths 64, 128 and 256, a text of 32 different tokens. With 256 of them, tokens get in each other's way where the width
is no larger (mean |x| of MLPs then grows by up to width^0.12 in ten steps, by Muon at three times its usual rate
width^0.36), and that is no fault of the rules.
"""

import dataclasses
import functools

import pytest
import torch

from nanochat import mup
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.studies.coord_check import SP_AT_LEAST, get_coord_data, judge, markov_batches, slopes, steepest
from nanochat.train.coordinates import LOGITS
from tests.models import make_config

WIDTHS, BASE, STEPS = (64, 128, 256), 128, 10
# Muon's is half as large again as in training, so that its mistakes show within ten steps
RATES = {"matrix_lr": 0.03, "embedding_lr": 0.2, "unembedding_lr": 0.004, "weight_decay": 0.0}
ADAMW_RATES = RATES | {"matrix_lr": 0.005}  # AdamW's own is 0.0015 at width 128


def check(widths=WIDTHS, seeds=1, base_width=BASE, use_muon=True, n_layer=1, **features):
    """Slopes of models trained by the rules as they are now. One block shows what a mistake does."""

    def maker(width):
        config = make_config(
            "nanochat",
            n_layer=n_layer,
            n_embd=width,
            head_dim=64,
            vocab_size=256,
            sequence_len=64,
            mup_base_width=base_width,
            **features,
        )

        def make(seed):
            model = GPT(config)
            model.init_weights(seed=seed, head_std=0.02, zero_proj=False)
            return model

        return make

    rates = RATES if use_muon else ADAMW_RATES
    batches = markov_batches(STEPS + 1, rows=8, vocab_size=32)
    records = get_coord_data(
        {width: maker(width) for width in widths},
        batches,
        lambda model: model.setup_optimizer(**rates, use_muon=use_muon),
        STEPS,
        seeds,
    )
    return slopes(records)


@functools.cache
def healthy(seeds=1, use_muon=True):
    return check(seeds=seeds, use_muon=use_muon)


def at_end(found, module):
    return next(slope.slope for slope in found if (slope.module, slope.t) == (module, STEPS + 1))


def change_lr(monkeypatch, kind, power):
    """Multiply the learning rates of all parameters of this kind by m^power."""
    rules = mup.mup_table

    def changed(model_class, config, *args, **kwargs):
        m = config.n_embd / config.mup_base_width
        table = rules(model_class, config, *args, **kwargs)
        return {
            name: dataclasses.replace(rule, lr=rule.lr * m**power) if rule.kind == kind else rule
            for name, rule in table.items()
        }

    monkeypatch.setattr(mup, "mup_table", changed)


def test_the_rules_as_they_are_pass():
    assert judge(check(seeds=3, n_layer=2)) == []


def drop_output_multiplier(monkeypatch):
    monkeypatch.setattr(GPTConfig, "logit_multiplier", property(lambda config: config.logit_scale))


def scale_head_lr_too(monkeypatch):
    change_lr(monkeypatch, "output", -1)


def moonlight(monkeypatch):
    """Muon by 0.2·√max(fan in, fan out), which grows as √width: here relative to the same at base."""
    change_lr(monkeypatch, "hidden", 0.5)


def muon_over_width(monkeypatch):
    change_lr(monkeypatch, "hidden", -1)


def embedding_over_root_width(monkeypatch):
    change_lr(monkeypatch, "input", -0.5)


# mutation -> (module, least slope after ten steps); that of the healthy rules is within 0.15, on the very same seed
MUTATIONS = {
    drop_output_multiplier: (LOGITS, 0.3),
    scale_head_lr_too: (LOGITS, -0.3),
    moonlight: ("h.0.mlp", 0.25),
    muon_over_width: ("h.0.mlp", -0.4),
    embedding_over_root_width: ("wte", -0.3),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_each_mutation_fails_for_its_own_reason(mutation, monkeypatch):
    module, least = MUTATIONS[mutation]
    assert abs(at_end(healthy(), module)) < 0.15
    mutation(monkeypatch)
    found = check()
    assert any(line.startswith(f"{module} at t = {STEPS + 1}") for line in judge(found))
    slope = at_end(found, module)
    assert slope / least >= 1, f"{module}: {slope}, expected {least} or beyond"


def test_tables_beside_the_embedding_keep_their_size_and_a_rate_over_root_width_is_seen(monkeypatch):
    features = {"ngram_embeds": 4, "ngram_slots": 1, "value_embeds": "layers", "key_offset": True}
    ngrams, values = [f"ngram_embeds.{i}" for i in range(3)], ["value_embeds.0"]
    found = check(**features)
    assert {slope.t for slope in found if slope.module in ngrams} == set(range(2, STEPS + 2))  # before that they are 0
    assert max(abs(at_end(found, module)) for module in ngrams + values) < 0.1
    embedding_over_root_width(monkeypatch)
    found = check(**features)
    assert max(at_end(found, module) for module in ngrams) < -0.3


@pytest.mark.parametrize(("power", "least"), [(1.0, 0.3), (-1.0, -0.3)])
def test_adamw_for_matrices_passes_and_other_powers_of_the_width_fail(monkeypatch, power, least):
    module = "h.0.mlp"
    assert judge(healthy(4, use_muon=False)) == []
    change_lr(monkeypatch, "hidden", power)
    found = check(use_muon=False)
    assert judge(found)
    assert at_end(found, module) / least >= 1


def test_the_standard_parametrisation_fails_besides_the_logits():
    found = check(base_width=0)
    assert judge(found)
    assert abs(steepest(found).slope) >= SP_AT_LEAST and steepest(found).module == "wte"
    assert next(slope.slope for slope in found if slope.module == LOGITS) > 0.4  # at init


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_a_missing_shape_is_an_error_and_no_default(monkeypatch, name):
    shapes = mup.inf_shapes
    monkeypatch.setattr(mup, "inf_shapes", lambda *about: {n: s for n, s in shapes(*about).items() if n != name})
    config = GPTConfig(sequence_len=8, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, mup_base_width=32)
    with pytest.raises(ValueError, match=name):
        GPT(config).setup_optimizer()


@pytest.mark.parametrize("finite", ["in", "out"])
def test_a_shape_that_calls_the_wrong_dimension_infinite_is_an_error(monkeypatch, finite):
    shapes = mup.inf_shapes

    def wrong(*about):
        table = shapes(*about)
        out, into = table["transformer.wte.weight"]
        flipped = mup.InfShape((out._replace(infinite=finite == "in"), into._replace(infinite=True)))
        return table | {"transformer.wte.weight": flipped}

    monkeypatch.setattr(mup, "inf_shapes", wrong)
    config = GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=64, mup_base_width=32)
    with torch.device("meta"), pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        GPT(config).setup_optimizer()


@pytest.mark.slow  # ten minutes on two cores
@pytest.mark.parametrize("base_width", [BASE, 0])
def test_over_eight_times_the_width_and_five_seeds(base_width):
    found = check(widths=(128, 256, 512, 1024), seeds=5, base_width=base_width, n_layer=2)
    if base_width:
        assert judge(found) == []
    else:
        assert abs(steepest(found).slope) >= SP_AT_LEAST
