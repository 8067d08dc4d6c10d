"""Documents -> rows of equal length, each starting with BOS, without padding."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np


def split_long(document: np.ndarray, row_len: int, bos: int) -> list[np.ndarray]:
    """BOS + document as pieces of at most row_len tokens, each with a BOS of its own.

    Best-fit packing alone would keep the first row_len tokens of a long document and drop all the rest: on technical
    documentation (mean 1,500 tokens, long tail) that is most of the text.
    """
    body = row_len - 1
    starts = range(0, max(len(document), 1), body)
    return [np.concatenate([np.array([bos], document.dtype), document[i : i + body]]) for i in starts]


def pack_rows(documents: Sequence[np.ndarray], row_len: int, bos: int) -> tuple[np.ndarray, int]:
    """Best-fit packing: rows (R, row_len) in the dtype of the documents, and how many tokens were cropped.

    A row takes the longest piece that fits, again and again; where none fits, it is filled with the head of the
    shortest piece, whose tail is dropped (so the least is lost). What is left over at the end and does not fill a row
    is dropped too. Every token of every document is in a row or counted as cropped.
    """
    pieces = sorted((p for d in documents for p in split_long(d, row_len, bos)), key=len)
    lengths = [len(p) for p in pieces]
    rows: list[np.ndarray] = []
    cropped = 0
    while pieces:
        row: list[np.ndarray] = []
        space = row_len
        while space and pieces:
            fits = bisect_right(lengths, space) - 1
            index = max(fits, 0)
            piece = pieces.pop(index)
            length = lengths.pop(index)
            cropped += max(length - space, 0)
            row.append(piece[:space])
            space -= min(length, space)
        if space:
            cropped += row_len - space
        else:
            rows.append(np.concatenate(row))
    dtype = documents[0].dtype if len(documents) else np.dtype(np.uint16)
    return (np.stack(rows) if rows else np.empty((0, row_len), dtype)), cropped


Rendered = tuple[Sequence[int], Sequence[int]]  # ids of a conversation, and 1 where the model is trained on them


def pack_conversations(conversations: Sequence[Rendered], row_len: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit packing of whole conversations of at most row_len tokens: (tokens, mask), each (R, row_len) int32.

    A row takes the longest conversation that fits, again and again; where none fits it is padded with mask 0. Nothing
    is cut or lost: an answer without its question, or a question without its answer, teaches the wrong thing.
    """
    waiting = sorted(conversations, key=lambda rendered: len(rendered[0]))
    lengths = [len(ids) for ids, _ in waiting]
    assert not lengths or lengths[-1] <= row_len, f"a conversation of {lengths[-1]} tokens for rows of {row_len}"
    rows: list[Rendered] = []
    while waiting:
        ids: list[int] = []
        mask: list[int] = []
        while (fits := bisect_right(lengths, row_len - len(ids)) - 1) >= 0:
            more_ids, more_mask = waiting.pop(fits)
            lengths.pop(fits)
            ids += more_ids
            mask += more_mask
        rows.append((ids, mask))
    return _padded(rows, row_len, pad)


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
