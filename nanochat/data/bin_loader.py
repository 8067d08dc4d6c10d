"""Token files -> rows that begin with a document, on the device, in one global order for any number of ranks.

The order is that of the data. A row is sequence_len + 1 tokens from a document token on; the next row begins at the
first document token at or behind its end, so that nothing comes twice. What lies between is skipped: the rest of the
document that the row's end has cut. Rows do not run over from one file to the next. After the last file the first one
comes again. Row i of a global batch goes to rank i mod W, with rows of filler where that does not come out even (see
batching.py): 1, 7 or 1,024 ranks see the same global batches.

Every rank finds all row starts itself, in the background and one file ahead (0.03 to 0.2 s for 10⁸ tokens), and so
the state is two integers: the file, counted through all epochs, and the place in it where the last row ended.

How much is skipped is a matter of the row length. With documents as long as FineWeb's (drawn lognormal: median 403
tokens, mean 690) rows of 1,024 tokens leave out 44 % of all tokens, of 2,048 30 %, of 16,384 6 %, of 65,536 1.5 %.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.data.batching import even_batches
from nanochat.data.bins import Split, TokenFolder, open_tokens, read_header
from nanochat.data.prefetch import Prefetcher
from nanochat.dataloader import Batch
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX

PREFETCH_BATCHES = 4
SCAN_TOKENS = 1 << 26  # looked at in one go: bounds what a file of 2³¹ tokens takes in memory to 64 MB
VAL_TOKENS = 10_485_760  # the validation set of the speedrun: the first so many


class Position(NamedTuple):
    """Where the order stands: behind the last row taken."""

    file: int  # counted through all epochs
    offset: int  # tokens from the beginning of that file


class _Row(NamedTuple):
    """One row of the global order, and the position behind it."""

    tokens: np.ndarray  # (N,) uint16 of its file
    start: int
    after: Position


def document_starts(tokens: np.ndarray, document_token: int) -> np.ndarray:
    """Positions (D,) int64 of the document token."""
    parts = range(0, len(tokens), SCAN_TOKENS)
    found = [np.flatnonzero(tokens[first : first + SCAN_TOKENS] == document_token) + first for first in parts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def row_starts(documents: np.ndarray, count: int, row_len: int) -> np.ndarray:
    """Starts (R,) int64 of the rows of row_len tokens among `count`: each the first of `documents` (sorted positions)
    at or behind the end of the row before it."""
    documents = documents[documents <= count - row_len]
    following = np.searchsorted(documents, documents + row_len).tolist()  # of each document, were it to begin a row
    chosen = []
    place = 0
    while place < len(following):
        chosen.append(place)
        place = following[place]
    return documents[np.array(chosen, dtype=np.int64)]


class BinLoader:
    """Endless micro-batches for one rank. Read with `next_batch()`; call `state_dict()` between optimizer steps.

    rows_per_step rows are dealt to world_size ranks, of any number, in batches_per_step micro-batches of at most
    device_batch_size rows (the attribute says how many it came to); see batching.plan_batch.
    Raises UserError where a file is damaged or `state` belongs to other data; next_batch() does where no file holds a
    whole row, or a token is not in the vocabulary.
    """

    def __init__(
        self,
        folder: TokenFolder,
        rows_per_step: int,
        sequence_len: int,
        device_batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.rows_per_step, self.sequence_len = folder, rows_per_step, sequence_len
        self.device = torch.device(device)
        self.mine = range(rank, rows_per_step, world_size)
        rows_of_first = -(-rows_per_step // world_size)  # no rank has more, and all make as many batches
        self.batches_per_step, self.device_batch_size = even_batches(rows_of_first, device_batch_size)
        self.ends = np.cumsum([read_header(path) for path in folder.train])
        self._position = self._check(state)
        self._kept = self._seen = 0  # tokens of the files scanned so far: in rows, and in all
        self._given = 0  # batches handed out of the current step
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scan")
        self._ahead = Prefetcher(self._batches(self._position), PREFETCH_BATCHES, "bin_loader")

    def _expected(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same."""
        return {"sequence_len": self.sequence_len, "files": self.folder.fingerprint}

    def _check(self, state: dict[str, Any] | None) -> Position:
        if state is None:
            return Position(0, 0)
        for key, value in self._expected().items():
            if state.get(key) != value:
                raise UserError(f"cannot resume the data order: {key} was {state.get(key)} and is now {value}")
        return Position(state["file"], state["offset"])

    def _scan(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, row starts) of file `number`."""
        # a plain view: taking a slice of a memmap itself costs 2 µs, of this one 0.3 µs
        tokens = np.asarray(open_tokens(self.folder.train[number % len(self.folder.train)]))
        starts = row_starts(document_starts(tokens, self.folder.document_token), len(tokens), self.sequence_len + 1)
        self._kept += len(starts) * (self.sequence_len + 1)
        self._seen += len(tokens)
        return tokens, starts

    def _rows(self, position: Position) -> Iterator[_Row]:
        """All rows from `position` on."""
        number, offset = position
        row_len = self.sequence_len + 1
        empty = 0
        ahead = self._pool.submit(self._scan, number)
        while True:
            tokens, starts = ahead.result()
            ahead = self._pool.submit(self._scan, number + 1)
            place = int(np.searchsorted(starts, offset))
            if offset and (place == 0 or starts[place - 1] + row_len != offset):
                raise UserError(
                    f"cannot resume the data order: no row ends at token {offset:,}; the tokens have changed"
                )
            for start in starts[place:].tolist():
                yield _Row(tokens, start, Position(number, start + row_len))
            empty = 0 if len(starts) else empty + 1
            if empty == len(self.folder.train):
                raise too_little_data(self.folder, "train", self.sequence_len)
            number, offset = number + 1, 0

    def _batches(self, position: Position) -> Iterator[tuple[torch.Tensor, int, Position]]:
        """(pinned micro-batch, rows of it that are no filler, position behind the whole step), for ever."""
        order = self._rows(position)
        pin = self.device.type == "cuda"
        shape = (self.device_batch_size, self.sequence_len + 1)
        while True:
            step = [next(order) for _ in range(self.rows_per_step)]
            for first in range(0, self.batches_per_step * self.device_batch_size, self.device_batch_size):
                mine = [step[number] for number in self.mine[first : first + self.device_batch_size]]
                rows = np.full(shape, self.folder.document_token, dtype=np.int32)
                for place, row in enumerate(mine):
                    rows[place] = row.tokens[row.start : row.start + shape[1]]
                _check_vocabulary(rows, self.folder)
                batch = torch.from_numpy(rows)
                yield batch.pin_memory() if pin else batch, len(mine), step[-1].after

    def next_batch(self) -> Batch:
        """The next (device_batch_size, sequence_len) micro-batch. Raises what the background threads ran into."""
        rows, real, self._position = self._ahead.get()
        self._given = (self._given + 1) % self.batches_per_step
        rows = rows.to(self.device, non_blocking=True).long()
        # contiguous, as batches of every other kind are: a compiled model is compiled once for each layout
        inputs = rows[:, :-1].contiguous()
        targets = rows[:, 1:].clone(memory_format=torch.contiguous_format)  # a single row would share its memory
        targets[real:] = IGNORE_INDEX
        return Batch(inputs, targets)

    def state_dict(self) -> dict[str, Any]:
        """Where all ranks stand; each knows it without asking."""
        assert self._given == 0, "the state is taken between optimizer steps"
        return {**self._expected(), **self._position._asdict()}

    def epoch(self) -> float:
        """How often the data have been gone through; the same on every rank."""
        epochs, file = divmod(self._position.file, len(self.ends))
        before = int(self.ends[file - 1]) if file else 0
        return epochs + (before + self._position.offset) / max(int(self.ends[-1]), 1)

    def cropped_share(self) -> float:
        """Share of the tokens that are in no row, in the files looked at since the start."""
        return 1 - self._kept / max(self._seen, 1)

    def close(self) -> None:
        """Stop the threads; the loader is of no use afterwards."""
        self._ahead.close()
        self._pool.shutdown(cancel_futures=True)


def _check_vocabulary(rows: np.ndarray, folder: TokenFolder) -> None:
    largest = int(rows.max(initial=0))  # on a GPU an index beyond the embedding would end in a device-side assert
    if largest >= folder.vocab_size:
        raise UserError(f"{folder.path} has token {largest}, but a vocabulary of {folder.vocab_size}: other tokenizer?")


def fixed_rows_from_bin(folder: TokenFolder, split: Split, sequence_len: int, tokens: int = VAL_TOKENS) -> np.ndarray:
    """Rows (N, sequence_len + 1) uint16 for evaluation, for dataloader.row_batches: the first `tokens` tokens of the
    split, one behind the other whatever documents begin, each predicted token once.

    N = tokens // sequence_len, or fewer where there are not as many. A row's last token is the first of the next, so
    that inputs and targets are the same stream, one apart. Raises UserError where not one row can be filled.
    """
    parts: list[np.ndarray] = []
    wanted = tokens // sequence_len * sequence_len + 1
    have = 0
    for path in folder.files(split):
        parts.append(open_tokens(path)[: wanted - have])
        have += len(parts[-1])
        if have == wanted:
            break
    stream = np.concatenate(parts)
    if have < sequence_len + 1 or wanted == 1:
        raise too_little_data(folder, split, sequence_len)
    rows = np.lib.stride_tricks.sliding_window_view(stream, sequence_len + 1)[::sequence_len].copy()
    _check_vocabulary(rows, folder)
    return rows


def bin_horizon_in_epochs(folder: TokenFolder, sequence_len: int, horizon_tokens: int) -> tuple[float, float]:
    """(epochs that a run over horizon_tokens will make, share of tokens that are in no row), both taken from the first
    train file that holds a row. Raises UserError when none does."""
    counts = [read_header(path) for path in folder.train]
    for path, count in zip(folder.train, counts, strict=True):
        documents = document_starts(open_tokens(path), folder.document_token)
        rows = len(row_starts(documents, count, sequence_len + 1))
        if rows:
            trained_share = rows * sequence_len / count
            return horizon_tokens / (trained_share * sum(counts)), 1 - rows * (sequence_len + 1) / count
    raise too_little_data(folder, "train", sequence_len)


def too_little_data(folder: TokenFolder, split: Split, sequence_len: int) -> UserError:
    """The error that says so."""
    files: tuple[Path, ...] = folder.files(split)
    aligned = " from the start of a document on" if split == "train" else ""
    return UserError(
        f"too little data: none of the {len(files)} {split} file(s) of {folder.path} fills a row of "
        f"{sequence_len + 1} tokens{aligned}; get more data or lower --max-seq-len"
    )
