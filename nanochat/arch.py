"""Architectures by name, each a set of features that can be switched on and off alone.

    nanochat    the classic: what the published sizes and losses are of
    speedrun    record 26 of the modded-nanogpt speedrun (12 layers, 768 wide: 275.7 million parameters with 50,304
                tokens), with the rates and the schedule that it was tuned with

A flag that is not given has the value that --arch gives it. What the features are, nanochat.model_config says.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from nanochat.cli import float_flag, int_flag
from nanochat.errors import UserError
from nanochat.model_config import VALUE_EMBED_STD, GPTConfig, Init, InitSpec, ValueEmbeds

Arch = Literal["nanochat", "speedrun"]
S = TypeVar("S", bound="ArchSettings")

FEATURES: dict[Arch, dict[str, Any]] = {
    "nanochat": {
        "window_pattern": "L",
        "long_window": -1,
        "short_window": -1,
        "document_mask": False,
        "rotary_base": 10_000.0,
        "rotary_half": False,
        "attn_scale": 0.0,
        "scaled_logits": False,
        "unet": False,
        "x0_shortcut": False,
        "value_embeds": "none",
        "attn_gate": False,
        "smear": False,
        "backout": False,
        "drop_attention": False,
    },
    "speedrun": {
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
        "attn_gate": False,
        "smear": False,
        "backout": False,
        "drop_attention": True,
    },
}
ARCH_RATES: dict[Arch, dict[str, float]] = {
    "nanochat": {
        "matrix_lr": 0.02,
        "embedding_lr": 0.2,
        "unembedding_lr": 0.004,
        "scalar_lr": 0.04,
        "value_embedding_lr": 0.2,
    },
    "speedrun": {
        "matrix_lr": 0.05,
        "embedding_lr": 0.6,
        "unembedding_lr": 0.22,
        "scalar_lr": 0.04,
        "value_embedding_lr": 0.6,
    },
}
RATES = tuple(ARCH_RATES["nanochat"])
TRAINING: dict[Arch, dict[str, Any]] = {
    "nanochat": {
        "head_init_std": 0.0,
        "init_gain": 1.0,
        "grad_clip": 1.0,
        "warmdown_ratio": 0.2,
        "final_lr_frac": 0.0,
        "window_warmup": False,
    },
    "speedrun": {
        "head_init_std": 0.0,
        "init_gain": 0.5,
        "grad_clip": 0.0,
        "warmdown_ratio": 0.45,
        "final_lr_frac": 0.1,
        "window_warmup": True,
    },
}
# (tokens a step, tokens of the run) that the rates were tuned with; see schedule.batch_lr_scale
TUNED_AT: dict[Arch, tuple[int, float]] = {"nanochat": (2**19, 11.2e9), "speedrun": (393_216, 688e6)}


@dataclass(frozen=True, kw_only=True)
class ArchSettings:
    """Flags that fix the model, its first weights and what they are trained with; None: as --arch has it."""

    arch: Arch = "nanochat"
    """nanochat: the classic; speedrun: modded-nanogpt's record 26. Each of its features is a flag of its own."""
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
    """Attention window of each layer, tiled: L = long_window, S = short_window (SSSL, for example)."""
    long_window: Annotated[int | None, int_flag(gte=-1)] = None
    """Tokens before its own that a query sees in layers of the letter L; -1: all."""
    short_window: Annotated[int | None, int_flag(gte=-1)] = None
    """The same for the letter S; -1: a quarter of the row."""
    window_warmup: bool | None = None
    """Let the windows grow from 128 tokens to their full length over the run; needs a long_window."""
    document_mask: bool | None = None
    """Attention stays within the document."""
    rotary_base: Annotated[float | None, float_flag(gte=1)] = None
    """Rotary frequencies go from 1 down to about 1/rotary_base."""
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
    """Value embeddings: ends = three tables for the first and the last three layers; gated = every second layer."""
    attn_gate: bool | None = None
    """A learned gate on each head's output."""
    smear: bool | None = None
    """Each embedding takes up some of the one before it."""
    backout: bool | None = None
    """Take the stream of two thirds of the way out again before the head."""
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
    seed: Annotated[int, int_flag(gte=0)] = 42
    """Seed of the initial weights and the order of the data."""

    # ---- rates, at the batch and horizon that they were tuned with
    matrix_lr: Annotated[float | None, float_flag(gte=0)] = None
    """Muon learning rate of the matrices (0.02; speedrun 0.05); all rates follow batch and horizon from there."""
    embedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """AdamW learning rate of the embedding at width 768 (0.2; speedrun 0.6); goes with width^-0.5, not under muP."""
    unembedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """The same of the head (0.004; speedrun 0.22)."""
    value_embedding_lr: Annotated[float | None, float_flag(gte=0)] = None
    """The same of value embeddings (0.2; speedrun 0.6)."""
    scalar_lr: Annotated[float | None, float_flag(gte=0)] = None
    """AdamW learning rate of learned scalars and gates (0.04), at every width."""
    use_muon: bool = True
    """False: AdamW for the matrices too, at matrix_lr x 0.05 x 768/width."""
    weight_decay: Annotated[float, float_flag(gte=0)] = 0.0
    """Weight decay of the matrices, times their learning rate; with Muon only where it agrees with the step."""
    grad_clip: Annotated[float | None, float_flag(gte=0)] = None
    """Largest global gradient norm (1; speedrun 0); 0: no clipping."""
    warmup_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 0.0
    """Share of the steps over which the learning rate rises."""
    warmdown_ratio: Annotated[float | None, float_flag(gte=0, lte=1)] = None
    """Share of the steps over which it falls at the end (0.2; speedrun 0.45)."""
    final_lr_frac: Annotated[float | None, float_flag(gte=0, lte=1)] = None
    """Where it falls to, as a share of the full rate (0; speedrun 0.1)."""


def resolve(settings: S) -> S:
    """The same settings, what was left to --arch filled in. Raises UserError where flags contradict each other."""
    preset = {**FEATURES[settings.arch], **TRAINING[settings.arch], **ARCH_RATES[settings.arch]}
    given = {name: value for name, value in preset.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **given)
    if settings.window_warmup and (settings.long_window or -1) < 1:
        raise UserError("--window-warmup needs windows that end somewhere: give --long-window, or --no-window-warmup")
    for name in ("base_width", "base_depth"):
        if (value := getattr(settings, name)) and not settings.mup:
            raise UserError(f"--{name.replace('_', '-')}={value} does nothing without --mup: add it")
    if settings.mup and settings.base_width is None:
        settings = dataclasses.replace(settings, base_width=768)
    if (base := settings.base_width) and base % settings.head_dim:
        raise UserError(f"--base-width={base} is no multiple of --head-dim={settings.head_dim}")
    return settings


def model_config(settings: ArchSettings, vocab_size: int, document_token: int = -1) -> GPTConfig:
    """Everything that follows from the flags. document_token: what each document starts with."""
    settings = resolve(settings)
    head_dim, width = settings.head_dim, settings.width
    if width is None:
        width = -(-settings.depth * settings.aspect_ratio // head_dim) * head_dim
    if width % head_dim:
        below = width // head_dim * head_dim
        near = f"{below} or {below + head_dim}" if below else str(head_dim)
        raise UserError(f"--width={width} is no multiple of --head-dim={head_dim}: use {near}")
    if settings.document_mask and document_token < 0:
        raise UserError("--document-mask: the data does not say which token starts a document")
    features = {name: getattr(settings, name) for name in FEATURES[settings.arch]}
    return _config(
        features,
        n_layer=settings.depth,
        n_embd=width,
        head_dim=head_dim,
        vocab_size=vocab_size,
        sequence_len=settings.max_seq_len,
        document_token=document_token if settings.document_mask else -1,
        mup_base_width=settings.base_width or 0,
        mup_base_depth=settings.base_depth,
    )


def arch_config(
    arch: Arch,
    *,
    n_layer: int,
    n_embd: int,
    head_dim: int,
    vocab_size: int,
    sequence_len: int,
    mup_base_width: int = 0,
    mup_base_depth: int = 0,
    document_token: int = -1,
    **changes: Any,
) -> GPTConfig:
    """GPTConfig of an architecture; changes: features (keys of FEATURES) that differ from it."""
    unknown = set(changes) - set(FEATURES[arch])
    assert not unknown, f"no such features: {unknown}"
    return _config(
        {**FEATURES[arch], **changes},
        n_layer=n_layer,
        n_embd=n_embd,
        head_dim=head_dim,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        document_token=document_token,
        mup_base_width=mup_base_width,
        mup_base_depth=mup_base_depth,
    )


def _config(features: dict[str, Any], *, n_layer: int, n_embd: int, head_dim: int, **sizes: Any) -> GPTConfig:
    features = dict(features)
    features.pop("document_mask")
    dropped = features.pop("drop_attention") and n_layer >= 12
    base = sizes["mup_base_width"] or n_embd
    return GPTConfig(
        n_layer=n_layer,
        n_head=n_embd // head_dim,
        n_kv_head=n_embd // head_dim,
        n_embd=n_embd,
        **sizes,
        attention_free_layer=7 * n_layer // 12 if dropped else -1,
        # the queries and keys are normed, so that logits are at most head_dim x scale
        attn_scale=features.pop("attn_scale") * 128 / head_dim,
        logit_scale=1 / math.sqrt(base) if features.pop("scaled_logits") else 1.0,
        **features,
    )


def init_spec(settings: ArchSettings) -> InitSpec:
    """How the weights are drawn."""
    settings = resolve(settings)
    assert settings.head_init_std is not None and settings.init_gain is not None
    return InitSpec(
        settings.init,
        settings.seed,
        settings.head_init_std,
        settings.zero_proj,
        settings.init_gain,
        VALUE_EMBED_STD[settings.value_embeds or "none"],
    )
