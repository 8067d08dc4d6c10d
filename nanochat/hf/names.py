"""What the classic architecture is called in transformers, where it is the model type `nanochat`: its settings and its
weights, there and back."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from nanochat.config import GPTConfig
from nanochat.errors import UserError
from nanochat.files import from_json
from nanochat.gpt import LOGIT_CAP

# name in nanochat -> in transformers; N: number of a layer
WEIGHTS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.N.attn.c_q.weight": "model.layers.N.self_attn.q_proj.weight",
    "transformer.h.N.attn.c_k.weight": "model.layers.N.self_attn.k_proj.weight",
    "transformer.h.N.attn.c_v.weight": "model.layers.N.self_attn.v_proj.weight",
    "transformer.h.N.attn.c_proj.weight": "model.layers.N.self_attn.o_proj.weight",
    "transformer.h.N.mlp.c_fc.weight": "model.layers.N.mlp.fc1.weight",
    "transformer.h.N.mlp.c_proj.weight": "model.layers.N.mlp.fc2.weight",
    "lm_head.weight": "lm_head.weight",
}
# What transformers computes can be set otherwise than nanochat does; these values are written, and no others read.
FIXED: dict[str, Any] = {
    "hidden_act": "relu2",
    "final_logit_softcapping": LOGIT_CAP,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "sequence_len": "max_position_embeddings",
}
FREE = {*SIZES, "rotary_base", "window_pattern", "short_window", "mup_base_width", "mup_base_depth", "logit_scale"}


def weight_name(name: str) -> str:
    """Name in transformers of a weight of the classic. KeyError for any other."""
    number = re.search(r"\.(\d+)\.", name)
    pattern = name if number is None else name.replace(number[0], ".N.", 1)
    return WEIGHTS[pattern] if number is None else WEIGHTS[pattern].replace(".N.", number[0], 1)


def is_classic(config: GPTConfig) -> bool:
    """Whether transformers' own `nanochat` computes the same as this model."""
    plain = {field.name: field.default for field in dataclasses.fields(GPTConfig) if field.name not in FREE}
    factors = config.logit_multiplier, config.branch_multiplier
    windows = {config.window(layer) for layer in range(config.n_layer)}
    return factors == (1.0, 1.0) and windows == {-1} and all(getattr(config, n) == v for n, v in plain.items())


def sizes(config: GPTConfig) -> dict[str, Any]:
    """Sizes in the words of transformers, which other programs look for, whatever the architecture."""
    found = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    return {**found, "intermediate_size": 4 * config.n_embd, "head_dim": config.head_dim}


def classic_settings(config: GPTConfig) -> dict[str, Any]:
    """What transformers' NanoChatConfig has to be told. Its own defaults are right for one width only."""
    rope = {"rope_type": "default", "rope_theta": config.rotary_base}
    return {**sizes(config), **FIXED, "rms_norm_eps": torch.finfo(torch.float32).eps, "rope_parameters": rope}


def classic_config(settings: Mapping[str, Any]) -> GPTConfig:
    """GPTConfig from the config.json of a `nanochat` model. Raises UserError where that says what we do not compute."""
    try:
        rope = settings.get("rope_parameters") or {}
        heads = settings["num_attention_heads"]
        found = {ours: settings.get(theirs) for ours, theirs in SIZES.items()}
        found["n_kv_head"] = found["n_kv_head"] or heads
        wanted = {
            **FIXED,
            "intermediate_size": 4 * settings["hidden_size"],
            "rope_type": "default",
            "head_dim": settings["hidden_size"] // heads,
        }
        for name, value in wanted.items():
            has = {**rope, **settings}.get(name, value)
            if has != value:
                raise UserError(f"config.json: {name} is {has!r:.50}, nanochat computes with {value!r}")
        return from_json(GPTConfig, {**found, "rotary_base": float(rope.get("rope_theta", GPTConfig.rotary_base))})
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"config.json lacks what a nanochat model has ({type(error).__name__}: {error})") from None
