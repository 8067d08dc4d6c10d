"""Documents -> packed token rows on the device, in one global order for any number of ranks, resumable exactly.

The order. Each epoch shuffles the row groups of all train shards by (seed, epoch) and cuts them into units of about
128 documents. Unit number u, counted through all epochs, belongs to stream u mod S, where S is the number of rows in
one global batch: row i of every batch comes from stream i. A stream packs each of its units by itself and hands out
the rows one by one. Ranks own whole streams: rank r of W has streams r, r + W, …, and rows of filler where that does
not come out even or leaves nothing (see batching.py). So 1, 7 or 1,024 ranks see the same global batches, every
document is read once per epoch by exactly one rank, and no rank can starve: the unit numbers never end.

The state is three small integers a stream: units begun, rows taken from the last one, and how many it has. The step
alone would not do: how many rows a unit gives shows when it is packed, to its owner only, so whoever resumed would have
to pack all that came before. Units of a fixed number of rows would make it do, but throw text away.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from nanochat.data.batching import even_batches
from nanochat.data.packing import pack_rows
from nanochat.data.parquet import open_shard, read_texts
from nanochat.data.prefetch import Prefetcher
from nanochat.dataset import dataset_bytes, list_shards
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX

UNIT_DOCUMENTS = 128  # packing 1,024 at a time would crop 9.6 % instead of 10.3 % (T=2048) but make coarse units
PREFETCH_BATCHES = 4


class Encoder(Protocol):
    """The part of a tokenizer that the loader needs."""

    def get_bos_token_id(self) -> int: ...

    def batch_encode(self, texts: list[str], num_threads: int = 1) -> list[np.ndarray]: ...


class Unit(NamedTuple):
    """Some documents of one row group, and the generator key that shuffles their rows."""

    path: Path
    row_group: int
    start: int
    stop: int
    key: tuple[int, int, int]


class Batch(NamedTuple):
    """inputs and targets (B, T) int64 on the device; targets are the inputs one position later, or -1 in filler."""

    inputs: torch.Tensor
    targets: torch.Tensor


class UnitOrder:
    """The endless sequence of units of some shards: `order[u]` for any u >= 0."""

    def __init__(self, shards: list[Path], seed: int, streams: int) -> None:
        self.seed = seed
        self.row_groups: list[tuple[Path, int, int]] = []  # path, row group, documents
        for path in shards:
            metadata = open_shard(path).metadata
            self.row_groups += [(path, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        counts = np.array([count for _, _, count in self.row_groups], dtype=np.int64)
        documents = int(counts.sum())
        if not documents:
            raise UserError(f"no documents in {len(shards)} shard(s); get data with `python -m nanochat.dataset`")
        # Little data: smaller units, so that the streams share an epoch instead of one of them reading it all.
        self.unit_documents = int(np.clip(documents // (4 * streams), 16, UNIT_DOCUMENTS))
        self._units = -(-counts // self.unit_documents)  # in each row group
        self.per_epoch = int(self._units.sum())
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)

    def _shuffled_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row groups in the order of this epoch, its units up to the end of each). The units themselves are made when
        asked for: the two million of an epoch of 5,000 shards would cost each rank 9 s and 0.7 GB."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.row_groups))
        return order, np.cumsum(self._units[order])

    def __getitem__(self, number: int) -> Unit:
        epoch, within = divmod(number, self.per_epoch)
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, within, side="right"))
        path, group, count = self.row_groups[order[place]]
        start = int(within - ends[place] + self._units[order[place]]) * self.unit_documents
        return Unit(path, group, start, min(start + self.unit_documents, count), (self.seed, epoch, within))


class _Packer:
    """Unit -> rows. Safe to use from several threads."""

    def __init__(self, tokenizer: Encoder, row_len: int) -> None:
        self.tokenizer, self.row_len, self.bos = tokenizer, row_len, tokenizer.get_bos_token_id()
        self._lock = threading.Lock()  # units of one row group are wanted at once: read it once
        self._read = lru_cache(maxsize=4)(lambda path, group: read_texts(open_shard(path), group, str(path)))
        self.kept = self.cropped = self.text_bytes = 0

    def rows(self, unit: Unit) -> np.ndarray:
        """(R, row_len) token rows of a unit, shuffled: packing hands out long documents first."""
        with self._lock:
            texts = self._read(unit.path, unit.row_group)[unit.start : unit.stop]
        rows, cropped = pack_rows(self.tokenizer.batch_encode(texts, 1), self.row_len, self.bos)
        with self._lock:
            self.kept += rows.size
            self.cropped += cropped
            self.text_bytes += sum(len(text.encode()) for text in texts)
        return rows[np.random.default_rng(unit.key).permutation(len(rows))]

    def cropped_share(self) -> float:
        return self.cropped / max(self.kept + self.cropped, 1)


class _Stream:
    """One row of every global batch: its units number s, s+S, s+2S, …, each packed ahead of its use."""

    def __init__(self, loader: "TrainLoader", number: int, begun: int, taken: int, count: int) -> None:
        self.loader, self.number = loader, number
        self.begun, self.taken, self.count = begun, taken, count
        self.rows: np.ndarray | None = None
        self.resumed = self._submit(begun - 1) if begun else None  # not waited for here: all streams encode at once
        self.next_rows = self._submit(begun)

    def _submit(self, nth: int) -> Future[np.ndarray]:
        unit = self.loader.order[self.number + nth * self.loader.streams]
        return self.loader.pool.submit(self.loader.packer.rows, unit)

    def next(self) -> np.ndarray:
        if self.resumed is not None:
            self.rows, self.resumed = self.resumed.result(), None
            if len(self.rows) != self.count:
                raise UserError(
                    f"cannot resume the data order: documents that filled {self.count} rows now fill {len(self.rows)}; "
                    "the text or the tokenizer has changed"
                )
        empty = 0
        while self.rows is None or self.taken == len(self.rows):
            self.rows = self.next_rows.result()  # may be empty: a few short documents need not fill a row
            self.begun, self.taken = self.begun + 1, 0
            self.next_rows = self._submit(self.begun)
            empty = empty + 1 if len(self.rows) == 0 else 0
            if empty > self.loader.order.per_epoch:
                raise too_little_text(self.loader.order, self.loader.sequence_len)
        self.taken += 1
        return self.rows[self.taken - 1]

    def position(self) -> tuple[int, int, int]:
        assert self.rows is not None
        return self.begun, self.taken, len(self.rows)


class TrainLoader:
    """Endless micro-batches for one rank. Read with `next_batch()`; call `state_dict()` between optimizer steps.

    rows_per_step rows are dealt to world_size ranks, of any number, in batches_per_step micro-batches of at most
    device_batch_size rows (the attribute says how many it came to); see batching.plan_batch.
    """

    def __init__(
        self,
        tokenizer: Encoder,
        source: str,
        rows_per_step: int,
        sequence_len: int,
        device_batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.streams, self.seed = rows_per_step, seed
        self.sequence_len, self.device = sequence_len, torch.device(device)
        self.order = UnitOrder(list_shards(source, "train"), seed, rows_per_step)
        self.packer = _Packer(tokenizer, sequence_len + 1)
        threads = max(1, min(8, (os.cpu_count() or 2) // 2))
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self.mine = list(range(rank, rows_per_step, world_size))
        rows_of_first = -(-rows_per_step // world_size)  # no rank has more, and all make as many batches
        self.batches_per_step, self.device_batch_size = even_batches(rows_of_first, device_batch_size)
        positions = self._check(state)
        self._positions = {number: positions[number] for number in self.mine}
        self._given = 0  # batches handed out of the current step
        self._ahead = Prefetcher(self._batches(), PREFETCH_BATCHES, "dataloader")

    def _expected(self) -> dict[str, int]:
        """What must be the same for positions to mean the same."""
        return {"seed": self.seed, "streams": self.streams, "sequence_len": self.sequence_len,
                "units_per_epoch": self.order.per_epoch}  # fmt: skip

    def _check(self, state: dict[str, Any] | None) -> list[tuple[int, int, int]]:
        if state is None:
            return [(0, 0, 1)] * self.streams
        for key, value in self._expected().items():
            if state[key] != value:
                raise UserError(f"cannot resume the data order: {key} was {state[key]} and is now {value}")
        return [(begun, taken, rows) for begun, taken, rows in state["positions"]]

    def _batches(self) -> Iterator[tuple[torch.Tensor, dict[int, tuple[int, int, int]]]]:
        """(pinned micro-batch, first the rows of this rank's streams, then filler; their positions after it), for
        ever."""
        streams = {number: _Stream(self, number, *self._positions[number]) for number in self.mine}
        pin = self.device.type == "cuda"
        shape = (self.device_batch_size, self.packer.row_len)
        while True:
            for first in range(0, self.batches_per_step * self.device_batch_size, self.device_batch_size):
                numbers = self.mine[first : first + self.device_batch_size]
                rows = np.full(shape, self.packer.bos, dtype=np.int32)
                for row, number in enumerate(numbers):
                    rows[row] = streams[number].next()
                batch = torch.from_numpy(rows)
                yield batch.pin_memory() if pin else batch, {n: streams[n].position() for n in numbers}

    def next_batch(self) -> Batch:
        """The next (device_batch_size, sequence_len) micro-batch. Raises what the background threads ran into."""
        rows, positions = self._ahead.get()
        self._positions.update(positions)
        self._given = (self._given + 1) % self.batches_per_step
        rows = rows.to(self.device, non_blocking=True).long()
        # contiguous, as batches of every other kind are: a compiled model is compiled once for each layout
        inputs = rows[:, :-1].contiguous()
        targets = rows[:, 1:].clone(memory_format=torch.contiguous_format)  # a single row would share its memory
        targets[len(positions) :] = IGNORE_INDEX
        return Batch(inputs, targets)

    def state_dict(self) -> dict[str, Any]:
        """Where all streams of all ranks stand (a collective call when distributed)."""
        assert self._given == 0, "the state is taken between optimizer steps"
        positions = dict(self._positions)
        if dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, positions)
            positions = {number: position for part in gathered for number, position in part.items()}
        return {**self._expected(), "positions": [list(positions[number]) for number in range(self.streams)]}

    def epoch(self) -> float:
        """How often the data have been gone through, from this rank's streams (0 where it has none)."""
        units = [begun - 1 + taken / rows for begun, taken, rows in self._positions.values() if begun]
        return sum(units) / max(len(self._positions), 1) * self.streams / self.order.per_epoch

    def cropped_share(self) -> float:
        """Share of this rank's tokens so far that are in no row."""
        return self.packer.cropped_share()

    def close(self) -> None:
        """Stop the threads; the loader is of no use afterwards."""
        self._ahead.close()
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()


def fixed_rows(tokenizer: Encoder, source: str, split: str, sequence_len: int, max_tokens: int = -1) -> np.ndarray:
    """Rows (R, sequence_len + 1) for evaluation: always the same for the same data, whatever the number of ranks.

    At most max_tokens targets (-1 = the whole split), from row groups in a fixed shuffled order.
    """
    order = UnitOrder(list_shards(source, split), seed=0, streams=1)  # type: ignore[arg-type]
    packer = _Packer(tokenizer, sequence_len + 1)
    wanted = max_tokens // sequence_len if max_tokens >= 0 else None
    parts: list[np.ndarray] = []
    count = 0
    for number in range(order.per_epoch):
        parts.append(packer.rows(order[number]))
        count += len(parts[-1])
        if wanted is not None and count >= wanted:
            break
    rows = np.concatenate(parts)[:wanted]
    if not len(rows):
        raise UserError(f"the {split} split of {source} does not fill one row of {sequence_len + 1} tokens")
    return rows


def row_batches(
    rows: np.ndarray, device_batch_size: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Rows (N, T + 1) as batches, dealt to ranks row by row; see target_batches."""
    return target_batches(rows[:, :-1], rows[:, 1:], device_batch_size, device, rank, world_size)


def target_batches(
    inputs: np.ndarray,
    targets: np.ndarray,
    device_batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Inputs and targets (N, T) as batches of at most device_batch_size rows, dealt to ranks row by row.

    Every rank gives the same number of batches of the same shape, filled with masked rows (targets -1): under sharded
    parameters a rank that made one forward pass less would leave the others waiting. One shape also means that a model
    is compiled once.
    """
    batches, size = even_batches(-(-len(inputs) // world_size), device_batch_size)
    for batch in range(batches):
        first = rank + batch * size * world_size
        mine = slice(first, first + size * world_size, world_size)
        x = torch.zeros(size, inputs.shape[1], dtype=torch.long)
        y = torch.full_like(x, IGNORE_INDEX)
        count = len(inputs[mine])
        x[:count], y[:count] = (torch.from_numpy(part[mine].astype(np.int64)) for part in (inputs, targets))
        yield Batch(x.to(device), y.to(device))


def horizon_in_epochs(
    tokenizer: Encoder, source: str, sequence_len: int, horizon_tokens: int, rows_per_step: int = 1
) -> tuple[float, float]:
    """(epochs that a run over horizon_tokens will make, share of tokens cropped by packing), estimated from a sample of
    up to eight units.

    Where an epoch has fewer units than a step has rows, the first step alone goes through it more than once, and that
    is the least. Raises UserError when no row can be filled.
    """
    order = UnitOrder(list_shards(source, "train"), seed=0, streams=rows_per_step)
    packer = _Packer(tokenizer, sequence_len + 1)
    sample = np.linspace(0, order.per_epoch - 1, min(8, order.per_epoch)).astype(int).tolist()
    for number in sample:
        packer.rows(order[number])
    if not packer.kept and not any(len(packer.rows(order[number])) for number in range(order.per_epoch)):
        raise too_little_text(order, sequence_len)
    kept_per_byte = packer.kept / max(packer.text_bytes, 1)
    available = kept_per_byte * dataset_bytes(source, "train")
    in_first_step = rows_per_step / order.per_epoch
    epochs = max(horizon_tokens / max(available, 1.0), in_first_step if in_first_step > 1 else 0.0)
    return epochs, packer.cropped_share()


def too_little_text(order: UnitOrder, sequence_len: int) -> UserError:
    """The error that says so."""
    return UserError(
        f"too little text: no {order.unit_documents} documents fill a row of {sequence_len} tokens; get more data or "
        f"lower --max-seq-len"
    )
