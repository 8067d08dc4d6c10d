"""The model's shape, its first weights, and the flags that fix both.

GPTConfig says what GPT computes, InitSpec how its weights are drawn. ArchFlags are the command line's view of both: a
flag that is not given has the value that --arch gives it (ARCHS, over the classic's). `resolve` fills these in, once;
`build_config` and `init_spec` take resolved flags.
"""

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast, get_args

from nanochat.cli import float_flag, int_flag, seed_flag
from nanochat.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Arch = Literal["nanochat", "speedrun", "ngram"]
Init = Literal["uniform", "spectral"]
ValueEmbeds = Literal["none", "ends", "layers", "gated"]
F = TypeVar("F", bound="ArchFlags")

MOST_POSITIONS = 2**20  # in a row: ten times as many get rotary tables
NGRAMS = (0, 2, 3, 4)  # what ngram_embeds may be
LOOK_BACK = max(NGRAMS) - 1  # tokens that the KV cache remembers
MOST_NGRAM_HEADS = 8  # more have no factors for their hashes
GATE_CHANNELS = 12  # of the stream that gates look at: enough, and next to nothing to compute


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the shapes and the function of the model. The defaults are the classic architecture.

    Every architecture has rotary positions (arXiv 2104.09864), QK-norm (arXiv 2010.04245), grouped key/value heads
    (arXiv 2305.13245), squared ReLU (Primer, arXiv 2109.08668), RMSNorm (arXiv 1910.07467) without parameters, and
    softcapped logits (Gemma 2, arXiv 2408.00118). Value embeddings are those of ResFormer (arXiv 2410.17897),
    n-gram embeddings those of arXiv 2501.16975 and 2601.07372, the other features those of the modded-nanogpt
    speedrun's records; ArchFlags, which has flags of their names, explains them.
    """

    sequence_len: int = 2048  # longest training row, in tokens
    vocab_size: int = 65536  # entries of the embedding and the head
    n_layer: int = 20  # transformer blocks
    n_head: int = 10  # query heads
    n_kv_head: int = 10  # key/value heads; n_head must be a multiple
    n_embd: int = 1280  # width of the residual stream; n_head must divide it
    window_pattern: str = "L"
    long_window: int = -1
    short_window: int = -1
    document_token: int = -1  # that starts a document: attention does not look beyond it; -1: it runs over documents
    rotary_base: float = 10_000.0
    rotary_half: bool = False
    attn_scale: float = 0.0  # factor on the attention logits; 0 = 1/sqrt(head_dim)
    logit_scale: float = 1.0  # factor between lm_head and the softcap, at width mup_base_width where that is given
    unet: bool = False
    x0_shortcut: bool = False
    value_embeds: ValueEmbeds = "none"
    ngram_embeds: int = 0  # longest run of tokens that has hashed embeddings; 0 = none
    ngram_slots: int = 5  # slots of each of their tables, in vocabularies
    ngram_heads: int = 1  # hashes of each n-gram, each for some of the channels: two n-grams rarely share all of them
    key_offset: bool = False
    attn_gate: bool = False
    smear: bool = False
    backout: bool = False
    attention_free_layer: int = -1  # layer without attention; -1 = none
    mup_base_width: int = 0  # at which muP and the standard parametrisation agree (nanochat.mup); 0 = the latter
    mup_base_depth: int = 0  # at which residual branches have weight 1 (CompleteP, arXiv 2505.01618); 0 = everywhere

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # what comes from a file may be anything
            value, default = getattr(self, field.name), cast(Any, field.default)
            least = min(default, 0) if default in (-1, 0) or field.name in ("n_layer", "logit_scale") else 1
            most = MOST_POSITIONS if field.name == "sequence_len" else 2**31 - 1
            if type(value) in (int, float) and not least <= value <= most:  # nor is NaN
                raise UserError(f"{field.name}={value} is not between {least} and {most}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd={self.n_embd} must be an even multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.value_embeds not in get_args(ValueEmbeds):
            raise UserError(f"value_embeds={self.value_embeds!r}: use one of {', '.join(get_args(ValueEmbeds))}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"window_pattern={self.window_pattern!r}: use the letters S (short) and L (long), as in SSSL"
            )
        for name in ("rotary_half", "key_offset"):
            if getattr(self, name) and self.head_dim % 4:
                raise UserError(f"{name} needs a head_dim that divides by 4, not {self.head_dim}")
        if self.ngram_embeds not in NGRAMS:
            raise UserError(f"ngram_embeds={self.ngram_embeds}: use one of {', '.join(map(str, NGRAMS))}")
        if self.ngram_embeds and self.n_embd % self.ngram_heads:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of ngram_heads={self.ngram_heads}")
        if self.ngram_heads > MOST_NGRAM_HEADS:
            raise UserError(f"ngram_heads={self.ngram_heads} is not between 1 and {MOST_NGRAM_HEADS}")
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
        """Weight of what a block adds to the stream: falls with 1/depth under CompleteP."""
        return self.mup_base_depth / self.n_layer if self.mup_base_depth else 1.0

    @property
    def value_embed_std(self) -> float:
        """Of the initial value embeddings: as the embedding's (records), or the value projection's at width 768."""
        return 768**-0.5 if self.value_embeds == "gated" else 1.0

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
        if self.value_embeds == "layers":
            return layer - (0 <= self.attention_free_layer < layer)
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
    seed: int = 42  # each parameter has a generator of its own, seeded by this and its name
    head_std: float = 0.001  # of lm_head, at every width; 0: the first loss is ln(vocab_size) exactly
    zero_proj: bool = True  # projections back into the stream (c_proj) begin at 0: each block starts as the identity
    gain: float = 1.0  # factor on the std of hidden matrices


# What learned scalars begin with.
CONSTANTS = {
    "value_lambdas": 0.5,
    "resid_lambdas": 1.0,
    "x0_lambdas": 0.0,
    "ngram_lambdas": 0.1,
    "skip_weights": 1.0,
    "smear_lambda": 0.0,
    "backout_lambda": 0.0,
}


def init_std(name: str, fan_out: int, fan_in: int, config: GPTConfig, spec: InitSpec) -> float:
    """Standard deviation of a matrix or table when it is drawn; 0: zeros. ValueError where no rule is for it."""
    part = name.removesuffix(".weight").split(".")[-1]
    if part.endswith("gate") or (part == "c_proj" and spec.zero_proj) or name.startswith("transformer.ngram_embeds."):
        return 0.0
    if name == "transformer.wte.weight":
        return 1.0
    if name.startswith("transformer.value_embeds."):
        return config.value_embed_std
    if name == "lm_head.weight":
        return spec.head_std
    if part not in ("c_q", "c_k", "c_v", "c_fc", "c_proj"):
        raise ValueError(f"{name}: no rule says how to initialise it")
    aspect = min(1.0, math.sqrt(fan_out / fan_in)) if spec.init == "spectral" else 1.0
    return spec.gain * (1 / math.sqrt(fan_in) * aspect)


def init_parameter(name: str, values: "Tensor", config: GPTConfig, spec: InitSpec) -> None:
    """Fill the full (unsharded) values of the parameter called `name`. They depend on nothing but seed, name and shape,
    whatever else exists and in whatever order parameters are drawn.

        lm_head                     normal, head_std
        wte                         normal, 1
        value_embeds                normal, config.value_embed_std
        c_q c_k c_v c_fc c_proj     as `init` says, times gain; c_proj 0 with zero_proj
        gates                       0: the factor 1
        ngram_embeds                0
        learned scalars             CONSTANTS
    """
    if (part := name.split(".")[-1]) in CONSTANTS:
        values.fill_(CONSTANTS[part])
        return
    if (std := init_std(name, values.size(0), values.size(-1), config, spec)) == 0:
        values.zero_()
        return
    import torch

    generator = torch.Generator(device=values.device).manual_seed(spec.seed ^ zlib.crc32(name.encode()))
    if spec.init == "uniform" and name.split(".")[-2].startswith("c_"):
        values.uniform_(-math.sqrt(3.0) * std, math.sqrt(3.0) * std, generator=generator)
    else:
        values.normal_(0.0, std, generator=generator)


# ---- architectures by name

# What the classic is trained with, at the batch and horizon of TUNED_AT; weights of AdamW at width 768.
LEARNING_RATES = {
    "matrix_lr": 0.02,
    "embedding_lr": 0.2,
    "unembedding_lr": 0.004,
    "scalar_lr": 0.04,
    "value_embedding_lr": 0.2,
}
# Fields of GPTConfig that are flags of the same name.
FEATURES = ("window_pattern", "long_window", "short_window", "rotary_base", "rotary_half", "attn_scale", "unet",
            "x0_shortcut", "value_embeds", "ngram_embeds", "ngram_slots", "ngram_heads", "key_offset", "attn_gate",
            "smear", "backout")  # fmt: skip
CLASSIC: dict[str, Any] = {
    **{name: getattr(GPTConfig, name) for name in FEATURES},
    **LEARNING_RATES,
    "document_mask": False,
    "scaled_logits": False,
    "drop_attention": False,
    "head_init_std": 0.0,
    "init_gain": 1.0,
    "grad_clip": 1.0,
    "warmdown_ratio": 0.2,
    "final_lr_frac": 0.0,
    "window_warmup": False,
    "table_decay": 0.0,
}
# Record 26 of the modded-nanogpt speedrun: 12 layers, 768 wide, 275.7 million parameters with 50,304 tokens.
SPEEDRUN: dict[str, Any] = {
    "window_pattern": "LSSSLSSLSSSL",
    "long_window": 1792,
    "short_window": 896,
    "document_mask": True,
    "rotary_base": 1024.0,
    "rotary_half": True,
    "attn_scale": 0.12,
    "scaled_logits": True,
    "unet": True,
    "x0_shortcut": True,
    "value_embeds": "ends",
    "drop_attention": True,
    "matrix_lr": 0.05,
    "embedding_lr": 0.6,
    "unembedding_lr": 0.22,
    "value_embedding_lr": 0.6,
    "init_gain": 0.5,
    "grad_clip": 0.0,
    "warmdown_ratio": 0.45,
    "final_lr_frac": 0.1,
    "window_warmup": True,
}
# Where an architecture differs from the classic.
ARCHS: dict[Arch, dict[str, Any]] = {
    # what the published sizes and losses are of
    "nanochat": {},
    "speedrun": SPEEDRUN,
    # what learned most from each token of all that was tried (docs/decisions.md)
    "ngram": {**SPEEDRUN, "ngram_embeds": 4, "value_embeds": "layers", "key_offset": True, "table_decay": 12.0},
}
# Layers up to which the ngram preset gives each a value table of its own. Deeper models have those of "ends": 16 more
# would be 1.3 billion parameters at d20 with 65,536 entries.
MOST_VALUE_TABLES = 12
# (tokens a step, tokens of the run) that the rates were tuned with; see schedule.batch_lr_scale
TUNED_AT: dict[Arch, tuple[int, float]] = {
    "nanochat": (2**19, 11.2e9),
    "speedrun": (393_216, 688e6),
    "ngram": (393_216, 688e6),
}


@dataclass(frozen=True, kw_only=True)
class ArchFlags:
    """Flags that fix the model, its first weights and what they are trained with; None: as --arch has it."""

    arch: Arch = "nanochat"
    """nanochat: the classic; speedrun: modded-nanogpt's record 26; ngram: that with hashed n-gram embeddings and a key
    offset and, up to 12 layers, value embeddings of each layer's own: best at equal tokens. Each feature is a flag."""
    depth: Annotated[int, int_flag(gte=1, lte=128)] = 20
    """Transformer layers; the one dial."""
    aspect_ratio: Annotated[int, int_flag(gte=1)] = 64
    """Width per layer: n_embd = depth x aspect_ratio, rounded up to a multiple of head_dim."""
    width: Annotated[int | None, int_flag(gte=1)] = None
    """n_embd itself, a multiple of head_dim; default: from depth and aspect_ratio."""
    head_dim: Annotated[int, int_flag(gte=2)] = 128
    """Width of one attention head."""
    max_seq_len: Annotated[int, int_flag(gte=1)] = 2048
    """Tokens in a training row."""

    # ---- features
    window_pattern: str | None = None
    """Attention window of each layer, tiled: L = long_window, S = short_window (SSSL, for example); the last is L."""
    long_window: Annotated[int | None, int_flag(gte=-1)] = None
    """Tokens before its own that a query sees in layers of the letter L; -1: all."""
    short_window: Annotated[int | None, int_flag(gte=-1)] = None
    """The same for the letter S; -1: a quarter of the row, in steps of 128."""
    window_warmup: bool | None = None
    """Let the windows grow from 128 tokens to their full length over the run; needs a long_window."""
    document_mask: bool | None = None
    """Attention stays within the document."""
    rotary_base: Annotated[float | None, float_flag(gte=1)] = None
    """Rotary frequencies go from 1 down to about 1/rotary_base radians a token."""
    rotary_half: bool | None = None
    """Half of the rotary dimensions carry no position."""
    attn_scale: Annotated[float | None, float_flag(gte=0)] = None
    """Factor on attention logits at head_dim 128, goes with 1/head_dim; 0: 1/sqrt(head_dim)."""
    scaled_logits: bool | None = None
    """Divide the logits by the square root of the width (with --mup: of the base width)."""
    unet: bool | None = None
    """The second half of the layers also gets the outputs of the first, in reverse order, times learned weights."""
    x0_shortcut: bool | None = None
    """Each block's input is a learned mix of the residual stream and the embedding."""
    value_embeds: ValueEmbeds | None = None
    """Embeddings of the tokens that join the values: ends = three tables, used by the first and again by the last three
    layers; layers = one for each layer; gated = one with a learned gate for every second layer."""
    ngram_embeds: Annotated[int | None, int_flag(gte=0, lte=4)] = None
    """Hashed embeddings of each token with the one before it (2), with the two before it (3) and with three (4), added
    to the stream in front of every layer; 0: none."""
    ngram_slots: Annotated[int | None, int_flag(gte=1)] = None
    """Slots of each of their tables, in vocabularies (5)."""
    ngram_heads: Annotated[int | None, int_flag(gte=1, lte=8)] = None
    """Hashes of each n-gram, each for its share of the channels (1)."""
    key_offset: bool | None = None
    """The slower half of each key is the token before's: finding what followed it earlier takes one layer."""
    attn_gate: bool | None = None
    """A learned gate on each head's output, from the first 12 channels of its input."""
    smear: bool | None = None
    """Each embedding takes up a learned share of the one before it."""
    backout: bool | None = None
    """Take the stream of two thirds of the way out again before the head, times a learned weight."""
    drop_attention: bool | None = None
    """Leave out attention in one layer, seven twelfths of the way up; in models of at least 12 layers."""

    # ---- width and depth that transfer (nanochat.mup)
    mup: bool = False
    """Maximal update parametrisation: the rates that are best at base_width are best at every width."""
    base_width: Annotated[int | None, int_flag(gte=1)] = None
    """Width at which muP and the standard parametrisation are the same (768); with --mup."""
    base_depth: Annotated[int, int_flag(gte=0)] = 0
    """Depth at which residual branches have weight 1, deeper models less (CompleteP); 0: everywhere; with --mup."""

    # ---- first weights
    init: Init = "uniform"
    """How matrices are drawn: uniform, or spectral = 1/sqrt(fan_in) x min(1, sqrt(fan_out/fan_in))."""
    init_gain: Annotated[float | None, float_flag(gte=0)] = None
    """Factor on the standard deviation of hidden matrices."""
    head_init_std: Annotated[float | None, float_flag(gte=0)] = None
    """Standard deviation of the head, the same at every width; 0: the first loss is ln(vocabulary)."""
    zero_proj: bool = True
    """Projections back into the stream begin at zero; False: like other hidden matrices."""
    seed: Annotated[int, seed_flag()] = 42
    """Seed of the initial weights and the order of the data."""

    # ---- rates, at the batch and horizon that they were tuned with
    matrix_lr: Annotated[float | None, float_flag(gte=0)] = None
    """Muon learning rate of the matrices (0.02; speedrun, ngram 0.05); all rates follow batch and horizon."""
    embedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """AdamW rate of the embedding at width 768 (0.2; speedrun, ngram 0.6); goes with width^-0.5, not under muP."""
    unembedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """The same of the head (0.004; speedrun, ngram 0.22)."""
    value_embedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """The same of value and n-gram embeddings (0.2; speedrun, ngram 0.6)."""
    scalar_lr: Annotated[float | None, float_flag(gte=0)] = None
    """AdamW learning rate of learned scalars and gates (0.04), at every width."""
    use_muon: bool = True
    """False: AdamW for the matrices too, at matrix_lr x 0.05 x 768/width."""
    weight_decay: Annotated[float, float_flag(gte=0)] = 0.0
    """Weight decay of the matrices, times their learning rate; with Muon only where it agrees with the step."""
    grad_clip: Annotated[float | None, float_flag(gte=0)] = None
    """Largest global gradient norm (1; speedrun 0); 0: no clipping."""
    table_decay: Annotated[float | None, float_flag(gte=0)] = None
    """Powers of e by which value and n-gram tables decay in a pass through the text, where a run makes three or more;
    less below that, none in one: else what is read again is learnt by heart (0; ngram 12)."""
    warmup_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.0
    """Share of the steps over which the learning rate rises."""
    warmdown_ratio: Annotated[float | None, float_flag(gte=0, lte=1)] = None
    """Share of the steps over which it falls at the end (0.2; speedrun 0.45)."""
    final_lr_frac: Annotated[float | None, float_flag(gte=0, lte=1)] = None
    """Where it falls to, as a share of the full rate (0; speedrun 0.1)."""


def resolve(flags: F) -> F:
    """The same flags with what was left to --arch filled in. UserError where flags contradict each other."""
    preset = {**CLASSIC, **ARCHS[flags.arch]}
    if flags.arch == "ngram" and flags.depth > MOST_VALUE_TABLES:
        preset["value_embeds"] = "ends"
    flags = dataclasses.replace(flags, **{name: preset[name] for name in preset if getattr(flags, name) is None})
    if flags.window_warmup and (flags.long_window or -1) < 1:
        raise UserError("--window-warmup needs windows that end somewhere: give --long-window, or --no-window-warmup")
    for name in ("base_width", "base_depth"):
        if (value := getattr(flags, name)) and not flags.mup:
            raise UserError(f"--{name.replace('_', '-')}={value} does nothing without --mup: add it")
    if flags.mup and flags.base_width is None:
        flags = dataclasses.replace(flags, base_width=768)
    if (base := flags.base_width) and base % flags.head_dim:
        raise UserError(f"--base-width={base} is no multiple of --head-dim={flags.head_dim}")
    return flags


def build_config(flags: ArchFlags, vocab_size: int, document_token: int = -1) -> GPTConfig:
    """What follows from resolved flags. document_token: what each document starts with, -1 where nothing does."""
    assert flags.window_pattern is not None, "resolve the flags first"
    head_dim = flags.head_dim
    width = flags.width or -(-flags.depth * flags.aspect_ratio // head_dim) * head_dim
    if width % head_dim:
        below = width // head_dim * head_dim
        near = f"{below} or {below + head_dim}" if below else str(head_dim)
        raise UserError(f"--width={width} is no multiple of --head-dim={head_dim}: use {near}")
    if flags.document_mask and document_token < 0:
        raise UserError("--document-mask: the data does not say which token starts a document")
    features = {name: getattr(flags, name) for name in FEATURES}
    if not features["ngram_embeds"]:
        features["ngram_slots"] = GPTConfig.ngram_slots  # says nothing: still the classic
    features["attn_scale"] *= 128 / head_dim  # queries and keys are normed: logits are at most head_dim x scale
    return GPTConfig(
        sequence_len=flags.max_seq_len,
        vocab_size=vocab_size,
        n_layer=flags.depth,
        n_head=width // head_dim,
        n_kv_head=width // head_dim,
        n_embd=width,
        document_token=document_token if flags.document_mask else -1,
        logit_scale=1 / math.sqrt(flags.base_width or width) if flags.scaled_logits else 1.0,
        attention_free_layer=7 * flags.depth // 12 if flags.drop_attention and flags.depth >= 12 else -1,
        mup_base_width=flags.base_width or 0,
        mup_base_depth=flags.base_depth,
        **features,
    )


def init_spec(flags: ArchFlags) -> InitSpec:
    """How the weights of resolved flags are drawn."""
    assert flags.head_init_std is not None and flags.init_gain is not None, "resolve the flags first"
    return InitSpec(flags.init, flags.seed, flags.head_init_std, flags.zero_proj, flags.init_gain)
