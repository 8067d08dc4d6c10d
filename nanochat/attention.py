"""Causal attention: one function, several kernels behind it.

Everything here takes (B, T, H, D) tensors, as the projections make them and as the KV cache stores them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN's kernel first: on an H200 a d12 training step (B=32, T=2048, H=6, D=128, bf16) runs at 539k tokens/s with it
# and at 486k with the FlashAttention-2 that torch picks by itself (benchmarks/train_speed.py). The others follow for
# shapes that it refuses.
GPU_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# cuDNN makes a plan for every new shape, and with a KV cache every step has a new one: 65 ms a token instead of 11
# (d12, 128 rows). Training and padded evaluations have lengths that divide by this; prompts mostly have not.
PLANNED_LENGTHS = 64


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = -1, starts: Tensor | None = None) -> Tensor:
    """Softmax attention where query i sees keys at most at its own position and at most `window` positions back.

    q is (B, Tq, H, D), k and v are (B, Tk, Hkv, D) with Tk >= Tq and H a multiple of Hkv; the queries are the last
    Tq of the Tk positions (Tk > Tq happens with a KV cache). window = -1 means all of the past; window = w means the
    position itself and the w before it. `starts` (B,) hides the positions before a row's start (padding on the left).
    Returns (B, Tq, H, D).
    """
    queries, keys = q.size(1), k.size(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), as SDPA wants them
    windowed = 0 <= window < keys - 1
    if starts is not None:
        mask = visible(queries, keys, window if windowed else -1, q.device)
        key_position = torch.arange(keys, device=q.device)
        # padding sees itself: a query without any key would give NaN, and NaN spreads even where its weight is 0
        itself = key_position == torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
        mask = (mask & (key_position >= starts[:, None, None])) | itself  # (B, Tq, Tk)
        return _sdpa(q, k, v, mask.unsqueeze(1), is_causal=False).transpose(1, 2)
    if queries == 1 and windowed:  # decoding: cutting the keys says the same as a mask, and costs nothing
        k, v = k[:, :, -(window + 1) :], v[:, :, -(window + 1) :]
    if queries == keys and not windowed:
        out = _sdpa(q, k, v, None, is_causal=True)
    elif queries == 1:
        out = _sdpa(q, k, v, None, is_causal=False)
    else:
        mask = visible(queries, keys, window if windowed else -1, q.device)
        out = _sdpa(q, k, v, mask, is_causal=False)
    return out.transpose(1, 2)


def visible(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: True where the query may look at the key (see causal_attention)."""
    query_position = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key_position = torch.arange(keys, device=device).unsqueeze(0)
    mask = key_position <= query_position
    if window >= 0:
        mask &= query_position - key_position <= window
    return mask


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    grouped = q.size(1) != k.size(1)
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    planned = q.size(2) == k.size(2) and q.size(2) % PLANNED_LENGTHS == 0
    with sdpa_kernel(GPU_KERNELS if planned else GPU_KERNELS[1:], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
