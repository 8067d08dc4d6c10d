"""Conversations -> packed rows with masked targets: the row source of mid-training and supervised fine-tuning.

- Order: each epoch shuffles the conversations by (seed, epoch) and takes them CHUNK at a time; every chunk is packed by
  itself into rows. The rows of all chunks, one after the other, are the global order; each conversation comes once an
  epoch.
- State: two integers, the same on every rank: the chunk, and the rows of it that have been used.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat.data.packing import pack_conversations, stream_rows
from nanochat.data.parquet import up_to
from nanochat.data.rows import RowSource, sample
from nanochat.errors import UserError
from nanochat.flags import LossOn, Packing
from nanochat.runtime import IGNORE_INDEX
from nanochat.tokenizer import RustBPETokenizer

CHUNK = 512  # conversations packed at a time
FINGERPRINTED = 200  # conversations hashed to know the data again
SAMPLED_CHUNKS = 32  # packed to find out how many rows an epoch has; up to as many, the count is exact


class Conversations(Protocol):
    """What of a task is needed here."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class PackedChunk(NamedTuple):
    """Rows of some conversations: inputs and targets, each (R, T) int32; how many tokens were cut off, of how many
    conversations, and how many of these have no target left."""

    inputs: np.ndarray
    targets: np.ndarray
    cut: int
    shortened: int
    emptied: int


class Epoch(NamedTuple):
    """What an epoch comes to, from some of it (from all where `exact`)."""

    rows: int
    trained: float  # share of the positions that carry a loss
    cut: float  # share of the tokens cut off
    shortened: float  # share of the conversations that are longer than a row
    emptied: float  # share of those that nothing is trained on of, since all answers lie beyond the row
    exact: bool


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class ChatPacker:
    """Conversations of a task -> rows of sequence_len inputs and targets. packing "bestfit" keeps conversations whole
    (longer ones than a row are cut at its end) and pads; "stream" cuts the flat stream anywhere. loss_on "assistant"
    trains on what the assistant says, "all" on every token but padding."""

    def __init__(
        self,
        tokenizer: RustBPETokenizer,
        task: Conversations,
        sequence_len: int,
        packing: Packing,
        loss_on: LossOn,
        seed: int = 0,
    ) -> None:
        if len(task) == 0:
            raise UserError("no conversations to train on: the tasks given are empty")
        self.tokenizer, self.task, self.sequence_len = tokenizer, task, sequence_len
        self.packing, self.loss_on, self.seed = packing, loss_on, seed
        self.per_epoch = -(-len(task) // CHUNK)

    def chunk(self, number: int) -> PackedChunk:
        """Chunk `number`, counted through all epochs."""
        epoch, within = divmod(number, self.per_epoch)
        order = epoch_order(self.seed, epoch, len(self.task))
        return self.pack(order[within * CHUNK : (within + 1) * CHUNK].tolist(), number)

    def pack(self, items: list[int], key: int = 0) -> PackedChunk:
        """These conversations of the task; best-fit rows in an order drawn from `key`."""
        row_len, bos = self.sequence_len + 1, self.tokenizer.get_bos_token_id()
        # a stream has no need to cut conversations, but those of a million tokens are a mistake in any case
        longest = row_len if self.packing == "bestfit" else 1_000_000
        rendered = []
        cut = shortened = emptied = 0
        for item in items:
            ids, trained = self.tokenizer.render_conversation(self.task[item], max_tokens=1_000_000)
            trained = trained if self.loss_on == "assistant" else [1] * len(ids)
            cut += max(0, len(ids) - longest)
            shortened += len(ids) > longest
            emptied += any(trained) and not any(trained[:longest])
            rendered.append((ids[:longest], trained[:longest]))
        if self.packing == "bestfit":
            tokens, masks = pack_conversations(rendered, row_len, pad=bos)
            order = np.random.default_rng((self.seed, key)).permutation(len(tokens))  # packing puts long ones first
            tokens, masks = tokens[order], masks[order]
        else:
            tokens, masks = stream_rows(rendered, row_len, pad=bos)
        return PackedChunk(
            tokens[:, :-1], np.where(masks[:, 1:] == 1, tokens[:, 1:], IGNORE_INDEX), cut, shortened, emptied
        )

    def fingerprint(self) -> str:
        """16 hex digits over the number of conversations and the tokens of up to FINGERPRINTED of them, so that a run
        is not resumed on other data."""
        digest = hashlib.sha256(str(len(self.task)).encode())
        for item in sample(len(self.task), FINGERPRINTED):
            ids, mask = self.tokenizer.render_conversation(self.task[item], max_tokens=self.sequence_len)
            digest.update(json.dumps([ids, mask]).encode())
        return digest.hexdigest()[:16]

    def rows_per_epoch(self) -> Epoch:
        """From up to SAMPLED_CHUNKS chunks of the first epoch."""
        numbers = sample(self.per_epoch, SAMPLED_CHUNKS)
        rows = trained = cut = conversations = shortened = emptied = 0
        for number in numbers:
            chunk = self.chunk(number)
            rows += len(chunk.inputs)
            trained += int((chunk.targets != IGNORE_INDEX).sum())
            cut, shortened, emptied = cut + chunk.cut, shortened + chunk.shortened, emptied + chunk.emptied
            conversations += min(CHUNK, len(self.task) - number * CHUNK)
        positions = rows * self.sequence_len
        estimate = max(1, round(rows * len(self.task) / conversations))
        shares = trained / positions, cut / (cut + positions), shortened / conversations, emptied / conversations
        return Epoch(estimate, *shares, exact=len(numbers) == self.per_epoch)


class ChatRows(RowSource):
    """The rows of all chunks one after the other."""

    def __init__(self, packer: ChatPacker) -> None:
        self.packer, self.sequence_len = packer, packer.sequence_len
        self.filler_token = packer.tokenizer.get_bos_token_id()
        self._position = 0, 0, 1  # chunk, rows of it that have been used, and how many it has

    def identity(self) -> dict[str, Any]:
        packer = self.packer
        return {"seed": packer.seed, "conversations": len(packer.task), "sequence_len": packer.sequence_len}

    def seek(self, state: dict[str, Any]) -> None:
        self._position = state["chunk"], state["taken"], len(self.packer.chunk(state["chunk"]).inputs)

    def in_order(self) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int, int]]]:
        number, taken, _ = self._position
        while True:
            chunk = self.packer.chunk(number)
            for row in range(taken, len(chunk.inputs)):
                yield chunk.inputs[row], chunk.targets[row], (number, row + 1, len(chunk.inputs))
            number, taken = number + 1, 0

    def state(self, position: tuple[int, int, int]) -> dict[str, Any]:
        return {"chunk": position[0], "taken": position[1]}

    def epoch(self, position: tuple[int, int, int]) -> float:
        chunk, taken, rows = position
        return (chunk + taken / rows) / self.packer.per_epoch


def evaluation_rows(packer: ChatPacker, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), each (R, T): the first conversations of the task, packed, up to max_tokens positions."""
    rows, items = max(1, max_tokens // packer.sequence_len), range(len(packer.task))
    chunks = (packer.pack(list(items[first : first + CHUNK])) for first in items[::CHUNK])
    inputs, targets, *_ = zip(*up_to(chunks, rows, lambda chunk: len(chunk.inputs)), strict=True)
    return np.concatenate(inputs)[:rows], np.concatenate(targets)[:rows]
