"""Rows that say what each target is, so that the score of a model can be taken apart and compared with another's.

A row file is one NumPy array, np.load("rows.npy"), with a record a row of T targets. Any program can score the same
rows: bits per byte of some kinds are the sum of nats over the sum of `bytes`, over ln 2.

    tokens    (T + 1,)  inputs are [:-1], targets [1:]; every document, and every piece of one, starts with BOS
    bytes     (T,)      bytes of each target; 0: not scored (BOS, context that was scored before, padding)
    document  (T,)      number of the document that a target belongs to; -1: not scored
    kind      (T,)      Kind of each target

Rows of the first kinds are those that training packs, where a document longer than a row is cut, and where the last
piece of a row may lose its end. Those of Kind.IN_FULL have every token of their documents once: a longer one in windows
that overlap by half, so that a target has BOS or half a row before it.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.data.packing import best_fit
from nanochat.data.sources import Split
from nanochat.data.text_rows import Packer, TextData
from nanochat.dataloader import target_batches
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.runtime import IGNORE_INDEX, gather, heartbeat


class Kind(IntEnum):
    NONE = 0
    FITS = 1
    HEAD = 2
    REST = 3
    IN_FULL = 4
    OTHER = 5


PACKED = (Kind.FITS, Kind.HEAD, Kind.REST, Kind.OTHER)
ALL_ROWS, IN_FULL = "packed rows", "documents in full"
CLEAN = "without lines of the train text"
REPORTED: dict[str, Sequence[Kind]] = {
    ALL_ROWS: PACKED,
    "documents that fit a row": (Kind.FITS,),
    "heads of longer ones": (Kind.HEAD,),
    "their rests": (Kind.REST,),
    IN_FULL: (Kind.IN_FULL,),
}


class Bpb(NamedTuple):
    """Bits per byte; `stderr` is over documents: how much another draw of as many would move it."""

    bpb: float
    stderr: float
    tokens: int
    bytes: int
    documents: int


def _empty_rows(count: int, length: int, tokens: np.dtype) -> np.ndarray:
    fields = [("tokens", tokens, length + 1), ("bytes", "<u2", length), ("document", "<i4", length)]
    rows = np.zeros(count, np.dtype([*fields, ("kind", "u1", length)]))
    rows["document"] = -1
    return rows


# ---- making them


class _Positions(Packer):
    """Packs where tokens stand among those of all documents so far (behind the vocabulary, so that BOS is told apart),
    which says whose they are: what is packed where depends on lengths only."""

    def __init__(self, tokenizer: Any, row_len: int) -> None:
        super().__init__(tokenizer, row_len)
        self.documents: list[np.ndarray] = []
        self.next = self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, texts: list[str]) -> Sequence[np.ndarray]:
        found = super().encode(texts)
        ends = self.next + np.cumsum([len(ids) for ids in found])
        self.documents += found
        self.next = int(ends[-1]) if len(ends) else self.next
        return [np.arange(end - len(ids), end, dtype=np.uint32) for ids, end in zip(found, ends, strict=True)]


def make_rows(
    data: TextData, split: Split, length: int, max_tokens: int, in_full: bool = False
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The rows of data.fixed_rows, as described above, and with in_full the same documents in full, at least max_tokens
    targets of them if there are so many; and the tokens of the documents. Raises UserError where not one row can be
    filled."""
    packer = _Positions(data.tokenizer, length + 1)
    found = data.fixed_rows(split, length, max_tokens, packer).astype(np.int64)
    places = np.maximum(found - packer.vocab_size, -1)  # -1: BOS
    bos, lengths = data.document_token, np.array([len(ids) for ids in packer.documents])
    tokens = np.concatenate(packer.documents)
    rows = _empty_rows(len(places), length, tokens.dtype)
    rows["tokens"] = np.where(places < 0, bos, tokens[places])
    ends = np.cumsum(lengths)
    targets = places[:, 1:]
    document = np.searchsorted(ends, targets, side="right")
    inside = targets - (ends - lengths)[document]
    kind = np.where(lengths[document] <= length, Kind.FITS, np.where(inside < length, Kind.HEAD, Kind.REST))
    rows["document"], rows["kind"] = np.where(targets < 0, -1, document), np.where(targets < 0, Kind.NONE, kind)
    if in_full:
        rows = np.concatenate([rows, _rows_in_full(packer.documents, length, max_tokens, bos)])
    sizes = np.array(data.tokenizer.token_byte_lengths())
    rows["bytes"] = np.where(rows["kind"] > 0, sizes[rows["tokens"][:, 1:].astype(np.int64)], 0)
    return rows, packer.documents


def _windows(documents: Sequence[np.ndarray], length: int, enough: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(document, tokens, first of them that is to be scored) until `enough` are to be."""
    for number, ids in enumerate(documents):
        if enough <= 0:
            return
        enough -= len(ids)
        scored = 0
        while scored < len(ids):
            begin = scored and scored - length // 2
            window = ids[begin : begin + length]
            yield number, window, scored - begin
            scored = begin + len(window)


def _rows_in_full(documents: Sequence[np.ndarray], length: int, enough: int, bos: int) -> np.ndarray:
    windows = list(_windows(documents, length, enough))
    packed = best_fit([len(ids) + 1 for _, ids, _ in windows], length + 1)
    rows = _empty_rows(len(packed), length, documents[0].dtype)
    rows["tokens"] = bos
    for row, chosen in zip(rows, packed, strict=True):
        start = 0  # of a window's targets; its BOS is the target before them
        for document, ids, first in (windows[i] for i in chosen):
            end = start + len(ids)
            row["tokens"][start + 1 : end + 1] = ids
            row["document"][start + first : end] = document
            row["kind"][start + first : end] = Kind.IN_FULL
            start = end + 1
    return rows


# ---- files


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as stream:
            np.save(stream, rows)
    except OSError as error:
        raise UserError(f"--write-rows={path}: cannot be written ({error.strerror})") from None


def read_rows(path: Path, sequence_len: int, token_bytes: np.ndarray, bos: int) -> np.ndarray:
    """The rows of a file, checked against the model that is to be scored on them, or of a plain array (N, T + 1) of
    tokens: of those each piece that starts with BOS counts as a document. Raises UserError where they do not fit."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no NumPy array"
        raise UserError(f"--rows={path}: cannot be read ({reason}); --write-rows writes such a file") from None
    names = set(getattr(found, "dtype", np.dtype(int)).names or ())
    plain = isinstance(found, np.ndarray) and found.ndim == 2 and found.dtype.kind in "iu"
    if not plain and (not isinstance(found, np.ndarray) or not {"tokens", "bytes", "document", "kind"} <= names):
        raise UserError(f"--rows={path}: expected rows that --write-rows wrote, or an array (N, T + 1) of tokens")
    tokens = found if plain else found["tokens"]
    length = tokens.shape[-1] - 1
    if not len(tokens) or not 1 <= length <= sequence_len:
        raise UserError(f"--rows={path}: {len(tokens)} rows of {length} targets; this model has rows of {sequence_len}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= len(token_bytes):
        worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        raise UserError(f"--rows={path}: token {worst} of a vocabulary of {len(token_bytes)}: another tokenizer's rows")
    sizes = token_bytes[tokens[:, 1:].astype(np.int64)]
    if not ((sizes if plain else found["bytes"]) > 0).any():
        raise UserError(f"--rows={path}: no target has a byte to measure")
    if plain:
        rows = _empty_rows(len(tokens), length, np.dtype(tokens.dtype))
        rows["tokens"], rows["bytes"] = tokens, sizes
        starts = tokens[:, :-1] == bos
        starts[:, 0] = True
        rows["kind"] = np.where(sizes > 0, Kind.OTHER, Kind.NONE)
        rows["document"] = np.where(sizes > 0, np.cumsum(starts).reshape(starts.shape) - 1, -1)
        return rows
    if not np.array_equal(np.where(found["bytes"] > 0, sizes, 0), found["bytes"]):
        raise UserError(f"--rows={path}: tokens have other lengths in this model's tokenizer: another tokenizer's rows")
    return found


# ---- scoring


@torch.no_grad()
def score_rows(
    model: Any, rows: np.ndarray, device_batch_size: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Nats of each target, (N, T) float32, 0 where it is not scored: a collective call, the same on every rank."""
    tokens = rows["tokens"].astype(np.int32)
    targets = np.where(rows["bytes"] > 0, tokens[:, 1:], IGNORE_INDEX)
    parts = []
    for x, y in target_batches(tokens[:, :-1], targets, device_batch_size, device, rank, world_size):
        heartbeat()
        losses = model(x, y, loss_reduction="none").view(y.shape)
        # where, not a product: the loss at an ignored position may be nan, and nan * 0 is nan
        parts.append(torch.where(y >= 0, losses, 0.0).float().cpu())
    nats = np.zeros(targets.shape, np.float32)
    for other, part in enumerate(gather(torch.cat(parts).numpy())):
        nats[other::world_size] = part[: len(nats[other::world_size])]  # behind them: rows that only fill batches
    return nats


def by_kind(nats: np.ndarray, rows: np.ndarray) -> dict[str, Bpb]:
    """Bits per byte under each name of REPORTED that the rows have targets of."""
    return {name: bits_per_byte(nats, rows, kinds) for name, kinds in REPORTED.items() if is_of(rows, kinds).any()}


def is_of(rows: np.ndarray, kinds: Sequence[Kind]) -> np.ndarray:
    """(N, T) bool: the targets of these kinds that have bytes."""
    return np.isin(rows["kind"], kinds) & (rows["bytes"] > 0)


def packed(rows: np.ndarray) -> np.ndarray:
    """Without the rows of documents in full."""
    return rows[(rows["kind"] != Kind.IN_FULL).all(axis=1)]


def by_overlap(nats: np.ndarray, rows: np.ndarray, lines: np.ndarray) -> dict[str, Bpb]:
    """Bits per byte of packed rows by how many of the lines of their document stand in training text, too.

    lines: of each document, how many there are and how many stand there (overlap.shared_lines)."""
    share = lines[:, 1] / np.maximum(lines[:, 0], 1)
    groups = {CLEAN: share == 0, "with some": (share > 0) & (share < 0.5), "with half or more": share >= 0.5}
    return {
        name: bits_per_byte(nats, rows, PACKED, documents)
        for name, documents in groups.items()
        if (is_of(rows, PACKED) & documents[rows["document"]]).any()
    }


def by_document(nats: np.ndarray, rows: np.ndarray, texts: Sequence[str]) -> list[dict[str, Any]]:
    """A record a document: a hash of its text, and nats and bytes as it is packed and in full. Two models whose
    documents have equal hashes and bytes can be compared document by document, whatever their tokenizers."""
    sums = []
    for kinds in (PACKED, (Kind.IN_FULL,)):
        chosen = is_of(rows, kinds)
        owners = rows["document"][chosen]
        sums += [np.bincount(owners, values[chosen], len(texts)) for values in (nats, rows["bytes"])]
    names = ("nats", "bytes", "nats_in_full", "bytes_in_full")
    found = zip(texts, *(column.tolist() for column in sums), strict=True)
    records = ({"document": _hash(text), **dict(zip(names, values, strict=True))} for text, *values in found)
    return [record for record in records if record["bytes"] or record["bytes_in_full"]]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def bits_per_byte(
    nats: np.ndarray, rows: np.ndarray, kinds: Sequence[Kind], documents: np.ndarray | None = None
) -> Bpb:
    """Of the targets of these kinds, and of those `documents` (D,) that are True; there must be some."""
    chosen = is_of(rows, kinds)
    if documents is not None:
        chosen &= documents[rows["document"]]
    owners = rows["document"][chosen]
    losses, sizes = (np.bincount(owners, values[chosen]) for values in (nats, rows["bytes"]))
    ratio, count = losses.sum() / sizes.sum(), np.count_nonzero(sizes)
    # standard error of a ratio of sums: spread of the documents' residuals nats - ratio * bytes
    spread = ((losses - ratio * sizes) ** 2).sum()
    stderr = math.sqrt(count / (count - 1) * spread) / sizes.sum() if count > 1 else math.nan
    size = int(sizes.sum())
    return Bpb(float(ratio) / math.log(2), float(stderr) / math.log(2), int(chosen.sum()), size, int(count))
