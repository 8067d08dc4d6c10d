"""Conversations -> packed token rows with masked targets, in one global order for any number of ranks, resumable.

The order. Each epoch shuffles the conversations by (seed, epoch) and takes them CHUNK at a time; every chunk is packed
by itself into rows. The rows of all chunks, one after the other, are the global sequence; rank r of W takes rows r,
r + W, … of every global batch, and rows of filler where that does not come out even or leaves nothing (see
batching.py). So every number of ranks sees the same batches, each conversation comes once an epoch, and the state is
two integers: the chunk, and the rows of it that have been used.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from nanochat.data.batching import even_batches
from nanochat.data.packing import pack_conversations, stream_rows
from nanochat.data.prefetch import Prefetcher
from nanochat.dataloader import PREFETCH_BATCHES, Batch
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX
from nanochat.tasks.common import Task

Packing = Literal["bestfit", "stream"]
LossOn = Literal["assistant", "all"]
CHUNK = 512  # conversations packed at a time
FINGERPRINTED = 200  # conversations hashed to know the data again
SAMPLED_CHUNKS = 32  # packed to find out how many rows an epoch has; up to as many, the count is exact


class Renderer(Protocol):
    """The part of a tokenizer that is needed here."""

    def get_bos_token_id(self) -> int: ...

    def render_conversation(self, conversation: Any, max_tokens: int) -> tuple[list[int], list[int]]: ...


class PackedChunk(NamedTuple):
    """Rows of some conversations: inputs and targets, each (R, T) int32, and how many tokens were cut off."""

    inputs: np.ndarray
    targets: np.ndarray
    cut: int


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch goes through `count` items."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class ChatPacker:
    """Conversations of a task -> rows of sequence_len inputs and targets.

    packing "bestfit" keeps conversations whole (longer ones than a row are cut at its end) and pads; "stream" cuts the
    flat stream anywhere. loss_on "assistant" trains on what the assistant says, "all" on every token but padding.
    """

    def __init__(
        self, tokenizer: Renderer, task: Task, sequence_len: int, packing: Packing, loss_on: LossOn, seed: int = 0
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
        rendered, cut = [], 0
        for item in items:
            ids, trained = self.tokenizer.render_conversation(self.task[item], max_tokens=1_000_000)
            cut += max(0, len(ids) - longest)
            ids, trained = ids[:longest], trained[:longest]
            rendered.append((ids, trained if self.loss_on == "assistant" else [1] * len(ids)))
        if self.packing == "bestfit":
            tokens, masks = pack_conversations(rendered, row_len, pad=bos)
            order = np.random.default_rng((self.seed, key)).permutation(len(tokens))  # packing puts long ones first
            tokens, masks = tokens[order], masks[order]
        else:
            tokens, masks = stream_rows(rendered, row_len, pad=bos)
        return PackedChunk(tokens[:, :-1], np.where(masks[:, 1:] == 1, tokens[:, 1:], IGNORE_INDEX), cut)

    def fingerprint(self) -> str:
        """16 hex digits over the number of conversations and the tokens of up to FINGERPRINTED of them, so that a run
        is not resumed on other data."""
        digest = hashlib.sha256(str(len(self.task)).encode())
        for item in np.unique(np.linspace(0, len(self.task) - 1, FINGERPRINTED).astype(int)).tolist():
            ids, mask = self.tokenizer.render_conversation(self.task[item], max_tokens=self.sequence_len)
            digest.update(json.dumps([ids, mask]).encode())
        return digest.hexdigest()[:16]

    def rows_per_epoch(self) -> tuple[int, float, float]:
        """(rows in an epoch, share of positions that carry a loss, share of tokens cut off), from up to SAMPLED_CHUNKS
        chunks of the first epoch."""
        numbers = np.unique(np.linspace(0, self.per_epoch - 1, min(SAMPLED_CHUNKS, self.per_epoch)).astype(int))
        rows = trained = cut = conversations = 0
        for number in numbers.tolist():
            chunk = self.chunk(number)
            rows += len(chunk.inputs)
            trained += int((chunk.targets != IGNORE_INDEX).sum())
            cut += chunk.cut
            conversations += min(CHUNK, len(self.task) - number * CHUNK)
        positions = rows * self.sequence_len
        estimate = max(1, round(rows * len(self.task) / conversations))
        return estimate, trained / positions, cut / (cut + positions)


class ChatLoader:
    """Endless micro-batches for one rank, prepared ahead in a thread. `state_dict()` between optimizer steps.

    rows_per_step rows are dealt to world_size ranks, of any number, in batches_per_step micro-batches of at most
    device_batch_size rows (the attribute says how many it came to); see batching.plan_batch.
    """

    def __init__(
        self,
        packer: ChatPacker,
        rows_per_step: int,
        device_batch_size: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.packer, self.rows_per_step = packer, rows_per_step
        self.device, self.rank, self.world_size = torch.device(device), rank, world_size
        rows_of_first = -(-rows_per_step // world_size)  # no rank has more, and all make as many batches
        self.batches_per_step, self.device_batch_size = even_batches(rows_of_first, device_batch_size)
        self._order = {"seed": packer.seed, "conversations": len(packer.task), "sequence_len": packer.sequence_len}
        self._chunk, self._taken = self._check(state)
        self._rows_of_chunk = 1
        self.teaches = True  # whether the step of the batch given last has a target on any rank
        self._given = 0  # batches handed out of the current step
        self._ahead = Prefetcher(self._batches(), PREFETCH_BATCHES, "chat-loader")

    def _check(self, state: dict[str, Any] | None) -> tuple[int, int]:
        if state is None:
            return 0, 0
        for key, value in self._order.items():
            if state[key] != value:
                raise UserError(f"cannot resume the data order: {key} was {state[key]} and is now {value}")
        return state["chunk"], state["taken"]

    def _rows(self) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int, int]]]:
        """(inputs (T,), targets (T,), position after it) of the global sequence, from where the state says."""
        number, taken = self._chunk, self._taken
        while True:
            chunk = self.packer.chunk(number)
            for row in range(taken, len(chunk.inputs)):
                yield chunk.inputs[row], chunk.targets[row], (number, row + 1, len(chunk.inputs))
            number, taken = number + 1, 0

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool, tuple[int, int, int]]]:
        """This rank's micro-batches (inputs, targets), with what is said of the step that each belongs to: whether any
        rank has a target in it, and the position after it."""
        rows = self._rows()
        size = self.device_batch_size
        while True:
            step = [next(rows) for _ in range(self.rows_per_step)]
            teaching = any((row[1] != IGNORE_INDEX).any() for row in step)
            mine = step[self.rank :: self.world_size]
            for first in range(0, self.batches_per_step * size, size):
                inputs, targets = self._fill(mine[first : first + size])
                yield inputs, targets, teaching, step[-1][2]

    def _fill(
        self, rows: list[tuple[np.ndarray, np.ndarray, tuple[int, int, int]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of a micro-batch: these rows, then filler."""
        shape = (self.device_batch_size, self.packer.sequence_len)
        inputs = torch.full(shape, self.packer.tokenizer.get_bos_token_id(), dtype=torch.int32)
        targets = torch.full(shape, IGNORE_INDEX, dtype=torch.int32)
        for i, row in enumerate(rows):
            inputs[i], targets[i] = torch.from_numpy(row[0]), torch.from_numpy(row[1])
        return inputs, targets

    def next_batch(self) -> Batch:
        """The next (device_batch_size, sequence_len) micro-batch. Raises what the background thread ran into."""
        inputs, targets, self.teaches, (self._chunk, self._taken, self._rows_of_chunk) = self._ahead.get()
        self._given = (self._given + 1) % self.batches_per_step
        return Batch(inputs.to(self.device).long(), targets.to(self.device).long())

    def state_dict(self) -> dict[str, Any]:
        """Where the global sequence stands; the same on every rank."""
        assert self._given == 0, "the state is taken between optimizer steps"
        return {**self._order, "chunk": self._chunk, "taken": self._taken}

    def epoch(self) -> float:
        """How often the conversations have been gone through."""
        return (self._chunk + self._taken / self._rows_of_chunk) / self.packer.per_epoch

    def close(self) -> None:
        """Stop the thread; the loader is of no use afterwards."""
        self._ahead.close()


def evaluation_rows(packer: ChatPacker, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), each (R, T): the first conversations of the task, packed, up to max_tokens positions."""
    rows = max(1, max_tokens // packer.sequence_len)
    inputs, targets = [], []
    for first in range(0, len(packer.task), CHUNK):
        chunk = packer.pack(list(range(first, min(first + CHUNK, len(packer.task)))))
        inputs.append(chunk.inputs)
        targets.append(chunk.targets)
        if sum(map(len, inputs)) >= rows:
            break
    return np.concatenate(inputs)[:rows], np.concatenate(targets)[:rows]
