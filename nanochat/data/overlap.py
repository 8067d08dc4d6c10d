"""What is held out for validation, so that nothing of it is trained on in other words; and what of it is all the same.

Near-duplicates are found by MinHash (Broder 1997): of the letters and digits of a document, without case, every run of
WINDOW bytes is hashed, one in eight kept by its hash, and the least of them under 16 functions is its sketch. Documents
that share a share j of their runs agree in each with probability j, and are taken for alike where both of one of eight
pairs agree: at j = .8, .5, .3 and .1 in 1.00, .90, .53 and .08 of the cases. Linear in the text (22 s a GB); in memory
stay 80 bytes a document.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from nanochat.data import parquet

WINDOW = 24  # bytes, some five words
EVERY = 8  # one run of so many is kept
FEW = 4  # a document of fewer runs than this is only like those of the same letters
PAIRS = 8  # of hash functions
BATCH = 1 << 18  # bytes hashed at once: the arrays of 2 MB that it takes stay in a cache
LONG_LINE = 40  # characters; shorter lines are the same in many texts

# letters and digits, in lower case; all bytes of other scripts; 0 for what does not count
_FOLD = np.array([ord(chr(b).lower()) if chr(b).isalnum() else 0 for b in range(128)] + [*range(128, 256)], np.uint8)
_ODD = np.random.default_rng(24).integers(1 << 63, size=2 * PAIRS + 2, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def sketches(texts: Sequence[str]) -> np.ndarray:
    """(N, PAIRS) uint64: documents that agree in a column are taken for alike."""
    raw = [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    parts = [folded[folded > 0] if (folded := _FOLD[text]).any() else text for text in raw]
    batches = map(_least, map(list, parquet.parts(iter(parts), BATCH, len)))
    found = np.concatenate([np.zeros((0, 2 * PAIRS), np.uint64), *batches])
    return (found[:, ::2] * _ODD[0] ^ found[:, 1::2]) * _ODD[1] + np.arange(PAIRS, dtype=np.uint64)


def _least(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(N, 2 * PAIRS) uint64: the least hashes of the runs of each part; where there are few runs, its own hash."""
    ends = np.cumsum([len(part) for part in parts])
    hashes = np.concatenate([*parts, np.zeros(WINDOW, np.uint8)]).astype(np.uint64)
    for width in (1, 2, 4):  # polynomials over 2, 4, 8 bytes
        hashes = hashes[:-width] * _power(width) + hashes[width:]
    hashes = (hashes[:-16] * _power(8) + hashes[8:-8]) * _power(8) + hashes[16:]
    hashes = (hashes ^ (hashes >> np.uint64(29))) * _ODD[0]
    kept = np.flatnonzero(hashes < np.uint64(2**64 // EVERY))
    owner = np.searchsorted(ends, kept, side="right")
    inside = kept + WINDOW <= np.append(ends, 0)[owner]
    kept, owner = kept[inside], owner[inside]
    chosen = hashes[kept] ^ (hashes[kept] >> np.uint64(32))
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    found = np.zeros((len(parts), 2 * PAIRS), np.uint64)
    for column in range(2 * PAIRS if len(starts) else 0):
        found[owner[starts], column] = np.minimum.reduceat(chosen * _ODD[column + 2], starts)
    for number in np.flatnonzero(np.bincount(owner, minlength=len(parts)) < FEW).tolist():
        digest = hashlib.blake2b(parts[number].tobytes(), digest_size=8).digest()
        found[number] = np.frombuffer(digest, np.uint64)
    return found


def _power(width: int) -> np.uint64:
    return np.uint64(pow(0x9E3779B97F4A7C15, width, 2**64))


def clusters(marks: np.ndarray) -> np.ndarray:
    """(N,) int64 for marks (N, C): documents that agree in a column, or are linked by others that do, have the same
    number, that of the first of them."""
    parent = np.arange(len(marks))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    for column in marks.T:
        order = np.argsort(column, kind="stable")
        for i in np.flatnonzero(column[order[1:]] == column[order[:-1]]).tolist():
            one, other = root(order[i]), root(order[i + 1])
            parent[max(one, other)] = min(one, other)
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    return parent


def hold_out(labels: np.ndarray, sizes: np.ndarray, budget: int, most: int = 0) -> tuple[np.ndarray, bool]:
    """(N,) bool: the documents, in their order, that are for validation; and whether clusters had to be torn.

    labels: the cluster of each, which is to be on one side. Clusters are taken in the order of their first document, up
    to `budget` bytes together: at first only those of a 16th of it, so that many are judged on. Where that leaves more
    than half of the budget empty, one cluster of up to `most` bytes is taken; where there is none, documents are, in
    their order, whatever their cluster."""
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    totals, members = np.bincount(labels, sizes), np.bincount(labels, sizes > 0)
    held = np.zeros(len(totals), bool)
    order = np.argsort(first, kind="stable")

    def room(limit: int = budget) -> float:
        return limit - totals[held].sum()

    for largest in (budget // 16, budget // 4, budget):
        space = room()
        for label in order[~held[order]].tolist() if space > budget / 2 else ():
            alone = members[label] == 1
            if alone and totals[label] > space:
                break
            if totals[label] <= space and (alone or totals[label] <= largest):
                held[label] = True
                space -= totals[label]
    if room() > budget / 2:
        fitting = order[(members > 1)[order] & ~held[order] & (totals <= room(most))[order]]
        held[fitting[:1]] = True
    chosen = held[labels]
    if room() <= budget / 2:
        return chosen, False
    space = room()
    for place in np.flatnonzero(~chosen).tolist():
        if sizes[place] > space:
            break
        chosen[place] = True
        space -= sizes[place]
    return chosen, bool((chosen & ~held[labels] & (members > 1)[labels]).any())


def shared_lines(val: Sequence[str], train: Iterable[str]) -> np.ndarray:
    """(N, 2): how many lines of LONG_LINE characters each document of `val` has, and how many of them stand in `train`,
    too, white space around them not counted."""
    lines = [[line for text in document.split("\n") if len(line := text.strip()) >= LONG_LINE] for document in val]
    wanted = {line for document in lines for line in document}
    found: set[str] = set()
    for document in train:
        found.update(wanted.intersection(map(str.strip, document.split("\n"))))
    return np.array([[len(document), sum(line in found for line in document)] for document in lines]).reshape(-1, 2)
