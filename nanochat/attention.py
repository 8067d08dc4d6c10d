"""Causal attention: over all of the past or a window (causal_attention), and by a mask of documents and windows that is
made once for all layers (make_masks, masked_attention). Tensors are (B, T, H, D), as the KV cache stores them."""

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask"

# cuDNN's kernel first: on an H200 a d12 training step (B=32, T=2048, H=6, D=128, bf16) runs at 539k tokens/s with it
# and at 486k with the FlashAttention-2 that torch picks by itself (benchmarks/train_speed.py). The others follow for
# shapes that it refuses.
GPU_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# cuDNN makes a plan for every new shape, and with a KV cache every step has a new one: 65 ms a token instead of 11
# (d12, 128 rows). Training and padded evaluations have lengths that divide by this; prompts mostly have not.
PLANNED_LENGTHS = 64


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = -1, scale: float | None = None) -> Tensor:
    """Softmax attention where query i sees keys at most at its own position and at most `window` positions back.

    q is (B, Tq, H, D), k and v are (B, Tk, Hkv, D) with Tk >= Tq and H a multiple of Hkv; the queries are the last
    Tq of the Tk positions (Tk > Tq happens with a KV cache). window = -1 means all of the past; window = w means the
    position itself and the w before it. scale: on the logits, 1/√D by default. Returns (B, Tq, H, D).
    """
    queries, keys = q.size(1), k.size(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), as SDPA wants them
    windowed = 0 <= window < keys - 1
    mask = None
    if queries == 1 and windowed:  # decoding: the last keys alone do what a mask would, and cost nothing
        k, v = k[:, :, -(window + 1) :], v[:, :, -(window + 1) :]
    elif queries > 1 and (windowed or queries < keys):
        mask = visible(queries, keys, window if windowed else -1, q.device)
    causal = mask is None and queries == keys
    if causal and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape == k.shape:
        return _causal_by_blocks(q, k, v, q.size(-1) ** -0.5 if scale is None else scale).transpose(1, 2)
    return _sdpa(q, k, v, mask, is_causal=causal, scale=scale).transpose(1, 2)


CPU_BLOCK = 256  # queries at a time that a CPU trains with; 128 and 512 take as long


def _causal_by_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention over (B, H, T, D) by matrix products, for training on a CPU in bf16: forward and backward take
    29 ms where those of SDPA take 57 (8 rows of 512, 2 heads of 64, one core that multiplies bf16 natively)."""
    T = q.size(2)
    queries, keys, values = (q * scale).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    out = []
    for start in range(0, T, CPU_BLOCK):
        stop = min(start + CPU_BLOCK, T)
        scores = queries[:, start:stop] @ keys[:, :stop].mT + mask[start:stop, :stop]
        out.append(scores.softmax(-1) @ values[:, :stop])
    return torch.cat(out, dim=1).view(q.shape)


def offset_keys(k: Tensor, joined: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor]:
    """(k (B, T, H, D) where the slower half of the rotary dimensions is that of the token before, or 0 where a token is
    not joined (B, T) to one; that half of k itself (B, T, H, 2, D/4)). carried: that half of the token before the first
    (B, 1, H, 2, D/4). A query then finds what came behind an earlier occurrence of its own token."""
    own, slow = k.unflatten(-1, (2, 2, -1)).unbind(-2)
    before = torch.cat([slow[:, :1] if carried is None else carried, slow[:, :-1]], dim=1)
    return torch.stack([own, before * joined[:, :, None, None, None]], dim=-2).flatten(-3), slow


def visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: True where the query may look at the key (see causal_attention)."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask.triu(keys - queries - window) if window >= 0 else mask


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    grouped = q.size(1) != k.size(1)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "enable_gqa": grouped, "scale": scale}
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, **options)
    planned = q.size(2) == k.size(2) and q.size(2) % PLANNED_LENGTHS == 0
    with sdpa_kernel(GPU_KERNELS if planned else GPU_KERNELS[1:], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options)


# ---- masks of documents and windows

BLOCK = 128  # FlexAttention skips what lies outside a mask by blocks of so many queries and keys


def make_masks(documents: Tensor | None, windows: Tensor, idx: Tensor, blocks: bool) -> tuple[Mask, Mask]:
    """One mask for each of windows (2,), fp32: query i sees the keys of its own document, at most at its own position
    and at most windows[w] before it. documents (B, T) int, rising along the row; None: all of a row is one document.

    blocks: made for FlexAttention, else (B or 1, 1, T, T) bool. The windows are read on the device, so that other
    values compile nothing again.
    """
    if documents is None:
        documents = torch.zeros(1, idx.size(1), dtype=torch.long, device=idx.device)
    make = block_mask if blocks else dense_mask
    return make(documents, windows[0]), make(documents, windows[1])


_flex: Any = None


def load_flex_attention() -> None:
    """Import FlexAttention, before such a model is compiled. Not at the top of this file: it imports sympy, which
    takes 2.3 of the 6.4 s in which a training script starts, and no run on a CPU needs it."""
    global _flex
    import torch.nn.attention.flex_attention as flex

    _flex = flex


def dense_mask(documents: Tensor, window: Tensor) -> Tensor:
    """(B, 1, T, T) bool, see make_masks."""
    position = torch.arange(documents.size(1), device=documents.device)
    distance = position.unsqueeze(1) - position
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return (same & (distance >= 0) & (distance <= window)).unsqueeze(1)


def block_mask(documents: Tensor, window: Tensor) -> "BlockMask":
    """The same as dense_mask for FlexAttention: which blocks of 128 x 128 are visible in part, and which in full.

    Made from the documents' numbers at both ends of each block, since they rise: 150 thousand numbers for a row of
    49,152 tokens, where torch's create_block_mask evaluates all 2.4 billion pairs at each step.
    """
    if _flex is None:
        load_flex_attention()
    B, T = documents.shape
    lists = _mask_blocks(documents, window)
    names = (
        f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
    )

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query >= key) & (query - key <= window)
        row = b if B > 1 else 0
        return near & (documents[row, query] == documents[row, key])

    mask: BlockMask = _flex.BlockMask(
        seq_lengths=(T, T), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod, **dict(zip(names, lists, strict=True))
    )
    return mask


@torch.library.custom_op("nanochat::mask_blocks", mutates_args=())
def _mask_blocks(documents: Tensor, window: Tensor) -> list[Tensor]:
    """Blocks visible in part, then those visible in full, each by query block and by key block, each (how many
    (B, 1, n), their numbers first in each row (B, 1, n, n)), int32.

    An operator of its own, that is never compiled: where torch 2.11 compiled this together with the attention, the
    kernel took the strides of one list for those of another, and the output was wrong by 28 % on an H100
    (tests/test_cuda.py). Alone, sorting 384 blocks took 108 s to compile, and sorting 3 x 128 more than 9 minutes."""
    T = documents.size(1)
    count = -(-T // BLOCK)
    first = documents[:, ::BLOCK]
    ends = torch.arange(1, count + 1, device=documents.device) * BLOCK - 1
    last = documents[:, ends.clamp(max=T - 1)]
    number = torch.arange(count, device=documents.device)
    apart = (number.unsqueeze(1) - number) * BLOCK  # of query block i and key block j, first position to first
    some = (apart >= 0) & (apart - (BLOCK - 1) <= window) & (last.unsqueeze(1) >= first.unsqueeze(2))
    full = (apart > 0) & (apart + (BLOCK - 1) <= window) & (first.unsqueeze(1) == last.unsqueeze(2))
    part = some & ~full
    counts, lists = _listed(torch.stack([part, part.mT, full, full.mT]))
    # an operator's results may not share memory
    return [one.unsqueeze(1).clone() for pair in zip(counts, lists, strict=True) for one in pair]


@_mask_blocks.register_fake
def _(documents: Tensor, window: Tensor) -> list[Tensor]:
    B, count = documents.size(0), -(-documents.size(1) // BLOCK)
    shapes = [(B, 1, count), (B, 1, count, count)] * 4
    return [documents.new_empty(shape, dtype=torch.int32) for shape in shapes]


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many are chosen in each row (..., n), their numbers first (..., n, n)) of (..., n, n) bool, int32."""
    number = torch.arange(chosen.size(-1), dtype=torch.int32, device=chosen.device)
    up_to = chosen.cumsum(-1, dtype=torch.int32)
    count = up_to[..., -1]
    place = torch.where(chosen, up_to - 1, count.unsqueeze(-1) + number - up_to)
    return count, torch.empty_like(place).scatter_(-1, place.long(), number.expand_as(place))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """Softmax attention where the mask lets it look: q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D). Keys may
    be in fewer rows: then each of them is that of several rows of queries, one behind the other."""
    if q.size(0) != k.size(0):
        return masked_attention(q.reshape(k.size(0), -1, *q.shape[2:]), k, v, mask, scale).view(q.shape)
    if isinstance(mask, Tensor) and q.size(1) == 1 and q.device.type == "cpu":
        return _decode_attention(q, k, v, mask, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, Tensor):
        out = _sdpa(q, k, v, mask, is_causal=False, scale=scale)
    else:
        out = _flex.flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


def _decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """masked_attention of one query, on a CPU: products with the vectors of each head, which lie together in a cache
    there. 2.7 ms where SDPA in bf16 takes 9.6 (128 rows, 4 heads of 64, 100 keys, one core). mask (B, 1, 1, Tk)."""
    B, keys, heads, dim = k.shape
    k, v = (x.transpose(1, 2).reshape(B * heads, keys, dim) for x in (k, v))
    q = q.reshape(B * heads, -1, dim)  # the query heads that share a key head side by side
    scores = torch.bmm(k, q.transpose(1, 2)).float().mul_(scale).view(B, heads, keys, -1)
    weights = scores.masked_fill_(~mask.view(-1, 1, keys, 1), -torch.inf).softmax(2).to(v.dtype)
    return torch.bmm(weights.view(B * heads, keys, -1).transpose(1, 2), v).view(B, 1, -1, dim)
