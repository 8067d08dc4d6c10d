"""Text -> rows of tokens, packed on the way: the row source of pretraining.

- Units: each epoch shuffles the row groups of all train shards by (seed, epoch) and cuts them into units of about 128
  documents. Unit number u, counted through all epochs, belongs to stream u mod S, where S is the number of rows in one
  global batch.
- Streams: row i of every global batch comes from stream i, which packs each of its units by itself and hands out the
  rows one by one. Ranks own whole streams, so every document is read once an epoch by exactly one rank, and no rank can
  starve: the unit numbers never end.
- State: three integers a stream (`Position`). The step alone would not do: how many rows a unit gives is known only
  once it is packed.
"""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanochat.data.packing import pack_rows
from nanochat.data.parquet import open_shard, read_texts, up_to
from nanochat.data.rows import Row, RowSource, TrainData, sample
from nanochat.data.sources import Split, dataset_bytes, list_shards
from nanochat.errors import UserError
from nanochat.runtime import gather
from nanochat.tokenizer import RustBPETokenizer

UNIT_DOCUMENTS = 128  # packing 1,024 at a time would crop 9.6 % instead of 10.3 % (T=2048) but make coarse units

Position = tuple[int, int, int]  # of a stream: units begun, rows taken from the last one, and how many it has


class Unit(NamedTuple):
    """Some documents of one row group, and the generator key that shuffles their rows."""

    path: Path
    row_group: int
    start: int
    stop: int
    key: tuple[int, int, int]


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
        """(row groups in the order of this epoch, its units up to the end of each). The units themselves are made on
        demand: the two million of an epoch of 5,000 shards would cost each rank 9 s and 0.7 GB."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.row_groups))
        return order, np.cumsum(self._units[order])

    def __getitem__(self, number: int) -> Unit:
        epoch, within = divmod(number, self.per_epoch)
        order, ends = self._epoch(epoch)
        place = int(np.searchsorted(ends, within, side="right"))
        path, group, count = self.row_groups[order[place]]
        start = int(within - ends[place] + self._units[order[place]]) * self.unit_documents
        return Unit(path, group, start, min(start + self.unit_documents, count), (self.seed, epoch, within))

    def too_little_text(self, sequence_len: int) -> UserError:
        return UserError(
            f"too little text: no {self.unit_documents} documents fill a row of {sequence_len} tokens; get more data "
            f"or lower --max-seq-len"
        )


class Packer:
    """Units -> rows of row_len tokens. Safe to use from several threads."""

    def __init__(self, tokenizer: RustBPETokenizer, row_len: int) -> None:
        self.tokenizer, self.row_len = tokenizer, row_len
        self.pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), thread_name_prefix="encode")
        self._lock = threading.Lock()  # units of one row group are wanted at once: read it once
        self._read = lru_cache(maxsize=4)(lambda path, group: read_texts(open_shard(path), group, str(path)))
        self.kept = self.cropped = self.text_bytes = 0

    def rows(self, unit: Unit) -> np.ndarray:
        """(R, row_len) token rows of a unit, shuffled: packing hands out long documents first."""
        with self._lock:
            texts = self._read(unit.path, unit.row_group)[unit.start : unit.stop]
        bos = self.tokenizer.get_bos_token_id()
        rows, cropped = pack_rows(self.encode(texts), self.row_len, bos)
        with self._lock:
            self.kept += rows.size
            self.cropped += cropped
            self.text_bytes += sum(len(text.encode()) for text in texts)
        return rows[np.random.default_rng(unit.key).permutation(len(rows))]

    def encode(self, texts: list[str]) -> Sequence[np.ndarray]:
        return self.tokenizer.batch_encode(texts, 1)


class TextRows(RowSource):
    """The streams of this rank."""

    def __init__(self, tokenizer: RustBPETokenizer, shards: list[Path], sequence_len: int, seed: int = 0) -> None:
        self.shards, self.sequence_len, self.seed = shards, sequence_len, seed
        self.filler_token = tokenizer.get_bos_token_id()
        self.packer = Packer(tokenizer, sequence_len + 1)

    def start(self, rows_per_step: int, local: range) -> None:
        super().start(rows_per_step, local)
        self.order = UnitOrder(self.shards, self.seed, rows_per_step)
        self._position: dict[int, Position] = dict.fromkeys(local, (0, 0, 1))  # of each local stream

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "streams": self.rows_per_step, "sequence_len": self.sequence_len,
                "units_per_epoch": self.order.per_epoch}  # fmt: skip

    def seek(self, state: dict[str, Any]) -> None:
        for number in self._position:
            begun, taken, rows = state["positions"][number]
            self._position[number] = begun, taken, rows

    def steps(self) -> Iterator[tuple[Iterator[Row], bool]]:
        streams = []
        for number, (begun, _, _) in self._position.items():
            # the unit that was begun and the next one; not waited for here: all streams encode at once
            packed = [self._pack(number, nth) for nth in range(max(0, begun - 1), begun + 1)]
            streams.append(self._stream(number, packed))
        while True:
            yield (next(stream) for stream in streams), True

    def _pack(self, number: int, nth: int) -> Future[np.ndarray]:
        """The rows of the unit that stream `number` comes to as its nth."""
        return self.packer.pool.submit(self.packer.rows, self.order[number + nth * self.rows_per_step])

    def _stream(self, number: int, packed: list[Future[np.ndarray]]) -> Iterator[Row]:
        """Row `number` of every global batch: from units number, number + streams, …, each packed ahead of its use."""
        begun, taken, count = self._position[number]
        rows = packed.pop(0).result() if begun else np.empty((0, 0))
        if begun and len(rows) != count:
            raise UserError(
                f"cannot resume the data order: documents that filled {count} rows now fill {len(rows)}; "
                "the text or the tokenizer has changed"
            )
        empty = 0
        while True:
            for place in range(taken, len(rows)):
                self._position[number] = begun, place + 1, len(rows)
                yield rows[place, :-1], rows[place, 1:]
            rows, begun, taken = packed.pop().result(), begun + 1, 0
            packed.append(self._pack(number, begun))
            empty = 0 if len(rows) else empty + 1  # a few short documents need not fill a row
            if empty > self.order.per_epoch:
                raise self.order.too_little_text(self.sequence_len)

    def position(self) -> dict[int, Position]:
        return dict(self._position)

    def state(self, position: dict[int, Position]) -> dict[str, Any]:
        everywhere = {number: at for part in gather(position) for number, at in part.items()}
        return {"positions": [list(everywhere[number]) for number in range(self.rows_per_step)]}

    def epoch(self, position: dict[int, Position]) -> float:
        """From this rank's streams; 0 where it has none."""
        units = [begun - 1 + taken / rows for begun, taken, rows in position.values() if begun]
        return sum(units) / max(len(position), 1) * self.rows_per_step / self.order.per_epoch

    def close(self) -> None:
        self.packer.pool.shutdown(cancel_futures=True)


class TextData(TrainData):
    """A text source and the tokenizer that makes tokens of it."""

    tokenizer: RustBPETokenizer
    fingerprint = None

    def __init__(self, source: str, tokenizer: RustBPETokenizer) -> None:
        self.source, self.tokenizer, self.tokenizer_hash = source, tokenizer, tokenizer.hash
        self.vocab_size, self.document_token = tokenizer.get_vocab_size(), tokenizer.get_bos_token_id()

    def rows(self, sequence_len: int, seed: int = 0) -> TextRows:
        return TextRows(self.tokenizer, list_shards(self.source, "train"), sequence_len, seed)

    def fixed_rows(
        self, split: Split, sequence_len: int, max_tokens: int = -1, packer: Packer | None = None
    ) -> np.ndarray:
        """At most max_tokens targets (-1: the whole split), from row groups in a fixed shuffled order."""
        order = UnitOrder(list_shards(self.source, split), seed=0, streams=1)
        packer = packer or Packer(self.tokenizer, sequence_len + 1)
        wanted = max_tokens // sequence_len if max_tokens >= 0 else sys.maxsize
        parts = (packer.rows(order[number]) for number in range(order.per_epoch))
        rows = np.concatenate(list(up_to(parts, wanted, len)))[:wanted]
        if not len(rows):
            raise UserError(f"the {split} split of {self.source} does not fill one row of {sequence_len + 1} tokens")
        return rows

    def horizon_in_epochs(self, sequence_len: int, tokens: int, rows_per_step: int = 1) -> tuple[float, float]:
        """From a sample of up to eight units. Where an epoch has fewer units than a step has rows, the first step alone
        goes through it more than once, and that is the least."""
        order = UnitOrder(list_shards(self.source, "train"), seed=0, streams=rows_per_step)
        packer = Packer(self.tokenizer, sequence_len + 1)
        for number in sample(order.per_epoch, 8):
            packer.rows(order[number])
        if not packer.kept and not any(len(packer.rows(order[number])) for number in range(order.per_epoch)):
            raise order.too_little_text(sequence_len)
        available = packer.kept / max(packer.text_bytes, 1) * dataset_bytes(self.source, "train")
        in_first_step = rows_per_step / order.per_epoch
        epochs = max(tokens / max(available, 1.0), in_first_step if in_first_step > 1 else 0.0)
        return epochs, packer.cropped / max(packer.kept + packer.cropped, 1)
