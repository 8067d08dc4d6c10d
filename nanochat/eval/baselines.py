"""What a model must beat: simple predictors of bytes, measured on the text that it is measured on."""

import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanochat.data.sources import first_documents
from nanochat.tokenizer import RustBPETokenizer

XZ_BYTES = 1 << 25  # train text that xz is primed with: all of pydocs; 30 s and 800 MB on two cores
_CHUNK = 1 << 24  # bytes counted at a time: the int64 work arrays of a chunk stay at 128 MiB


def scored_bytes(tokenizer: RustBPETokenizer, rows: np.ndarray, token_bytes: np.ndarray) -> bytes:
    """The very bytes that a model is scored on: the targets of rows (N, T + 1) without special tokens."""
    targets = rows[:, 1:].astype(np.int64).ravel()
    return tokenizer.decode_bytes(targets[token_bytes[targets] > 0])


def train_text(source: str, size: int) -> bytes:
    """The first `size` bytes of the train split, as far as there are so many."""
    return "".join(first_documents(source, "train", size)).encode()[:size]


def baselines(train: bytes, val: bytes) -> dict[str, float]:
    """Bits per byte of four codes for `val`, the worst first as a rule."""
    return {
        "order-0 bytes": order0_bpb(train, val),
        "byte 3-gram (Witten-Bell)": trigram_bpb(train, val),
        "xz -9e": xz_bpb(val),
        "xz -9e after train text": primed_xz_bpb(train[:XZ_BYTES], val),
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


def primed_xz_bpb(train: bytes, val: bytes) -> float:
    """What `val` adds to the size of `train` under xz -9e with a window over both. Bits per byte."""
    window = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(1 << 16, len(train + val))}

    def size(text: bytes) -> int:
        return len(lzma.compress(text, lzma.FORMAT_RAW, filters=[window]))

    with ThreadPoolExecutor(2) as pool:  # 1 MB/s each
        before, after = pool.map(size, [train, train + val])
    return 8 * (after - before) / len(val)


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
