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
from nanochat.runtime import Stopped, heartbeat, interruptible

VAL_BPB = "Loss/val_bpb"  # bits per byte of held-out text, bits
VAL_LOSS = "Loss/val_loss"  # mean cross-entropy of held-out tokens, nats

Model = Callable[..., torch.Tensor]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class BpbResult(NamedTuple):
    """Bits per byte over all ranks."""

    bpb: float
    tokens: int
    bytes: int


def evaluate_bpb(model: Model, batches: Batches, token_bytes: torch.Tensor) -> float:
    """Bits per byte of `batches`; see measure_bpb."""
    return measure_bpb(model, batches, token_bytes).bpb


def evaluate_loss(model: Model, batches: Batches, vocab_size: int, device: torch.device) -> float:
    """Mean cross-entropy of `batches` in nats per token, for tokens that nobody can say the bytes of."""
    each_counts_one = torch.ones(vocab_size, dtype=torch.long, device=device)
    return measure_bpb(model, batches, each_counts_one).bpb * math.log(2)


@torch.no_grad()
def measure_bpb(model: Model, batches: Batches, token_bytes: torch.Tensor) -> BpbResult:
    """Bits per byte of `batches` of (x, y), each (B, T) int64 on the device of `token_bytes`.

    model: `model(x, y, loss_reduction="none")` -> losses in nats, (B, T) or (B*T,).
    token_bytes: (vocab,) bytes of each token, 0 for special tokens, which are left out of nats and bytes alike.
    Targets of -1 are left out too. Ranks may hold different numbers of batches, also none: they meet once, at the end.
    Raises UserError when no rank has a single byte to measure, Stopped on all ranks where a signal stops one.
    """
    device = token_bytes.device
    # MPS has no float64; elsewhere rows are summed in it, so that 10M tokens lose no digits
    precise = torch.float32 if device.type == "mps" else torch.float64
    row_nats: list[torch.Tensor] = []
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # tokens, bytes, ranks that a signal stopped
    try:
        with interruptible():
            for x, y in batches:
                heartbeat()
                losses = model(x, y, loss_reduction="none").view(y.shape)
                weights = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
                counted = weights > 0
                # where, not a product: the loss at an ignored position may be nan, and nan * 0 is nan
                row_nats.append(torch.where(counted, losses, 0.0).sum(dim=1, dtype=precise))
                counts[:2] += torch.stack([counted.sum(), weights.sum(dtype=torch.int64)])
    except Stopped:  # not raised yet: the other ranks wait for this one below
        counts[2] = 1
    nats = torch.cat(row_nats or [torch.zeros(0, device=device)]).to(precise).sum()
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(nats)
    tokens, size, stopped = counts.tolist()
    if stopped:
        raise Stopped
    if size == 0:
        raise UserError("no text to measure bits per byte on: every target is masked or special; get more data")
    return BpbResult(nats.item() / size / math.log(2), tokens, size)
