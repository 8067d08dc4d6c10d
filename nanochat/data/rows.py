"""What a model is trained on, as the loader sees it: data, and the rows they give in a global order.

Text that is tokenized on the way (text_rows), token files (bins) and conversations (chat_rows) implement these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from nanochat.data.sources import Split
from nanochat.errors import UserError
from nanochat.tokenizer import RustBPETokenizer

Row = tuple[np.ndarray, np.ndarray]  # inputs (T,) and targets (T,) of any integer type


class RowSource(ABC):
    """An endless global order of rows, of which this rank makes its own. `start` is called first, and once."""

    sequence_len: int
    filler_token: int  # input of filler rows
    _position: Any

    def start(self, rows_per_step: int, local: range) -> None:
        """local: the numbers, within each global batch of rows_per_step rows, of those that this rank wants."""
        self.rows_per_step, self.local = rows_per_step, local

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same."""

    @abstractmethod
    def seek(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""

    def in_order(self) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        """(inputs, targets, position after it) of every row from the position on, where all ranks make all of them."""
        raise NotImplementedError

    def steps(self) -> Iterator[tuple[Iterable[Row], bool]]:
        """Of each optimizer step: the local rows, made as they are read, and whether any rank has a target in it."""
        from nanochat.runtime import IGNORE_INDEX  # which imports torch; plan_batch is asked before that

        rows = self.in_order()
        while True:
            step = list(islice(rows, self.rows_per_step))
            self._position = step[-1][2]
            signal = any((targets != IGNORE_INDEX).any() for _, targets, _ in step)
            yield [step[number][:2] for number in self.local], signal

    def position(self) -> Any:
        """Where the order stands after the rows that have been read."""
        return self._position

    @abstractmethod
    def state(self, position: Any) -> dict[str, Any]:
        """A position as JSON can hold it, for all ranks (a collective call where ranks stand at different places)."""

    @abstractmethod
    def epoch(self, position: Any) -> float:
        """How often the data have been gone through."""

    def close(self) -> None:  # noqa: B027
        """Stop what runs in the background."""


class TrainData(ABC):
    """What a base model is trained on."""

    source: str
    tokenizer: RustBPETokenizer | None
    """None: the tokens are of one that is not at hand; then no bytes can be counted, no samples shown."""
    tokenizer_hash: str
    vocab_size: int
    document_token: int
    """Starts every document."""
    fingerprint: str | None
    """Changes with token files; None for text."""

    @abstractmethod
    def rows(self, sequence_len: int, seed: int = 0) -> RowSource:
        """Training rows. Token files keep their order, whatever the seed."""

    @abstractmethod
    def fixed_rows(self, split: Split, sequence_len: int, max_tokens: int) -> np.ndarray:
        """Rows (N, sequence_len + 1) to evaluate on, of at most max_tokens targets, the same for every number of ranks.
        Raises UserError where not one can be filled."""

    @abstractmethod
    def horizon_in_epochs(self, sequence_len: int, tokens: int, rows_per_step: int = 1) -> tuple[float, float]:
        """(epochs that training on so many tokens makes, share of the tokens that are in no row), estimated. Raises
        UserError when no row can be filled."""


def sample(count: int, most: int) -> list[int]:
    """Up to `most` of 0 … count - 1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


# ---- How the rows of a step become micro-batches


class BatchPlan(NamedTuple):
    """One optimizer step on each rank."""

    rows_per_step: int  # in the global batch, filler left out
    device_batch_size: int  # rows of each micro-batch: at most what was requested
    batches_per_step: int  # micro-batches on each rank
    filler_rows: int  # masked rows a step, over all ranks
    note: str | None  # what the user should know: a device batch that was lowered, work that is lost to filler


def even_batches(rows: int, most: int) -> tuple[int, int]:
    """(batches, rows in each) for `rows` rows in as few batches of at most `most` as will do, all of one size."""
    batches = -(-rows // most)
    return batches, -(-rows // max(batches, 1))


def plan_batch(total_batch_size: int, device_batch_size: int, max_seq_len: int, world_size: int) -> BatchPlan:
    """Split total_batch_size tokens, in rows of max_seq_len, over world_size ranks in micro-batches of at most
    device_batch_size rows. Raises UserError when the rows do not make up the batch."""
    rows = total_batch_size // max_seq_len
    if total_batch_size % max_seq_len:
        raise UserError(
            f"--total-batch-size={total_batch_size} is no multiple of --max-seq-len={max_seq_len}; "
            f"{max(rows, 1) * max_seq_len} would be"
        )
    batches, size = even_batches(-(-rows // world_size), device_batch_size)
    filler = world_size * batches * size - rows
    notes = []
    if size < device_batch_size:
        split = f"{rows:,} rows a step on {world_size:,} rank(s)"
        notes.append(f"device batch of {size} instead of {device_batch_size}: {split}")
    if filler:
        full = rows + filler
        idle = f" ({world_size - rows:,} ranks have nothing else)" if world_size > rows else ""
        notes.append(
            f"{100 * filler / full:.1f} % of the positions are filler{idle}; "
            f"--total-batch-size={full * max_seq_len} would have none"
        )
    return BatchPlan(rows, size, batches, filler, "; ".join(notes) or None)
