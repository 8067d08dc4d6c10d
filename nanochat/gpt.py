"""The model: a decoder-only transformer, and nothing about devices, meshes or optimizer steps.

With the defaults of GPTConfig, the classic nanochat architecture. What the speedrun architecture adds is one setting
each; nanochat.config says what they are and where they come from. Weights are kept in fp32 and cast to `compute_dtype`
where they are used. Shapes: B rows, T tokens, C channels, H heads of D channels, V entries of the vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanochat import mup
from nanochat.attention import Mask, causal_attention, make_masks, masked_attention, offset_keys
from nanochat.config import GATE_CHANNELS, LEARNING_RATES, LOOK_BACK, MOST_NGRAM_HEADS, NGRAMS, InitSpec, init_parameter
from nanochat.config import GPTConfig as GPTConfig
from nanochat.dtensor import fill_rows
from nanochat.errors import UserError
from nanochat.kernels.linear import Linear
from nanochat.kernels.mlp import mlp
from nanochat.kernels.pointwise import norm, rotate_norm
from nanochat.loss import Head, Reduction, head_loss, softcap
from nanochat.optim import MuonAdamW
from nanochat.optim.param_groups import check_parametrisation, make_param_groups

LOGIT_CAP = 15.0
ROTARY_MARGIN = 10  # the rotary table covers this many times sequence_len, so that generation may run past it
NGRAM_PRIME = 2**31 - 1
NO_TOKEN = -1  # stands for what is before the document or the row
STATISTICS = ("mean", "std", "max", "min", "l2")  # of one activation tensor, in this order; l2 = root mean square


def rotary_tables(
    length: int, head_dim: int, device: torch.device, base: float = 10_000.0, half: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (1, length, 1, head_dim/2), fp32 (bf16 tables alone move fp32 logits
    by 2e-3). Frequencies go from 1 down to about 1/base; with `half`, half as many do, and the others are 0."""
    if device.type == "meta":  # shapes only: arithmetic on meta imports torch._dynamo, which takes 2 s
        cos, sin = torch.empty(2, 1, length, 1, head_dim // 2, device=device)
        return cos, sin
    if half:
        exponent = torch.linspace(0, 1, head_dim // 4, dtype=torch.float32, device=device)
        frequency = torch.cat([base**-exponent, torch.zeros_like(exponent)])
    else:
        frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def embedding(entries: int, width: int) -> nn.Embedding:
    """A table to be filled by init_weights: nn.Embedding's own normal values would on meta import torch._dynamo."""
    return nn.Embedding(entries, width, _weight=torch.empty(entries, width))


def ngram_slots(tokens: list[Tensor], factors: Tensor, slots: int) -> Tensor:
    """(B, T, heads) rows of a table of heads x slots for the n-grams of `tokens`, n tensors (B, T) of which the first
    is the text, the second the token before, and so on: multiply-add hashes by factors (n or more, heads) modulo a
    prime (universal in the sense of Carter and Wegman, 1979)."""
    key: Any = sum(
        (token - NO_TOKEN + 1).unsqueeze(-1) * factor for token, factor in zip(tokens, factors, strict=False)
    )
    return key % NGRAM_PRIME % slots + slots * torch.arange(factors.size(1), device=key.device)


class Cache(Protocol):
    """What the model needs of a KV cache (nanochat.engine.KVCache): rows of lengths of their own."""

    incoming: Tensor | None  # (B,) how many tokens of this pass count, from the left; None: all, in every row
    last_tokens: Tensor  # (B, 3) int64: the last tokens of each row, as many as n-grams look back
    document_starts: Tensor  # (B,) int64: where the document begins that each row is in

    def get_pos(self) -> int: ...
    def begin(self, num_tokens: int) -> Tensor: ...
    def advance(self, num_tokens: int) -> None: ...
    def last(self, x: Tensor) -> Tensor: ...
    def note_tokens(self, idx: Tensor) -> None: ...
    def carried(self, layer: int) -> Tensor: ...
    def carry(self, layer: int, slow: Tensor, carried: Tensor) -> None: ...
    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...
    def mask(self, layer: int, window: int, first: Tensor | None) -> Tensor: ...


class ForwardContext(NamedTuple):
    """What all blocks of one forward pass share."""

    cos: Tensor
    sin: Tensor
    masks: "tuple[Mask | None, Mask | None]"  # for layers with short and long windows; None: plain causal attention
    joined: Tensor | None  # (B or 1, T) whether the token before is of the same document; None: nobody needs to know
    kv_cache: Cache | None


class Parts(NamedTuple):
    """What a forward pass calls one after the other."""

    embed: Callable[..., Tensor]
    blocks: Any
    loss: Callable[..., Tensor]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window, self.is_long = config.window(layer), config.is_long(layer)
        self.head_dim, self.key_offset = config.head_dim, config.key_offset
        self.scale = config.attn_scale or config.head_dim**-0.5
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        embedded = config.value_table(layer) is not None
        if embedded and config.value_embeds != "gated":
            self.value_lambdas = nn.Parameter(torch.empty(2))
        if embedded and config.value_embeds == "gated":
            self.value_gate = Linear(GATE_CHANNELS, config.n_kv_head)
        if config.attn_gate:
            self.gate = Linear(GATE_CHANNELS, config.n_head)

    def forward(self, x: Tensor, value_embed: Tensor | None, ctx: ForwardContext) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_dim)
        k = self.c_k(x).view(B, T, -1, self.head_dim)
        v = self.c_v(x).view(B, T, -1, self.head_dim)
        if value_embed is not None:
            v = self.join(v, value_embed.view(v.shape), x)
        # QK-norm keeps the attention logits bounded
        q, k = rotate_norm(q, ctx.cos, ctx.sin), rotate_norm(k, ctx.cos, ctx.sin)
        cache, slow, carried = ctx.kv_cache, None, None
        if self.key_offset:
            assert ctx.joined is not None
            carried = cache.carried(self.layer) if cache is not None else None
            k, slow = offset_keys(k, ctx.joined, carried)
        if cache is not None:
            k, v = cache.insert(self.layer, k, v)
            if slow is not None and carried is not None:
                cache.carry(self.layer, slow, carried)
        short, long = ctx.masks  # not indexed by a bool: torch 2.11 could not compile that
        mask = long if self.is_long else short
        if mask is not None:
            y = masked_attention(q, k, v, mask, self.scale)
        else:
            y = causal_attention(q, k, v, self.window, self.scale)
        if hasattr(self, "gate"):
            y = y * gate(self.gate, x)
        return self.c_proj(y.reshape(B, T, C))

    def join(self, v: Tensor, embed: Tensor, x: Tensor) -> Tensor:
        """Values (B, T, Hkv, D) and value embeddings of the same shape, mixed."""
        if hasattr(self, "value_gate"):
            return v + gate(self.value_gate, x) * embed
        return self.value_lambdas[0] * v + self.value_lambdas[1] * embed


def gate(linear: Linear, x: Tensor) -> Tensor:
    """(B, T, H, 1) in (0, 2), from the first channels of x (B, T, C); 1 at first, when the gate's weights are zero."""
    return 2 * torch.sigmoid(linear(x[..., :GATE_CHANNELS])).unsqueeze(-1)


class MLP(nn.Module):
    fused = False  # whether by kernels of our own; parallel.compile_model sets it

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.c_fc, self.c_proj, self.fused)


def summarize(x: Tensor) -> Tensor:
    """(5,) fp32 STATISTICS over all entries of x (..., C), without a gradient."""
    x = x.detach().float().reshape(-1, x.size(-1))
    # Row by row first: the compiler does that beside what it does with each row anyway (the next norm), so that the
    # tensor is not read again (1.1 ms for 3.5, 24 tensors of 49,152 x 768 on an H100). Two reductions of all the rest.
    sums = torch.stack([x.sum(-1), x.square().sum(-1)]).sum(1) / x.numel()
    ends = torch.stack([x.amax(-1), -x.amin(-1)]).amax(1)
    mean, square = sums.unbind(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    return torch.stack([mean, std, ends[0], -ends[1], square.sqrt()])


class Block(nn.Module):
    stats: Tensor | None = None  # (2, 5) fp32: where statistics of what attention and MLP add go; None: not taken

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.multiplier = config.branch_multiplier
        if layer != config.attention_free_layer:
            self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, value_embed: Tensor | None, ctx: ForwardContext) -> Tensor:
        if hasattr(self, "attn"):
            x = self.add(x, self.attn(norm(x), value_embed, ctx), 0)
        return self.add(x, self.mlp(norm(x)), 1)

    def add(self, x: Tensor, branch: Tensor, which: int) -> Tensor:
        if self.stats is not None:
            self.stats[which].copy_(summarize(branch))
        return x + branch if self.multiplier == 1.0 else x + self.multiplier * branch


class GPT(nn.Module):
    """Build on any device (`meta` for large sizes), then `to_empty(device=...)` if meta, then `init_weights()`."""

    cos: Tensor
    sin: Tensor
    windows: Tensor
    ngram_factors: Tensor
    block_masks = False  # whether masks are made for FlexAttention; parallel.compile_model sets it

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            }
        )
        self.lm_head = Head(config.n_embd, config.vocab_size)
        tables = {config.value_table(layer) for layer in range(config.n_layer)} - {None}
        if tables:
            width = config.n_kv_head * config.head_dim
            self.transformer["value_embeds"] = nn.ModuleList(embedding(config.vocab_size, width) for _ in tables)
        if config.ngram_embeds:
            heads = config.ngram_heads
            rows, width = heads * config.ngram_slots * config.vocab_size, config.n_embd // heads
            ngrams = (embedding(rows, width) for _ in range(2, config.ngram_embeds + 1))
            self.transformer["ngram_embeds"] = nn.ModuleList(ngrams)
            self.ngram_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.x0_shortcut:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.unet:
            self.skip_weights = nn.Parameter(torch.empty(config.n_layer // 2))
        if config.smear:
            self.smear_gate = Linear(GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        for name, buffer in self._buffers_now().items():
            self.register_buffer(name, buffer, persistent=False)
        layers = range(config.n_layer)
        # a layer with a short window and one with a long one; the last has a long one
        self.typical_layers = next((i for i in layers if not config.is_long(i)), config.n_layer - 1), config.n_layer - 1

    @torch.no_grad()
    def init_weights(self, spec: InitSpec | None = None, **changes: Any) -> None:
        """Fill every parameter and buffer (see config.init_parameter), fields of `spec` changed by name. Each
        parameter is drawn in full and this rank's rows of it kept, so that all layouts and world sizes begin alike."""
        spec = dataclasses.replace(spec or InitSpec(), **changes)
        for name, param in self.named_parameters():
            fill_rows(param, functools.partial(init_parameter, name, config=self.config, spec=spec))
        self.init_buffers()

    def init_buffers(self) -> None:
        """Rotary tables and windows again: `to_empty` leaves them undefined, and checkpoints do not hold them."""
        for name, buffer in self._buffers_now().items():
            setattr(self, name, buffer)

    def _buffers_now(self) -> dict[str, Tensor]:
        config, device = self.config, self.lm_head.weight.device
        length = config.sequence_len * ROTARY_MARGIN
        cos, sin = rotary_tables(length, config.head_dim, device, config.rotary_base, config.rotary_half)
        buffers = {
            "cos": cos,
            "sin": sin,
            "windows": torch.tensor(self._full_windows(), dtype=torch.float32, device=device),
        }
        if config.ngram_embeds:  # powers of a primitive root, far apart; they are part of what a checkpoint means
            powers = [
                [104_729 * (MOST_NGRAM_HEADS * n + h) + 1 for h in range(config.ngram_heads)]
                for n in range(max(NGRAMS))
            ]
            factors = [[pow(7, power, NGRAM_PRIME) for power in row] for row in powers]
            buffers["ngram_factors"] = torch.tensor(factors, device=device)
        return buffers

    def _full_windows(self) -> list[int]:
        """Of layers with short and long windows, in tokens, at the end of training."""
        config, everything = self.config, self.config.sequence_len * ROTARY_MARGIN
        short = next((config.window(i) for i in range(config.n_layer) if not config.is_long(i)), -1)
        return [window if window >= 0 else everything for window in (short, config.long_window)]

    def set_window(self, long: int) -> None:
        """Let long windows reach `long` tokens back for now, and short ones in proportion, in steps of 128. A tensor:
        nothing is compiled again. Generation with a KV cache uses full windows whatever this says."""
        assert self.config.long_window > 0, "only windows that end somewhere can grow"
        short_full, long_full = self._full_windows()
        short = short_full if long >= long_full else max(128, round(long * short_full / long_full / 128) * 128)
        # filled, not copied: a copy from the host's memory would wait for the device
        self.windows[0].fill_(min(short, short_full))
        self.windows[1].fill_(min(long, long_full))

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Cache | None = None,
        loss_reduction: Reduction = "mean",
        loss_weights: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
        parts: "Parts | None" = None,
    ) -> Tensor:
        """Logits (B, T, V) in fp32 for idx (B, T); with targets (B, T; -1 = no loss) the cross-entropy in nats instead,
        a scalar, or (B*T,) for loss_reduction="none", each loss times its weight in loss_weights (B, T) if given. With
        a KV cache, idx continues what the cache holds; where its rows take in different numbers of tokens, the logits
        are those after each row's last (B, 1, V). at: rows and columns (N,), the only places whose logits (N, V) are
        wanted: with 65,536 tokens the head is most of a small model's work. parts: what is called for the model's."""
        embed, blocks, loss = parts or Parts(self.embed, self.transformer.h, self.loss)
        T, ctx = idx.size(1), self.forward_context(idx, kv_cache)
        x = self.run_blocks(embed(idx, kv_cache), idx, ctx, blocks)
        if kv_cache is not None:
            x = x if kv_cache.incoming is None else kv_cache.last(x).unsqueeze(1)
            kv_cache.note_tokens(idx)
            kv_cache.advance(T)
        if targets is not None:
            return loss(x if at is None else x[at], targets, loss_reduction, loss_weights)
        return softcap(self.lm_head(norm(x if at is None else x[at])).float(), LOGIT_CAP, self.config.logit_multiplier)

    def loss(self, x: Tensor, targets: Tensor, reduction: Reduction, weights: Tensor | None) -> Tensor:
        """Of the stream (B, T, C) behind the last block."""
        weights = weights.flatten() if weights is not None else None
        flat = norm(x).flatten(0, 1), self.lm_head, targets.flatten()
        return head_loss(*flat, LOGIT_CAP, reduction, weights, self.config.logit_multiplier)

    def embed(self, idx: Tensor, kv_cache: Cache | None) -> Tensor:
        """(B, T, C), normed, in the compute dtype; with `smear` each takes up some of the one before it."""
        wte = self.transformer.wte
        x = norm(wte(idx).to(self.compute_dtype))  # type: ignore[operator]
        if not self.config.smear:
            return x
        before = self.tokens_before(idx, kv_cache, 1)[1]
        share = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS]).float())
        share = (share * (before != NO_TOKEN).unsqueeze(-1)).to(x.dtype)
        return norm(x + share * norm(wte(before.clamp(min=0)).to(self.compute_dtype)))  # type: ignore[operator]

    def tokens_before(self, idx: Tensor, kv_cache: Cache | None, count: int) -> list[Tensor]:
        """idx (B, T), the token before each, ... up to `count` back; NO_TOKEN before the document or the row begins."""
        if kv_cache is None:
            past = torch.full_like(idx[:, :1], NO_TOKEN).expand(-1, LOOK_BACK)
        else:
            back = torch.arange(-LOOK_BACK, 0, device=idx.device)
            past = kv_cache.last_tokens.masked_fill(kv_cache.begin(idx.size(1))[:, :1] + back < 0, NO_TOKEN)
        text, tokens = torch.cat([past, idx], dim=1), [idx]
        for steps in range(1, count + 1):
            begun = tokens[-1] == NO_TOKEN
            if self.config.document_token >= 0:
                begun = begun | (tokens[-1] == self.config.document_token)
            tokens.append(text[:, LOOK_BACK - steps : text.size(1) - steps].masked_fill(begun, NO_TOKEN))
        return tokens

    def embed_ngrams(self, idx: Tensor, kv_cache: Cache | None) -> Tensor:
        """(B, T, C) in the compute dtype: the sum of the embeddings of each token with those before it."""
        tables: Any = self.transformer["ngram_embeds"]
        tokens = self.tokens_before(idx, kv_cache, len(tables))
        slots = self.config.ngram_slots * self.config.vocab_size
        rows = (ngram_slots(tokens[:n], self.ngram_factors, slots) for n in range(2, len(tables) + 2))
        parts = (table(row).flatten(-2).to(self.compute_dtype) for table, row in zip(tables, rows, strict=True))
        return functools.reduce(torch.add, parts)

    def forward_context(self, idx: Tensor, kv_cache: Cache | None) -> ForwardContext:
        """Positions and masks of this forward pass; notes in the cache where documents begin."""
        T, config = idx.size(1), self.config
        start = kv_cache.get_pos() if kv_cache is not None else 0
        if start + T > self.cos.size(1):
            raise UserError(f"{start + T} tokens are more than the {self.cos.size(1)} positions of the rotary table")
        begins = idx == config.document_token if config.document_token >= 0 else None
        joined = None
        if config.key_offset:
            joined = self.tokens_before(idx, kv_cache, 1)[1] != NO_TOKEN
        if kv_cache is None:
            masks: Any = (None, None)
            if config.masked:
                documents = begins.cumsum(1) if begins is not None else None
                masks = make_masks(documents, self.windows, idx, blocks=self.block_masks)
            return ForwardContext(self.cos[:, :T], self.sin[:, :T], masks, joined, None)
        position, first = kv_cache.begin(T), None
        if begins is not None:
            first = torch.where(begins, position, kv_cache.document_starts.unsqueeze(1)).cummax(1).values
            kv_cache.document_starts.copy_(kv_cache.last(first))
        if start == 0 and not config.masked:
            return ForwardContext(self.cos[:, :T], self.sin[:, :T], (None, None), joined, kv_cache)
        layer_of_short, layer_of_long = self.typical_layers
        long = kv_cache.mask(layer_of_long, config.window(layer_of_long), first)
        short = long
        if layer_of_short != layer_of_long:
            short = kv_cache.mask(layer_of_short, config.window(layer_of_short), first)
        return ForwardContext(self.cos[0, position], self.sin[0, position], (short, long), joined, kv_cache)

    def run_blocks(self, x: Tensor, idx: Tensor, ctx: ForwardContext, blocks: Any) -> Tensor:
        """The stream (B, T, C) behind the last block, and what runs beside the blocks: skips, shortcut, backout."""
        config, n, x0 = self.config, self.config.n_layer, x
        values: list[Tensor] = []
        if "value_embeds" in self.transformer:
            tables: Any = self.transformer["value_embeds"]
            values = [table(idx).to(self.compute_dtype) for table in tables]
        ngrams = self.embed_ngrams(idx, ctx.kv_cache) if config.ngram_embeds else None
        middle = 2 * n // 3 - 1 if config.backout and n > 1 else -1
        outputs: dict[int, Tensor] = {}  # only what is needed again: without gradients the others are freed
        for layer, block in enumerate(blocks):
            if config.unet and layer >= n - n // 2:
                x = x + self.skip_weights[layer - (n - n // 2)] * outputs[n - 1 - layer]
            if config.x0_shortcut:
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            if ngrams is not None:
                x = x + self.ngram_lambdas[layer] * ngrams
            table = config.value_table(layer)
            value_embed = values[table] if table is not None else None
            x = block(x, value_embed, ctx)  # gradient checkpointing would wrap this call
            if (config.unet and layer < n // 2) or layer == middle:
                outputs[layer] = x
        return x - self.backout_lambda.to(x.dtype) * outputs[middle] if middle >= 0 else x

    def get_device(self) -> torch.device:
        return self.lm_head.weight.device

    def inference_copy(self) -> "GPT":
        """This model in evaluation mode, its matrices and tables in the compute dtype, which every use would else cast
        them to: the same numbers for half the memory traffic. See update_copy."""
        with torch.device("meta"):
            twin = GPT(self.config, self.compute_dtype)
        twin.to_empty(device=self.get_device())
        for module in twin.modules():
            for name, param in module.named_parameters(recurse=False):
                dtype = self.compute_dtype if param.ndim == 2 else param.dtype
                setattr(module, name, nn.Parameter(param.to(dtype), requires_grad=False))
        twin.init_buffers()
        self.update_copy(twin)
        return twin.eval()

    @torch.no_grad()
    def update_copy(self, twin: "GPT") -> None:
        """Let an inference copy have the weights that this model has now."""
        torch._foreach_copy_(list(twin.parameters()), list(self.parameters()))

    def num_params(self, lookups: bool = True) -> int:
        """All parameters, embeddings included; lookups=False: without the tables that others have beside the embedding,
        which cost next to no arithmetic (value and n-gram embeddings)."""
        return sum(param.numel() for name, param in self.named_parameters() if lookups or not _is_lookup(name))

    def estimate_flops(self, row_len: int | None = None) -> float:
        """FLOPs per token of forward and backward: 6 x matmul parameters (lm_head counted, looking up embeddings not)
        + 12 x heads x head_dim x attention span of each layer, in rows of row_len tokens (default: sequence_len).
        Causal attention is not halved (PaLM, appendix B)."""
        config = self.config
        row_len = config.sequence_len if row_len is None else row_len
        matmul_params = sum(
            param.numel()
            for name, param in self.named_parameters()
            if param.ndim == 2 and name != "transformer.wte.weight" and not _is_lookup(name)
        )
        spans = 0
        for layer in range(config.n_layer):
            window = config.window(layer)
            if layer != config.attention_free_layer:
                spans += row_len if window < 0 else min(window, row_len)
        return 6.0 * matmul_params + 12.0 * config.n_embd * spans

    def setup_optimizer(
        self,
        matrix_lr: float = LEARNING_RATES["matrix_lr"],
        embedding_lr: float = LEARNING_RATES["embedding_lr"],
        unembedding_lr: float = LEARNING_RATES["unembedding_lr"],
        weight_decay: float = 0.0,
        use_muon: bool = True,
        use_mup: bool | None = None,
        base_width: int | None = None,
        **rates: float,
    ) -> MuonAdamW:
        """One optimizer over all parameters: see make_param_groups. use_mup, base_width: UserError where the model was
        built otherwise (None: no matter how)."""
        check_parametrisation(self.config, use_mup, base_width)
        rates |= {"matrix_lr": matrix_lr, "embedding_lr": embedding_lr, "unembedding_lr": unembedding_lr}
        scalings = mup.mup_table(GPT, self.config, use_muon)
        named = self.named_parameters()
        return MuonAdamW(make_param_groups(named, self.config, scalings, use_muon, weight_decay, **rates))


def _is_lookup(name: str) -> bool:
    return name.startswith(("transformer.value_embeds.", "transformer.ngram_embeds."))
