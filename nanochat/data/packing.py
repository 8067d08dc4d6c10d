"""Documents -> rows of equal length, each starting with BOS, without padding."""

import itertools
import sys
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

import rustbpe


def pack_rows(documents: Sequence[np.ndarray], row_len: int, bos: int) -> tuple[np.ndarray, int]:
    """Best-fit packing: rows (R, row_len) in the dtype of the documents, and how many tokens were cropped.

    A document becomes pieces of at most row_len tokens, each with a BOS of its own: best fit alone would keep the first
    row_len tokens of a long one and drop all the rest, which on technical documentation (mean 1,500 tokens, long tail)
    is most of the text. A row takes the longest piece that fits, again and again; where none fits, it is filled with
    the head of the shortest piece, whose tail is dropped (so the least is lost). What is left over at the end and does
    not fill a row is dropped too. Every token of every document is in a row or counted as cropped.
    """
    if not documents:
        return np.empty((0, row_len), np.uint16), 0
    dtype = documents[0].dtype
    assert dtype in (np.uint16, np.uint32) and sys.byteorder == "little", (
        f"tokens of type {dtype}, {sys.byteorder} endian"
    )
    # joined and written once: 1.2 ms for 1,000 documents where copies of each piece and row took 5
    ends = list(itertools.accumulate(map(len, documents)))
    tokens = b"".join(document.data for document in documents)
    rows, cropped = rustbpe.pack_rows(tokens, ends, dtype.itemsize, bos, row_len)
    return np.frombuffer(rows, dtype).reshape(-1, row_len), cropped


Rendered = tuple[Sequence[int], Sequence[int]]  # ids of a conversation, and 1 where the model is trained on them


def pack_conversations(conversations: Sequence[Rendered], row_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit packing of whole conversations of at most row_len tokens: (tokens, mask), each (R, row_len) int32. A row
    takes the longest conversation that fits, again and again; where none fits it is padded with mask 0. Nothing is cut
    or lost: an answer without its question, or a question without its answer, teaches the wrong thing."""
    rows: list[Rendered] = []
    for chosen in best_fit([len(ids) for ids, _ in conversations], row_len):
        parts = [conversations[i] for i in chosen]
        rows.append(([t for ids, _ in parts for t in ids], [bit for _, mask in parts for bit in mask]))
    return _padded(rows, row_len, pad)


def best_fit(lengths: Sequence[int], row_len: int) -> list[list[int]]:
    """Which of the things of these lengths, each at most row_len, each row takes: the longest that fits, again and
    again."""
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = sorted(lengths)
    assert not sizes or sizes[-1] <= row_len, f"a length of {sizes[-1]} tokens for rows of {row_len}"
    rows: list[list[int]] = []
    while waiting:
        rows.append([])
        space = row_len
        while (fits := bisect_right(sizes, space) - 1) >= 0:
            rows[-1].append(waiting.pop(fits))
            space -= sizes.pop(fits)
    return rows


def stream_rows(conversations: Sequence[Rendered], row_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """All conversations one after the other, cut every row_len tokens: (tokens, mask), each (R, row_len) int32. The
    last row is padded with mask 0."""
    ids = [token for conversation, _ in conversations for token in conversation]
    mask = [bit for _, bits in conversations for bit in bits]
    pieces = range(0, len(ids), row_len)
    return _padded([(ids[i : i + row_len], mask[i : i + row_len]) for i in pieces], row_len, pad)


def _padded(rows: Sequence[Rendered], row_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), row_len), pad, dtype=np.int32)
    masks = np.zeros((len(rows), row_len), dtype=np.int32)
    for row, (ids, mask) in enumerate(rows):
        tokens[row, : len(ids)], masks[row, : len(mask)] = ids, mask
    return tokens, masks
