"""The model: a decoder-only transformer, and nothing about devices, meshes or optimizers.

The classic nanochat architecture: rotary positions, QK-norm, untied embeddings, squared ReLU, RMSNorm without
parameters (also right after the embedding), softcapped logits, no biases, grouped key/value heads and a pattern of
attention windows. Weights are kept in fp32 and cast to `compute_dtype` where they are used.
"""

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.attention import causal_attention
from nanochat.errors import UserError
from nanochat.loss import Reduction, fused_head_loss, head_loss, softcap

if TYPE_CHECKING:  # the cache and the optimizer know the model, not the other way round
    from nanochat.engine import KVCache
    from nanochat.optim import MuonAdamW

Init = Literal["uniform", "spectral"]
LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0
ROTARY_MARGIN = 10  # the rotary table covers this many times sequence_len, so that generation may run past it


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
    """Attention window of each layer, tiled over the layers: L = all of the past, S = a quarter of sequence_len."""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd={self.n_embd} must be an even multiple of n_head={self.n_head}")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"window_pattern={self.window_pattern!r}: use the letters S (short) and L (long), as in SSSL"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def window(self, layer: int) -> int:
        """How many positions before its own a query of this layer sees; -1 = all. The last layer always sees all."""
        letter = self.window_pattern[layer % len(self.window_pattern)]
        if letter == "L" or layer == self.n_layer - 1:
            return -1
        return min(self.sequence_len, math.ceil(self.sequence_len / 4 / 128) * 128)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, no parameters, fp32 machine epsilon."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (1, length, 1, head_dim/2), fp32 (bf16 tables alone move fp32 logits
    by 2e-3)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), ROTARY_BASE**-exponent)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, H, D): pairs (i, i + D/2) turned by -angle (the sense published weights use)."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """Bias-free linear map with an fp32 weight that multiplies in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Head(Linear):
    """The output projection: hidden states to logits, or straight to their loss."""

    def summed_loss(self, hidden: Tensor, targets: Tensor, weights: Tensor, cap: float) -> Tensor:
        """Summed cross-entropy of softcapped logits, with gradients, see nanochat.loss. A method of its own, so that
        what gathers sharded weights before a module's forward() can do so here."""
        return fused_head_loss(hidden, self.weight, targets, weights, cap)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window(layer)
        self.head_dim = config.head_dim
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: "KVCache | None") -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_dim)
        k = self.c_k(x).view(B, T, -1, self.head_dim)
        v = self.c_v(x).view(B, T, -1, self.head_dim)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))  # QK-norm keeps the attention logits bounded
        starts = None
        if kv_cache is not None:
            k, v = kv_cache.insert(self.layer, k, v)
            starts = kv_cache.starts
        return self.c_proj(causal_attention(q, k, v, self.window, starts).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: "KVCache | None") -> Tensor:
        x = x + self.attn(norm(x), cos, sin, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Build on any device (`meta` for large sizes), then `to_empty(device=...)` if meta, then `init_weights()`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            }
        )
        self.lm_head = Head(config.n_embd, config.vocab_size)
        cos, sin = rotary_tables(config.sequence_len * ROTARY_MARGIN, config.head_dim, self.lm_head.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, init: Init = "uniform", seed: int = 42) -> None:
        """Fill every parameter and buffer.

        wte: normal, std 1. Projections back into the residual stream (c_proj) and lm_head: zero, so that every block
        starts as the identity and the first loss is ln(vocab_size) exactly. All other matrices: std = 1/√fan_in
        ("uniform": drawn from ±√3·std, no outliers) or 1/√fan_in · min(1, √(fan_out/fan_in)) ("spectral": normal;
        arXiv 2310.17813). Each parameter has a generator of its own, seeded by its name, so that it gets the same
        values whatever else exists and in whatever order parameters are made.
        """
        for name, param in self.named_parameters():
            self.init_parameter(name, param, init, seed)
        self.init_buffers()

    @staticmethod
    def init_parameter(name: str, values: Tensor, init: Init, seed: int) -> None:
        """Fill the whole values of the parameter called `name` (see init_weights)."""
        generator = torch.Generator(device=values.device).manual_seed(seed ^ zlib.crc32(name.encode()))
        if name == "transformer.wte.weight":
            values.normal_(0.0, 1.0, generator=generator)
        elif name == "lm_head.weight" or name.endswith("c_proj.weight"):
            values.zero_()
        elif init == "uniform":
            bound = math.sqrt(3.0 / values.size(1))
            values.uniform_(-bound, bound, generator=generator)
        else:
            fan_out, fan_in = values.shape
            values.normal_(0.0, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in), generator=generator)

    def init_buffers(self) -> None:
        """Rotary tables again: `to_empty` leaves them undefined, and checkpoints do not hold them."""
        length = self.config.sequence_len * ROTARY_MARGIN
        self.cos, self.sin = rotary_tables(length, self.config.head_dim, self.lm_head.weight.device)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: "KVCache | None" = None,
        loss_reduction: Reduction = "mean",
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in fp32 for idx (B, T); with targets (B, T; -1 = no loss) the cross-entropy in nats instead,
        a scalar, or (B*T,) for loss_reduction="none", each loss times its weight in loss_weights (B, T) if given. With
        a KV cache, idx continues what the cache holds."""
        T = idx.size(1)
        start = kv_cache.get_pos() if kv_cache is not None else 0
        if start + T > self.cos.size(1):
            raise UserError(f"{start + T} tokens are more than the {self.cos.size(1)} positions of the rotary table")
        cos, sin = self.cos[:, start : start + T], self.sin[:, start : start + T]
        x = norm(self.transformer.wte(idx).to(self.compute_dtype))  # type: ignore[operator]
        for block in self.transformer.h:  # type: ignore[union-attr]
            x = block(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        x = norm(x)
        if targets is not None:
            weights = loss_weights.flatten() if loss_weights is not None else None
            return head_loss(x.flatten(0, 1), self.lm_head, targets.flatten(), LOGIT_CAP, loss_reduction, weights)
        return softcap(self.lm_head(x).float(), LOGIT_CAP)

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def num_params(self) -> int:
        """All parameters, embeddings included."""
        return sum(param.numel() for param in self.parameters())

    def estimate_flops(self, row_len: int | None = None) -> float:
        """FLOPs per token of forward and backward: 6 x matmul parameters (lm_head counted, the embedding look-up not)
        + 12 x heads x head_dim x attention span of each layer, in rows of row_len tokens (default: sequence_len).
        Causal attention is not halved (PaLM, appendix B)."""
        row_len = self.config.sequence_len if row_len is None else row_len
        matmul_params = self.num_params() - self.transformer.wte.weight.numel()  # type: ignore[union-attr, operator]
        spans = 0
        for layer in range(self.config.n_layer):
            window = self.config.window(layer)
            spans += row_len if window < 0 else min(window, row_len)
        return 6.0 * matmul_params + 12.0 * self.config.n_embd * spans

    def setup_optimizer(
        self,
        matrix_lr: float = 0.02,
        embedding_lr: float = 0.2,
        unembedding_lr: float = 0.004,
        weight_decay: float = 0.0,
        use_muon: bool = True,
    ) -> "MuonAdamW":
        """One optimizer over all parameters: see nanochat.param_groups.gpt_optimizer."""
        from nanochat.param_groups import gpt_optimizer

        return gpt_optimizer(self, matrix_lr, embedding_lr, unembedding_lr, weight_decay, use_muon)
