"""What fixes the shapes and the function of the model, and how its weights are drawn."""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat.errors import UserError

Init = Literal["uniform", "spectral"]
ValueEmbeds = Literal["none", "ends", "gated"]

GATE_CHANNELS = 12  # of the stream that gates look at: enough, and next to nothing to compute
# Of value embeddings: as the embedding's in the record, or as small as the value projection's weights at width 768.
VALUE_EMBED_STD = {"none": 1.0, "ends": 1.0, "gated": 768**-0.5}


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the shapes and the function of the model."""

    sequence_len: int = 2048
    """Longest training row, in tokens."""
    vocab_size: int = 65536
    """Entries of the embedding and the head."""
    n_layer: int = 20
    """Transformer blocks."""
    n_head: int = 10
    """Query heads."""
    n_kv_head: int = 10
    """Key/value heads; n_head must be a multiple."""
    n_embd: int = 1280
    """Width of the residual stream; n_head must divide it."""
    window_pattern: str = "L"
    """Attention window of each layer, tiled over the layers: L = long_window, S = short_window; the last is L."""
    long_window: int = -1
    """How many positions before its own a query sees in layers of the letter L; -1 = all."""
    short_window: int = -1
    """The same for the letter S; -1 = a quarter of sequence_len, in steps of 128."""
    document_token: int = -1
    """Token that starts a document: attention does not look beyond it. -1 = attention runs over documents."""
    rotary_base: float = 10_000.0
    """Rotary frequencies go from 1 down to about 1/rotary_base radians a token."""
    rotary_half: bool = False
    """Half of the frequencies are zero: those dimensions carry no position."""
    attn_scale: float = 0.0
    """Factor on the attention logits; 0 = 1/sqrt(head_dim)."""
    logit_scale: float = 1.0
    """Factor between lm_head and the softcap, at width mup_base_width where that is given."""
    unet: bool = False
    """Layer n - 1 - i also gets the output of layer i, times a learned weight, for the first half of the layers."""
    x0_shortcut: bool = False
    """The input of each block is a learned mix of the residual stream and the normed embedding."""
    value_embeds: ValueEmbeds = "none"
    """Embeddings of the tokens that join the values: ends = three tables, used by the first and again by the last three
    layers; gated = a table of its own, with a learned gate, for every second layer."""
    attn_gate: bool = False
    """A learned gate on the output of each head, from the first 12 channels of its input."""
    smear: bool = False
    """Each embedding takes up a learned share of the one before it."""
    backout: bool = False
    """What the stream held after two thirds of the layers leaves it before the head, times a learned weight."""
    attention_free_layer: int = -1
    """Layer without attention; -1 = none."""
    mup_base_width: int = 0
    """Width at which muP and the standard parametrisation agree (nanochat.mup); 0 = standard parametrisation."""
    mup_base_depth: int = 0
    """Depth at which residual branches have weight 1 (CompleteP); 0 = at every depth."""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd={self.n_embd} must be an even multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"window_pattern={self.window_pattern!r}: use the letters S (short) and L (long), as in SSSL"
            )
        if self.rotary_half and self.head_dim % 4:
            raise UserError(f"rotary_half needs a head_dim that divides by 4, not {self.head_dim}")
        if self.n_embd < GATE_CHANNELS and (self.attn_gate or self.smear or self.value_embeds == "gated"):
            raise UserError(f"n_embd={self.n_embd}: gates look at {GATE_CHANNELS} channels; make it wider")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def logit_multiplier(self) -> float:
        """Factor between lm_head and the softcap. Under muP it falls with 1/width (arXiv 2203.03466, table 8), so that
        the head's weights and their learning rate need not."""
        return self.logit_scale * self.width_multiplier

    @property
    def width_multiplier(self) -> float:
        """Base width / width under muP, else 1."""
        return self.mup_base_width / self.n_embd if self.mup_base_width else 1.0

    @property
    def branch_multiplier(self) -> float:
        """Weight of what a block adds to the stream: falls with 1/depth under CompleteP (arXiv 2505.01618)."""
        return self.mup_base_depth / self.n_layer if self.mup_base_depth else 1.0

    @property
    def masked(self) -> bool:
        """Whether attention goes by masks made from tokens and windows (else plain causal kernels will do)."""
        return self.document_token >= 0 or self.long_window >= 0

    def is_long(self, layer: int) -> bool:
        return self.window_pattern[layer % len(self.window_pattern)] == "L" or layer == self.n_layer - 1

    def window(self, layer: int) -> int:
        """How many positions before its own a query of this layer sees; -1 = all."""
        if self.is_long(layer):
            return self.long_window
        if self.short_window >= 0:
            return self.short_window
        return min(self.sequence_len, math.ceil(self.sequence_len / 4 / 128) * 128)

    def value_table(self, layer: int) -> int | None:
        """Which table of value embeddings joins the values of this layer."""
        last = self.n_layer - 1
        if layer == self.attention_free_layer or self.value_embeds == "none":
            return None
        if self.value_embeds == "gated":
            own = [i for i in range(self.n_layer) if i % 2 == last % 2 and i != self.attention_free_layer]
            return own.index(layer) if layer in own else None
        shared = min(3, self.n_layer // 2)
        if layer < shared:
            return layer
        return layer - (self.n_layer - shared) if layer > last - shared else None


@dataclass(frozen=True)
class InitSpec:
    """How weights are drawn."""

    init: Init = "uniform"
    """Hidden matrices: std = 1/sqrt(fan_in), from ±sqrt(3)·std (uniform: no outliers), or normal with
    1/sqrt(fan_in) · min(1, sqrt(fan_out/fan_in)) (spectral; arXiv 2310.17813)."""
    seed: int = 42
    """Each parameter has a generator of its own, seeded by this and its name."""
    head_std: float = 0.001
    """Of lm_head, at every width; 0: the first loss is ln(vocab_size) exactly."""
    zero_proj: bool = True
    """Projections back into the stream (c_proj) begin at zero, so that every block starts as the identity."""
    gain: float = 1.0
    """Factor on the std of hidden matrices."""
    value_embed_std: float = 1.0
    """Of value embeddings, at every width; see VALUE_EMBED_STD."""


# What learned scalars begin with.
CONSTANTS: dict[str, float] = {
    "value_lambdas": 0.5,
    "resid_lambdas": 1.0,
    "x0_lambdas": 0.0,
    "skip_weights": 1.0,
    "smear_lambda": 0.0,
    "backout_lambda": 0.0,
}


def hidden_std(fan_out: int, fan_in: int, init: Init) -> float:
    """Of a hidden matrix (fan_out, fan_in), see InitSpec."""
    std = 1 / math.sqrt(fan_in)
    return std * min(1.0, math.sqrt(fan_out / fan_in)) if init == "spectral" else std


def init_parameter(name: str, values: Tensor, spec: InitSpec) -> None:
    """Fill the whole values of the parameter called `name`. It gets the same values whatever else exists, and in
    whatever order parameters are made. Raises ValueError for one that no rule is for."""
    generator = torch.Generator(device=values.device).manual_seed(spec.seed ^ zlib.crc32(name.encode()))
    part = name.removesuffix(".weight").split(".")[-1]
    if part in CONSTANTS:
        values.fill_(CONSTANTS[part])
    elif part.endswith("gate"):
        values.zero_()
    elif name == "transformer.wte.weight":
        values.normal_(0.0, 1.0, generator=generator)
    elif name.startswith("transformer.value_embeds."):
        values.normal_(0.0, spec.value_embed_std, generator=generator)
    elif name == "lm_head.weight":
        values.normal_(0.0, spec.head_std, generator=generator)
    elif part == "c_proj" and spec.zero_proj:
        values.zero_()
    elif part in ("c_q", "c_k", "c_v", "c_fc", "c_proj"):
        std = spec.gain * hidden_std(values.size(0), values.size(1), spec.init)
        if spec.init == "uniform":
            bound = math.sqrt(3.0) * std
            values.uniform_(-bound, bound, generator=generator)
        else:
            values.normal_(0.0, std, generator=generator)
    else:
        raise ValueError(f"{name}: no rule says how to initialise it")
