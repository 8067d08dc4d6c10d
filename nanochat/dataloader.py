"""Rows of tokens -> micro-batches on the device, in one global order for any number of ranks, resumable exactly.

- Rank r of W takes rows r, r + W, … of every global batch that the row source gives (nanochat.data.rows), so 1, 7 or
  1,024 ranks see the same global batches. The state is the position of the source, and holds for any number of ranks.
- All ranks make the same number of micro-batches of one shape, because under sharded parameters each forward pass is a
  collective. The rows that are missing for that are filler, whose targets do not count.
- A background thread prepares the next few batches; what it raises is raised by `next_batch`.
"""

import pkgutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from nanochat.data.rows import Row, RowSource, TrainData, even_batches
from nanochat.data.sources import canonical
from nanochat.data.text_rows import TextData
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX
from nanochat.tokenizer import get_tokenizer

PREFETCH_BATCHES = 4
TOKEN_FILES = "nanochat.data.bins:open_folder"  # by name: the loader works without them

T = TypeVar("T")


class Batch(NamedTuple):
    """inputs and targets (B, T) int64 on the device; a target is the input one position later, or -1: not counted."""

    inputs: torch.Tensor
    targets: torch.Tensor


class RowLoader:
    """Endless micro-batches of one rank from a row source; `state_dict()` between optimizer steps. rows_per_step rows
    are split over world_size ranks in batches_per_step micro-batches of at most device_batch_size rows (the attribute
    says how many it came to). Raises UserError where `state` belongs to another order."""

    def __init__(
        self,
        source: RowSource,
        rows_per_step: int,
        device_batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.device = source, torch.device(device)
        rows_of_first = -(-rows_per_step // world_size)  # no rank has more
        self.batches_per_step, self.device_batch_size = even_batches(rows_of_first, device_batch_size)
        source.start(rows_per_step, range(rank, rows_per_step, world_size))
        if state is not None:
            for key, value in source.identity().items():
                if state.get(key) != value:
                    raise UserError(f"cannot resume the data order: {key} was {state.get(key)} and is now {value}")
            try:
                source.seek(state)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UserError(f"cannot resume the data order: its state is damaged ({error!r})") from None
        self.has_gradient_signal = True  # whether the step of the last batch has a target on any rank
        self._position = source.position()
        self._taken = 0  # batches of the current step
        self._ahead = Prefetcher(self._batches(), PREFETCH_BATCHES, "dataloader")

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool, Any]]:
        """(inputs, targets) int32, pinned for a GPU: local rows, then filler; the step's gradient signal; and, with
        the last batch of a step, the position after it."""
        shape = self.device_batch_size, self.source.sequence_len
        pin = self.device.type == "cuda"
        for step, signal in self.source.steps():
            rows = iter(step)
            for number in range(1, self.batches_per_step + 1):
                x, y = filled_up(islice(rows, self.device_batch_size), shape, self.source.filler_token)
                if pin:
                    x, y = x.pin_memory(), y.pin_memory()
                yield x, y, signal, self.source.position() if number == self.batches_per_step else None

    def next_batch(self) -> Batch:
        """The next (device_batch_size, sequence_len) micro-batch. Raises what the background threads ran into."""
        inputs, targets, self.has_gradient_signal, position = self._ahead.get()
        if position is not None:
            self._position = position
        self._taken = (self._taken + 1) % self.batches_per_step
        return Batch(*(part.to(self.device, non_blocking=True).long() for part in (inputs, targets)))

    def state_dict(self) -> dict[str, Any]:
        """Where the global order stands; call it on all ranks."""
        assert self._taken == 0, "the state is taken between optimizer steps"
        return {**self.source.identity(), **self.source.state(self._position)}

    def epoch(self) -> float:
        return self.source.epoch(self._position)

    def close(self) -> None:
        """Stop the threads; the loader is of no use afterwards."""
        self._ahead.close()
        self.source.close()


class Prefetcher(Generic[T]):
    """`get()` gives the next item of an endless iterator, or raises what it raised; `size` items are made ahead."""

    def __init__(self, items: Iterator[T], size: int, name: str) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._ahead = deque(self._thread.submit(next, items) for _ in range(size))

    def get(self) -> T:
        self._ahead.append(self._thread.submit(next, self._items))
        return self._ahead.popleft().result()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


# ---- Micro-batches as tensors


def filled_up(rows: Iterable[Row], shape: tuple[int, int], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets int32 of `shape`: these rows, then filler whose targets do not count."""
    inputs, targets = np.full(shape, filler, dtype=np.int32), np.full(shape, IGNORE_INDEX, dtype=np.int32)
    for place, row in enumerate(rows):
        inputs[place], targets[place] = row
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def row_batches(rows: np.ndarray, *how: Any) -> Iterator[Batch]:
    """Rows (N, T + 1) as target_batches has them."""
    return target_batches(rows[:, :-1], rows[:, 1:], *how)


def target_batches(
    inputs: np.ndarray,
    targets: np.ndarray,
    device_batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Inputs and targets (N, T) as the batches of one rank, row by row, of at most device_batch_size rows. Every rank
    gives the same number of batches of the same shape, filled with masked rows (targets -1), for the reason given
    above; and a model is compiled for one shape only."""
    batches, size = even_batches(-(-len(inputs) // world_size), device_batch_size)
    for batch in range(batches):
        first = rank + batch * size * world_size
        local = slice(first, first + size * world_size, world_size)
        x, y = filled_up(zip(inputs[local], targets[local], strict=True), (size, inputs.shape[1]), 0)
        yield Batch(x.to(device).long(), y.to(device).long())


# ---- What a base model is trained on


def open_data(source: str) -> TrainData:
    """The data of --source: text (see nanochat.dataset), or bin:DIR, token files, where DIR is a path or a name below
    tokenized_data/ in the store. Raises UserError where there are none."""
    kind, _, folder = source.partition(":")
    if kind == "bin":
        found: TrainData = pkgutil.resolve_name(TOKEN_FILES)(folder)
        return found
    return TextData(canonical(source), get_tokenizer())
