"""Bits per byte: the loss on text in a unit that does not depend on the vocabulary.

A larger vocabulary makes fewer, harder tokens, so nats per token cannot be compared across tokenizers. Dividing the
total nats by the bytes those tokens stand for can: bpb = nats / (ln 2 * bytes).
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.runtime import heartbeat

VAL_BPB = "Loss/val_bpb"  # bits per byte of held-out text, bits
VAL_LOSS = "Loss/val_loss"  # mean cross-entropy of held-out tokens, nats


class BpbResult(NamedTuple):
    """Bits per byte over all ranks; `stderr` is over the rows: how much another draw of as many rows would move it."""

    bpb: float
    tokens: int
    bytes: int
    stderr: float
    rows: int


def evaluate_bpb(
    model: Callable[..., torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: torch.Tensor,
) -> float:
    """Bits per byte of `batches`; see measure_bpb."""
    return measure_bpb(model, batches, token_bytes).bpb


def evaluate_loss(
    model: Callable[..., torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    vocab_size: int,
    device: torch.device,
) -> float:
    """Mean cross-entropy of `batches` in nats per token, for tokens that nobody can say the bytes of."""
    each_counts_one = torch.ones(vocab_size, dtype=torch.long, device=device)
    return measure_bpb(model, batches, each_counts_one).bpb * math.log(2)


@torch.no_grad()
def measure_bpb(
    model: Callable[..., torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: torch.Tensor,
) -> BpbResult:
    """Bits per byte of `batches` of (x, y), each (B, T) int64 on the device of `token_bytes`.

    model: `model(x, y, loss_reduction="none")` -> losses in nats, (B, T) or (B*T,).
    token_bytes: (vocab,) bytes of each token, 0 for special tokens, which are left out of nats and bytes alike.
    Targets of -1 are left out too. Ranks may hold different numbers of batches, also none: they meet once, at the end.
    Raises UserError when no rank has a single byte to measure.
    """
    device = token_bytes.device
    # MPS has no float64; elsewhere rows are summed in it, so that 10M tokens lose no digits
    precise = torch.float32 if device.type == "mps" else torch.float64
    row_nats, row_bytes, row_tokens = [], [], []
    for x, y in batches:
        heartbeat()
        losses = model(x, y, loss_reduction="none").view(y.shape)
        weights = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        counted = weights > 0
        # where, not a product: the loss at an ignored position may be nan, and nan * 0 is nan
        row_nats.append(torch.where(counted, losses, 0.0).sum(dim=1, dtype=precise))
        row_bytes.append(weights.sum(dim=1, dtype=torch.int64))
        row_tokens.append(counted.sum(dim=1, dtype=torch.int64))
    nothing = torch.zeros(0, device=device)
    nats = torch.cat(row_nats or [nothing]).to(precise)
    sizes = torch.cat(row_bytes or [nothing]).to(torch.int64)
    tokens = torch.cat(row_tokens or [nothing]).to(torch.int64)
    counts = torch.stack([tokens.sum(), sizes.sum(), (sizes > 0).sum()])  # masked rows are none
    weighted = sizes.to(precise)
    sums = torch.stack([nats.sum(), (nats * nats).sum(), (nats * weighted).sum(), (weighted * weighted).sum()])
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    return _result(counts.tolist(), sums.tolist())


def _result(counts: list[int], sums: list[float]) -> BpbResult:
    tokens, size, rows = counts
    nats, nats_nats, nats_bytes, bytes_bytes = sums
    if size == 0:
        raise UserError("no text to measure bits per byte on: every target is masked or special; get more data")
    ratio = nats / size
    # standard error of a ratio of sums: spread of the rows' residuals nats - ratio * bytes
    spread = max(0.0, nats_nats - 2 * ratio * nats_bytes + ratio * ratio * bytes_bytes)
    stderr = math.sqrt(rows / (rows - 1) * spread) / size if rows > 1 else math.nan
    return BpbResult(ratio / math.log(2), tokens, size, stderr / math.log(2), rows)
