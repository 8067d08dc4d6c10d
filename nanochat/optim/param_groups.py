"""Which parameter of the model is trained by what, and at which rate."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from nanochat.config import LEARNING_RATES, GPTConfig
from nanochat.errors import UserError
from nanochat.mup import ParamScaling

TUNED_WIDTH = 768  # where the rates of AdamW were tuned; elsewhere they go with 1/√width
ADAMW = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
MUON = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "beta2": 0.95}
ADAMW_FOR_MATRICES = {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-8}
ADAMW_MATRIX_LR = 0.05  # times Muon's rate: 0.02 becomes 1e-3 at width 768, and goes with 1/width
GATE_LR = 0.2  # times the rate of scalars: all 12 inputs of a gate move it, 0.1 a step together at 0.04

FAMILIES = ("head", "embedding", "value embeddings", "n-gram embeddings", "gates", "scalars", "matrices")


def make_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: GPTConfig,
    scalings: dict[str, ParamScaling],
    use_muon: bool = True,
    weight_decay: float = 0.0,
    **rates: float,
) -> list[dict[str, Any]]:
    """Groups for MuonAdamW: Muon for the matrices inside blocks (AdamW with use_muon=False), AdamW for the rest.

    rates: matrix_lr, embedding_lr, unembedding_lr, scalar_lr and value_embedding_lr (default: embedding_lr), else as in
    LEARNING_RATES. Those of head and embeddings (and of matrices under AdamW) are tuned at width 768 and scaled by
    (width/768)^-0.5 (the last by its square). Under muP all of that is taken at the base width, and `scalings` (of
    mup_table) say how it goes on from there. Scalars have the rate scalar_lr at every width, gates a fifth of it.
    Weight decay acts on the matrices alone: rows of an embedding are seen rarely, and would decay as fast as those seen
    always. Raises ValueError for a parameter that has no scaling.
    """
    if unknown := rates.keys() - LEARNING_RATES.keys():
        raise TypeError(f"no such learning rates: {', '.join(sorted(unknown))}")
    rates = {**LEARNING_RATES, "value_embedding_lr": rates.get("embedding_lr", LEARNING_RATES["embedding_lr"]), **rates}
    width_factor = ((config.mup_base_width or config.n_embd) / TUNED_WIDTH) ** -0.5
    matrices: dict[str, Any] = {**MUON, "lr": rates["matrix_lr"]}
    if not use_muon:
        matrices = {**ADAMW_FOR_MATRICES, "lr": rates["matrix_lr"] * ADAMW_MATRIX_LR * width_factor**2}
    at_base: dict[str, dict[str, Any]] = {
        "head": {**ADAMW, "lr": rates["unembedding_lr"] * width_factor},
        "embedding": {**ADAMW, "lr": rates["embedding_lr"] * width_factor},
        "value embeddings": {**ADAMW, "lr": rates["value_embedding_lr"] * width_factor},
        "n-gram embeddings": {**ADAMW, "lr": rates["value_embedding_lr"] * width_factor},
        "gates": {**ADAMW, "lr": rates["scalar_lr"] * GATE_LR},
        "scalars": {**ADAMW, "lr": rates["scalar_lr"]},
        "matrices": {**matrices, "weight_decay": weight_decay},
    }
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, param in named_parameters:
        if not param.requires_grad:
            continue
        if name not in scalings:
            raise ValueError(f"{name}: nanochat.mup has no shape for it, so no rule says how it is to be trained")
        rule = scalings[name]
        family = _family(name, rule, param.ndim)
        key = (FAMILIES.index(family), rule.lr, rule.eps, rule.weight_decay)
        group = groups.setdefault(
            key, {**_scaled(at_base[family], rule), "label": family.replace(" ", "_"), "params": [], "names": []}
        )
        group["params"].append(param)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def check_parametrisation(config: GPTConfig, use_mup: bool | None, base_width: int | None) -> None:
    """UserError where what is requested (None: nothing) is not how the model was built: forward pass and rates follow
    one rule, and half of muP is worse than none."""
    built = config.mup_base_width
    if use_mup is False and built:
        raise UserError(f"use_mup=False, but the model was built with mup_base_width={built}: build it with 0")
    if use_mup and not built:
        raise UserError(f"use_mup=True, but the model was built without muP: give it mup_base_width={base_width}")
    if built and base_width is not None and base_width != built:
        raise UserError(f"base_width={base_width}, but the model was built with mup_base_width={built}")


def _family(name: str, rule: ParamScaling, ndim: int) -> str:
    if rule.kind == "hidden":
        return "matrices"
    if rule.kind == "output":
        return "head"
    if name == "transformer.wte.weight":
        return "embedding"
    if name.startswith("transformer.value_embeds."):
        return "value embeddings"
    if name.startswith("transformer.ngram_embeds."):
        return "n-gram embeddings"
    return "scalars" if ndim == 1 else "gates"


def _scaled(group: dict[str, Any], rule: ParamScaling) -> dict[str, Any]:
    """The group as it is at the base width, with the factors of this width."""
    scaled = {**group, "lr": group["lr"] * rule.lr, "weight_decay": group["weight_decay"] * rule.weight_decay}
    if "eps" in group:
        scaled["eps"] = group["eps"] * rule.eps
    return scaled
