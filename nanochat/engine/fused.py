"""A model's decoding step in few kernels (nanochat.kernels.decode)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.engine.kv_cache import KVCache
from nanochat.gpt import GPT, LOGIT_CAP, NO_TOKEN, Block, ForwardContext, gate
from nanochat.kernels import decode
from nanochat.kernels.pointwise import norm
from nanochat.loss import softcap


def linear(
    x: Tensor,
    weight: Tensor,
    normed: bool = False,
    square: bool = False,
    add: Tensor | None = None,
    factor: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """y = x (R, K), normed or not, @ weight (N, K).T, and of it relu(y)^2, add + factor * y, or in fp32
    cap * tanh(factor * y / cap): (R, N)."""
    if len(x) == 1:
        return decode.product(x, weight, normed, square, add, factor, cap)
    y = F.linear(norm(x) if normed else x, weight)
    if cap:
        return softcap(y.float(), cap, factor)
    if square:
        return F.relu(y).square()
    return y if add is None else torch.add(add, y, alpha=factor)


def fuse(model: GPT) -> None:
    """Give an inference copy a `step`, which reads one token of each row."""
    model.step = Fused(model).step  # type: ignore[assignment]


class Fused:
    def __init__(self, model: GPT) -> None:
        self.model = model
        self.blocks = [FusedBlock(block, model) for block in model.transformer.h]  # type: ignore[union-attr]

    def step(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) in fp32 after idx (B, 1), as the model gives them but for rounding, in a cache that is
        `fixed`."""
        model, config = self.model, self.model.config
        if config.document_token >= 0:
            begins = idx[:, 0] == config.document_token
            cache.document_starts.copy_(torch.where(begins, cache.begin(1)[:, 0], cache.document_starts))
        joined = model.tokens_before(idx, cache, 1)[1] != NO_TOKEN if config.key_offset else None
        ctx = ForwardContext(model.cos, model.sin, (None, None), joined, cache)
        x = model.run_blocks(model.embed(idx, cache), idx, ctx, self.blocks)
        if config.smear or config.ngram_embeds or config.key_offset:
            cache.note_tokens(idx)
        cache.advance(1)
        return linear(x[:, 0], model.lm_head.weight, normed=True, factor=config.logit_multiplier, cap=LOGIT_CAP)


class FusedBlock:
    """A block for one token of each row. Its weights stay where they are, but for those of queries, keys and values,
    which become parts of one matrix."""

    def __init__(self, block: Block, model: GPT) -> None:
        self.block, self.has_documents = block, model.config.document_token >= 0
        self.space: dict[int, tuple[Tensor, Tensor]] = {}
        if hasattr(block, "attn"):
            parts = block.attn.c_q, block.attn.c_k, block.attn.c_v
            self.qkv = torch.cat([part.weight for part in parts])
            for part, weight in zip(parts, self.qkv.split([part.out_features for part in parts]), strict=True):
                part.weight = nn.Parameter(weight, requires_grad=False)

    def __call__(self, x: Tensor, value_embed: Tensor | None, ctx: ForwardContext) -> Tensor:
        x, block = x[:, 0], self.block
        if hasattr(block, "attn"):
            y = self.attention(x, value_embed, ctx)
            x = linear(y, block.attn.c_proj.weight, add=x, factor=block.multiplier)
        hidden = linear(x, block.mlp.c_fc.weight, normed=True, square=True)
        return linear(hidden, block.mlp.c_proj.weight, add=x, factor=block.multiplier).unsqueeze(1)

    def attention(self, x: Tensor, value_embed: Tensor | None, ctx: ForwardContext) -> Tensor:
        """(B, C), of x (B, C), before c_proj."""
        attn, cache, B = self.block.attn, ctx.kv_cache, len(x)
        assert isinstance(cache, KVCache)
        heads = [part.out_features // attn.head_dim for part in (attn.c_q, attn.c_k, attn.c_v)]
        q, k, v = linear(x, self.qkv, normed=True).view(B, sum(heads), attn.head_dim).split(heads, dim=1)
        x = norm(x).unsqueeze(1) if value_embed is not None or hasattr(attn, "gate") else x
        if value_embed is not None:
            v = attn.join(v.unsqueeze(1), value_embed.view(B, 1, *v.shape[1:]), x)[:, 0]
        if B not in self.space:
            self.space[B] = decode.scratch(B, heads[0], heads[1], attn.head_dim, x.device)
        first = cache.document_starts if self.has_documents else None
        joined = None if ctx.joined is None else ctx.joined[:, 0]
        y = decode.attend(
            q, k, v, cache, attn.layer, attn.window, first, joined, ctx.cos, ctx.sin, attn.scale, self.space[B]
        )
        if hasattr(attn, "gate"):
            y = (y.view(B, 1, heads[0], -1) * gate(attn.gate, x)).view(B, -1)
        return y
