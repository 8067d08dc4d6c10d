"""Bits per byte: the loss on text in a unit that does not depend on the vocabulary.

A larger vocabulary makes fewer, harder tokens, so nats per token cannot be compared across tokenizers. Dividing the
total nats by the bytes those tokens stand for can: bpb = nats / (ln 2 * bytes). Simple predictors of bytes, measured on
the same text, say what a model must beat.
"""

import lzma
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from nanochat.data.sources import iter_documents
from nanochat.errors import UserError
from nanochat.runtime import heartbeat
from nanochat.tokenizer import RustBPETokenizer

VAL_BPB = "Loss/val_bpb"  # bits per byte of held-out text, bits
_CHUNK = 1 << 24  # bytes counted at a time: the int64 work arrays of a chunk stay at 128 MiB
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
    Raises UserError when no rank has a single byte to measure.
    """
    device = token_bytes.device
    # MPS has no float64; elsewhere rows are summed in it, so that 10M tokens lose no digits
    precise = torch.float32 if device.type == "mps" else torch.float64
    row_nats: list[torch.Tensor] = []
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for x, y in batches:
        heartbeat()
        losses = model(x, y, loss_reduction="none").view(y.shape)
        weights = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        counted = weights > 0
        # where, not a product: the loss at an ignored position may be nan, and nan * 0 is nan
        row_nats.append(torch.where(counted, losses, 0.0).sum(dim=1, dtype=precise))
        counts += torch.stack([counted.sum(), weights.sum(dtype=torch.int64)])
    nats = torch.cat(row_nats or [torch.zeros(0, device=device)]).to(precise).sum()
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.all_reduce(nats)
    tokens, size = counts.tolist()
    if size == 0:
        raise UserError("no text to measure bits per byte on: every target is masked or special; get more data")
    return BpbResult(nats.item() / size / math.log(2), tokens, size)


# ---- what a model must beat


def scored_bytes(tokenizer: RustBPETokenizer, rows: np.ndarray, token_bytes: np.ndarray) -> bytes:
    """The very bytes that a model is scored on: the targets of rows (N, T + 1) without special tokens."""
    targets = rows[:, 1:].astype(np.int64).ravel()
    return tokenizer.decode_bytes(targets[token_bytes[targets] > 0])


def train_text(source: str, size: int) -> bytes:
    """The first `size` bytes of the train split, as far as there are so many."""
    text = bytearray()
    for document in iter_documents(source, "train"):
        text += document.encode("utf-8", "replace")
        if len(text) >= size:
            break
    return bytes(text[:size])


def baselines(train: bytes, val: bytes) -> dict[str, float]:
    """Bits per byte of three codes for `val`, the worst first as a rule; xz sees nothing of `train`."""
    return {
        "order-0 bytes": order0_bpb(train, val),
        "byte 3-gram (Witten-Bell)": trigram_bpb(train, val),
        "xz -9e": xz_bpb(val),
    }


def order0_bpb(train: bytes, val: bytes) -> float:
    """Byte frequencies of `train` (add-one smoothed), no context, as a code for `val`. Bits per byte."""
    counts = _counts(train, 1) + 1
    bits = -np.log2(counts / counts.sum())
    return float(bits @ _counts(val, 1) / len(val))


def trigram_bpb(train: bytes, val: bytes) -> float:
    """Byte 3-gram counted on `train`, as a code for `val`: each byte from the two before it. Bits per byte.

    Interpolated Witten-Bell smoothing: with n occurrences of a context and t distinct bytes seen after it,
    p(c | context) = (count(context, c) + t * p(c | shorter context)) / (n + t); the shortest is uniform over 256.
    """
    tables = [_counts(train, order).reshape(-1, 256) for order in (1, 2, 3)]
    return float(-np.log2(_witten_bell(tables, val)).mean())


def xz_bpb(val: bytes) -> float:
    """Size of `val` alone under xz -9e. Bits per byte."""
    return 8 * len(lzma.compress(val, preset=9 | lzma.PRESET_EXTREME)) / len(val)


def _witten_bell(tables: list[np.ndarray], text: bytes) -> np.ndarray:
    """Probability of each byte of `text` given those before it; tables[k] (256**k, 256) counts runs of k + 1 bytes."""
    values = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    probability = np.full(len(values), 1 / 256)
    for order, table in enumerate(tables, start=1):
        if len(values) < order:
            break
        seen, distinct = table.sum(axis=1), np.count_nonzero(table, axis=1)
        keys = _ngrams(values, order)
        context = keys >> 8
        known = seen[context] > 0
        shorter = probability[order - 1 :]
        numerator = table.reshape(-1)[keys] + distinct[context] * shorter
        denominator = np.where(known, seen[context] + distinct[context], 1)
        probability[order - 1 :] = np.where(known, numerator / denominator, shorter)
    return probability


def _ngrams(text: np.ndarray, order: int) -> np.ndarray:
    """Runs of `order` bytes as numbers in base 256, one starting at each byte but the last order - 1."""
    keys = np.zeros(len(text) - order + 1, dtype=np.int64)
    for i in range(order):
        keys = (keys << 8) + text[i : len(text) - order + 1 + i]
    return keys


def _counts(text: bytes, order: int) -> np.ndarray:
    """How often each run of `order` bytes occurs; (256**order,) int64: 128 MiB at order 3."""
    table = np.zeros(256**order, dtype=np.int64)
    values = np.frombuffer(text, dtype=np.uint8)
    for first in range(0, len(values) - order + 1, _CHUNK):
        piece = values[first : first + _CHUNK + order - 1].astype(np.int64)
        table += np.bincount(_ngrams(piece, order), minlength=len(table))
    return table
