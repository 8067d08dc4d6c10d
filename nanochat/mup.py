"""Maximal update parametrisation: how the rates of each parameter go with the model's width.

Two models on the meta device, one twice as wide as the other, show which dimensions of each parameter grow with width
(are infinite). From that follow, for every parameter, plain floats, all of them 1 at the base width: factors on
learning rate, Adam's eps and weight decay, and the forward multiplier. Nothing is attached to tensors, so compiling,
sharding and checkpoints need not know of it. The rules, m = width / base width:

    parameter (fan in -> fan out)            init       forward   optimizer: lr           decay x
    input   finite -> infinite               constant   1         AdamW: constant         -
    hidden  infinite -> infinite             1/√fan_in  1         Muon: √(out/in)         1 / lr factor
                                                                  AdamW: 1/m              1 / lr factor
    output  infinite -> finite, lm_head      constant   1/m       AdamW: constant         -
    scalar  finite                           constant   1         AdamW: constant         -

These are the rules of Tensor Programs V (arXiv 2203.03466) in the form of its table 8: the output has a multiplier, and
therefore a constant rate; to scale both would count the width twice. Muon's rate is that of the spectral condition
(arXiv 2310.17813), √(fan_out/fan_in) against the same at base width: 1 where all matrices keep their aspect. Gates with
12 inputs are vectors that grow, so AdamW trains them. Decay is independent of the rate (arXiv 2510.19093): the
optimizers multiply the two, so what one loses the other gains. Gradients shrink as 1/m wherever a dimension grows, and
eps with them. mup_base_depth adds CompleteP with alpha = 1 (arXiv 2505.01618): residual branches times base depth /
depth, eps of the parameters in them likewise, rates as they are.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from nanochat.config import GPTConfig, InitSpec, init_std
from nanochat.errors import UserError

Kind = Literal["input", "hidden", "output", "scalar"]
ModelClass = Callable[[GPTConfig], nn.Module]


class Dim(NamedTuple):
    """One dimension of a parameter."""

    base: int  # size at the base width
    size: int
    infinite: bool  # grows with the width

    @property
    def growth(self) -> float:
        return self.size / self.base


InfShape = tuple[Dim, ...]  # of a parameter: (n,) or (fan out, fan in), whichever way round it is stored


@dataclass(frozen=True)
class ParamScaling:
    """How one parameter goes with width (and depth). Factors are relative to the base, and 1 there."""

    kind: Kind
    optimizer: Literal["muon", "adamw"]
    init_std: float  # standard deviation of the initial values, not relative; 0: begins as a constant
    lr: float = 1.0  # on the learning rate requested at the base width
    eps: float = 1.0  # on AdamW's eps; Muon has none that gradients of any size could notice
    weight_decay: float = 1.0  # on the weight decay, which the optimizers multiply by the learning rate
    multiplier: float = 1.0  # on what the parameter's layer puts out, in the forward pass (nanochat.gpt)


# ---- which dimensions grow


def at_width(config: GPTConfig, width: int) -> GPTConfig:
    """`config` at another width: as many heads of the same size as fill it, and the same number of them to a key/value
    head. UserError where that is no whole number."""
    heads, rest = divmod(width, config.head_dim)
    kv_heads, kv_rest = divmod(config.n_kv_head * width, config.n_embd)
    if rest or kv_rest or heads < 1:
        raise UserError(
            f"width {width} cannot be compared with width {config.n_embd} of {config.n_head} heads and "
            f"{config.n_kv_head} key/value heads of {config.head_dim}: take a multiple of "
            f"{config.head_dim * config.n_head // config.n_kv_head}"
        )
    return dataclasses.replace(config, n_embd=width, n_head=heads, n_kv_head=kv_heads)


def inf_shapes(model_class: ModelClass, config: GPTConfig) -> dict[str, InfShape]:
    """InfShape of every parameter of model_class(config), by name. Without a base width, a model is its own base."""
    base_width = config.mup_base_width or config.n_embd
    base, twice = (_fans(model_class, at_width(config, width)) for width in (base_width, 2 * base_width))
    return {
        name: tuple(Dim(b, s, b != t) for b, s, t in zip(base[name], sizes, twice[name], strict=True))
        for name, sizes in _fans(model_class, config).items()
    }


@functools.lru_cache(maxsize=8)
def _fans(model_class: ModelClass, config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """(fan out, fan in) of matrices, (n,) of vectors, by name. Embedding tables are stored the other way round."""
    with torch.device("meta"):
        model = model_class(config)
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    return {name: shape[::-1] if name in tables else shape for name, shape in shapes.items()}


# By infinite dimensions: (n,) or (fan out, fan in).
KINDS: dict[tuple[bool, ...], Kind] = {
    (False,): "scalar",
    (False, False): "scalar",
    (True,): "input",
    (True, False): "input",
    (True, True): "hidden",
    (False, True): "output",
}


def classify(name: str, shape: InfShape) -> Kind:
    """What kind of parameter this is, by its infinite dimensions. ValueError, naming it, where no rule covers it."""
    kind = KINDS.get(tuple(dim.infinite for dim in shape))
    sizes = " x ".join(f"{dim.size}{' (infinite)' if dim.infinite else ''}" for dim in shape)
    if kind is None:
        raise ValueError(f"{name} of {sizes}: no muP rule for parameters of {len(shape)} dimensions")
    if kind == "output" and name != "lm_head.weight":
        raise ValueError(f"{name} of {sizes}: maps width to a finite size, but only lm_head has an output multiplier")
    expected = _expected(name)
    if expected is not None and kind != expected:
        raise ValueError(f"{name} of {sizes}: its dimensions make it {kind}, its name {expected}")
    return kind


def _expected(name: str) -> Kind | None:
    """What a parameter of this name must be; a second opinion, should the comparison of shapes have gone wrong."""
    if name == "lm_head.weight":
        return "output"
    if name.startswith(("transformer.wte.", "transformer.value_embeds.", "transformer.ngram_embeds.")):
        return "input"
    if name.startswith("transformer.h.") and name.split(".")[-2].startswith("c_"):
        return "hidden"
    return None


# ---- what follows


def muon_lr_factor(shape: InfShape) -> float:
    """√((out/in) / (base out/base in)), divided by what the optimizer's own √max(1, out/in) already changes of it."""
    out, into = shape
    own = math.sqrt(max(1.0, out.size / into.size)) / math.sqrt(max(1.0, out.base / into.base))
    return math.sqrt(out.growth / into.growth) / own


def mup_table(
    model_class: ModelClass, config: GPTConfig, use_muon: bool = True, spec: InitSpec | None = None
) -> dict[str, ParamScaling]:
    """How every parameter of model_class(config) goes with width, by name. Factors are 1 where the base width is the
    width, or 0. spec: how weights are drawn (default: as init_weights does).

    ValueError for a parameter that no rule covers, UserError for a base width that the heads do not divide.
    """
    shapes, spec = inf_shapes(model_class, config), spec or InitSpec()
    return {name: _scaling(name, shape, config, use_muon, spec) for name, shape in shapes.items()}


def _scaling(name: str, shape: InfShape, config: GPTConfig, use_muon: bool, spec: InitSpec) -> ParamScaling:
    kind = classify(name, shape)
    std = init_std(name, shape[0].size, shape[1].size, config, spec) if len(shape) == 2 else 0.0
    eps = config.width_multiplier if any(dim.infinite for dim in shape) else 1.0
    if name.startswith(("transformer.h.", "transformer.value_embeds.")):  # gradients that come through a branch
        eps *= config.branch_multiplier
    if kind == "output":
        return ParamScaling(kind, "adamw", std, eps=eps, multiplier=config.width_multiplier)
    if kind != "hidden":
        return ParamScaling(kind, "adamw", std, eps=eps)
    lr = muon_lr_factor(shape) if use_muon else 1.0 / shape[1].growth
    multiplier = config.branch_multiplier if name.endswith("c_proj.weight") else 1.0
    optimizer: Literal["muon", "adamw"] = "muon" if use_muon else "adamw"
    return ParamScaling(kind, optimizer, std, lr, 1.0 if use_muon else eps, 1.0 / lr, multiplier)


# ---- to be read


def as_records(
    model_class: ModelClass, config: GPTConfig, use_muon: bool = True, spec: InitSpec | None = None
) -> list[dict[str, Any]]:
    """The table to be stored and shown: one record for all layers where it is the same in them."""
    shapes = inf_shapes(model_class, config)
    table = mup_table(model_class, config, use_muon, spec)
    merged = Counter((re.sub(r"\.\d+\.", ".*.", name), shapes[name], scaling) for name, scaling in table.items())
    return [
        {
            "parameter": name,
            "count": count,
            "fans": " x ".join(f"{dim.size}" for dim in shape),
            "at base": " x ".join(f"{dim.base}" for dim in shape),
            "infinite": " x ".join("∞" if dim.infinite else "·" for dim in shape),
            **dataclasses.asdict(scaling),
        }
        for (name, shape, scaling), count in merged.items()
    ]


def format_table(records: list[dict[str, Any]]) -> str:
    """Lines of as_records, in columns; fans are out x in."""
    shown = ([f"{value:.4g}" if isinstance(value, float) else str(value) for value in record.values()]
             for record in records)  # fmt: skip
    cells = [list(records[0]), *shown]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
