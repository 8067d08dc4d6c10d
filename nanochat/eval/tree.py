"""Scores rows that begin alike: what the options of an item share goes through the model once, the options behind it
side by side (tree attention, as of arXiv 2305.09781), and only the places that predict an answer get logits. So for a
GPT; other models read each row in full."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.gpt import GPT, LOOK_BACK
from nanochat.runtime import heartbeat

# What launching a forward pass costs, in tokens that the device could have read meanwhile: less padding for more passes
OVERHEAD = {"cuda": 4096, "cpu": 32}
MOST_TOKENS = {"cpu": 2048}  # in a forward pass: more do not stay in the caches of a CPU

Model = Callable[..., Tensor]  # a GPT, or any other: idx (B, T) int64 -> logits (B, T, V), whose rows go in full


class Row(NamedTuple):
    """One prompt for the model; the answer is tokens[start:end], 1 <= start < end = len(tokens)."""

    tokens: Sequence[int] | np.ndarray
    start: int
    end: int


class Part(NamedTuple):
    """Tokens in one row of a forward pass, and (number of a row, targets) of answers that its last tokens predict."""

    tokens: Sequence[int] | np.ndarray
    answers: list[tuple[int, Sequence[int] | np.ndarray]]


class Stem(NamedTuple):
    """What the rows of an item share, and the rest of each."""

    trunk: Part
    branches: list[Part]

    @property
    def width(self) -> int:
        """Tokens of the longest branch."""
        return max((len(branch.tokens) for branch in self.branches), default=0)


class Tree:
    """The KV cache (gpt.Cache) of trunks (B,), or of `branches` rows behind each of the trunks `rows` of another.

    Attention has the branches of a trunk side by side in one row, so that its keys are there once; the rest of the
    model has rows that continue their trunk: tokens before, documents and carried keys are those of any cache.
    Windows are those that the model has now, as without a cache.
    """

    incoming: Tensor | None = None

    def __init__(self, model: GPT, lengths: Tensor, trunk: "Tree | None" = None, branches: int = 1) -> None:
        self.model, self.trunk, self.lengths, self.branches = model, trunk, lengths, branches
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.start = torch.zeros_like(lengths)
        self.document_starts = torch.zeros_like(lengths)
        self.last_tokens = torch.zeros(len(lengths), LOOK_BACK, dtype=torch.long, device=lengths.device)
        self.width = 0  # positions of the trunk, padding among them
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of each layer
        self.passed_on: dict[int, Tensor] = {}  # what each layer's last key passes on to the next: see offset_keys

    def grow(self, rows: Tensor, branches: int) -> "Tree":
        """For the branches of these rows, padded to equally many."""
        tree = Tree(self.model, self.lengths[rows], self, branches)
        tree.rows, tree.width, tree.start = rows, self.width, tree.lengths.repeat_interleave(branches)
        tree.document_starts = self.document_starts[rows].repeat_interleave(branches)
        tree.last_tokens = self.last_tokens[rows].repeat_interleave(branches, dim=0)
        return tree

    def get_pos(self) -> int:
        return self.width if self.trunk else 0

    def begin(self, num_tokens: int) -> Tensor:
        self.position = self.start.unsqueeze(1) + torch.arange(num_tokens, device=self.start.device)
        return self.position

    def mask(self, layer: int, window: int, first: Tensor | None) -> Tensor:
        """(B, 1, queries, keys) bool: as KVCache.mask, and no branch sees another."""
        rows, steps = len(self.lengths), self.position.size(1)
        query = self.position.view(rows, -1)
        before = torch.arange(self.get_pos(), device=query.device).expand(rows, -1)
        branch = torch.arange(query.size(1), device=query.device) // steps
        own = (branch.unsqueeze(1) == branch).expand(rows, -1, -1)
        shared = (before < self.lengths.unsqueeze(1)).unsqueeze(1).expand(-1, query.size(1), -1)
        key, query = torch.cat([before, query], dim=1).unsqueeze(1), query.unsqueeze(2)
        reach = self.model.windows[int(self.model.config.is_long(layer))]
        visible = torch.cat([shared, own], dim=2) & (key <= query) & (query - key <= reach)
        if first is not None:
            visible &= key >= first.reshape(rows, -1, 1)
        return visible.unsqueeze(1)

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (x.reshape(len(self.lengths), -1, *x.shape[2:]) for x in (k, v))
        if self.trunk is None:
            self.kept[layer] = k, v
            return k, v
        keys, values = (x[self.rows] for x in self.trunk.kept[layer])
        return torch.cat([keys, k], dim=1), torch.cat([values, v], dim=1)

    def last(self, x: Tensor) -> Tensor:
        return x[self.rows, self.lengths - 1] if self.trunk is None else x[:, -1]

    def note_tokens(self, idx: Tensor) -> None:
        if self.trunk is None:
            text = torch.cat([self.last_tokens, idx], dim=1)
            self.last_tokens = text.gather(1, self.lengths.unsqueeze(1) + torch.arange(LOOK_BACK, device=idx.device))

    def carried(self, layer: int) -> Tensor:
        if self.trunk is not None:
            return self.trunk.passed_on[layer][self.rows].repeat_interleave(self.branches, dim=0)
        config = self.model.config
        shape = (len(self.lengths), 1, config.n_kv_head, 2, config.head_dim // 4)
        return torch.zeros(shape, device=self.start.device, dtype=self.model.compute_dtype)

    def carry(self, layer: int, slow: Tensor, carried: Tensor) -> None:
        if self.trunk is None:
            self.passed_on[layer] = self.last(slow).unsqueeze(1)

    def advance(self, num_tokens: int) -> None:
        if self.trunk is None:
            self.width = num_tokens


def common_length(sequences: Sequence[Sequence[int] | np.ndarray]) -> int:
    """Length of the common prefix."""
    length = min(map(len, sequences))
    same = np.ones(length, dtype=bool)
    for sequence in sequences[1:]:
        same &= np.asarray(sequence[:length]) == np.asarray(sequences[0][:length])
    return length if same.all() else int(same.argmin())


def make_stems(items: Sequence[Sequence[Row]], least: float) -> list[Stem]:
    """Rows, numbered through, in as few tokens as they can be scored with; in full where that saves fewer than `least`
    in all: sharing takes two forward passes for one."""
    numbers = list(itertools.accumulate(map(len, items), initial=0))
    prefixes = [min(common_length([row.tokens for row in rows]), *(row.start for row in rows)) for rows in items]
    saved = sum(length * (len(rows) - 1) for length, rows in zip(prefixes, items, strict=True))
    stems = []
    for rows, number, shared in zip(items, numbers, prefixes, strict=False):
        # rows that were cut at different places share nothing
        stems += split(rows, number, shared if len(rows) > 1 and saved >= least else 0)
    return stems


def split(rows: Sequence[Row], number: int, shared: int) -> list[Stem]:
    """The rows of one item, the first of which has this number, and which share so many tokens. Rows that are the same
    are there once: which of two equal options is chosen may not hang on rounding."""
    trunk, branches = Part(rows[0].tokens[:shared], []), dict[tuple[int, ...], Part]()
    for i, row in enumerate(rows, start=number):
        if row.start == shared:
            trunk.answers.append((i, row.tokens[shared : shared + 1]))
        rest = tuple(np.asarray(row.tokens[shared:]).tolist())
        branch = branches.setdefault(rest, Part(rest[:-1], []))
        branch.answers.append((i, row.tokens[max(row.start, shared + 1) :]))
    return [Stem(trunk, list(branches.values()))] if shared else [Stem(branch, []) for branch in branches.values()]


def batches(lengths: Sequence[int], most: int, overhead: int) -> Iterator[list[int]]:
    """Numbers of what goes into one forward pass of at most `most` tokens (but one row at least), the longest first: so
    that padding and `overhead` tokens a pass are fewest together."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    cost, begin = np.full(len(order) + 1, np.inf), np.zeros(len(order) + 1, dtype=int)
    cost[0] = 0
    for i, number in enumerate(order):  # the best way to have the first i in batches is known
        count = np.arange(1, 1 + min(max(1, most // max(1, lengths[number])), len(order) - i))
        total = cost[i] + overhead + count * lengths[number]
        better = total < cost[i + count]
        cost[(i + count)[better]], begin[(i + count)[better]] = total[better], i
    cuts = [len(order)]
    while cuts[-1] > 0:
        cuts.append(int(begin[cuts[-1]]))
    for end, start in zip(cuts[-2::-1], cuts[:0:-1], strict=True):
        yield order[start:end].tolist()


@torch.no_grad()
def score(
    model: Model, items: Sequence[Sequence[Row]], device: torch.device, pad: int, max_tokens: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean loss of each row's answer in nats a token, float64, whether all its tokens are the argmax), each (rows,).
    At most `most` tokens a forward pass, but one row at least, padded to max_tokens at most."""
    scorer = Scorer(model, device, pad, max_tokens, most)
    scorer.add(items)
    return scorer.result(sum(map(len, items)))


class Scorer:
    """Collects the losses of answers; nothing waits for the device before `result`."""

    def __init__(self, model: Model, device: torch.device, pad: int, max_tokens: int, most: int) -> None:
        self.model, self.device, self.pad, self.max_tokens = model, device, pad, max_tokens
        self.most = min(most, MOST_TOKENS.get(device.type, most))
        self.overhead = OVERHEAD.get(device.type, OVERHEAD["cuda"])
        self.numbers: list[int] = []
        self.found: list[Tensor] = []  # (2, answers' tokens): loss, hit

    def padded(self, length: int) -> int:
        """Tokens in the rows of a forward pass. On a GPU never a multiple of 64: attention.PLANNED_LENGTHS."""
        return length if self.device.type == "cpu" else min((length + 7) // 16 * 16 + 8, self.max_tokens)

    def add(self, items: Sequence[Sequence[Row]]) -> None:
        stems = make_stems(items, self.overhead if isinstance(self.model, GPT) else math.inf)
        lengths = [self.padded(len(stem.trunk.tokens)) for stem in stems]
        for batch in batches(lengths, self.most, self.overhead):
            chosen = [stems[i] for i in batch]
            trunks = [stem.trunk for stem in chosen]
            more = [i for i, stem in enumerate(chosen) if stem.width]
            if not more:
                self.forward(trunks, None)
                continue
            assert isinstance(self.model, GPT)
            tree = Tree(self.model, self.on_device([len(trunk.tokens) for trunk in trunks]))
            self.forward(trunks, tree)
            count = max(len(chosen[i].branches) for i in more)
            widths = [count * self.padded(chosen[i].width) for i in more]
            for numbers in batches(widths, self.most, self.overhead):
                rows = [more[number] for number in numbers]
                nothing = [Part([], [])] * count
                parts = [part for i in rows for part in (chosen[i].branches + nothing)[:count]]
                self.forward(parts, tree.grow(self.on_device(rows), count))

    def forward(self, parts: Sequence[Part], tree: Tree | None) -> None:
        heartbeat()
        width = self.padded(max(len(part.tokens) for part in parts))
        idx = np.full((len(parts), width), self.pad)
        places: list[int] = []
        targets: list[int] = []
        for i, (tokens, answers) in enumerate(parts):
            idx[i, : len(tokens)] = tokens
            for number, answer in answers:
                end = i * width + len(tokens)
                places += range(end - len(answer), end)
                targets += list(answer)
                self.numbers += [number] * len(answer)
        unique, where = np.unique(np.array(places, dtype=int), return_inverse=True)
        at = self.on_device(unique // width), self.on_device(unique % width)
        text = self.on_device(idx)
        logits = self.model(text, kv_cache=tree, at=at) if isinstance(self.model, GPT) else self.model(text)[at]
        logits = logits.float()
        index, target = self.on_device(where), self.on_device(targets)
        losses = logits.logsumexp(-1)[index] - logits[index, target]
        self.found.append(torch.stack([losses, logits.argmax(-1)[index] == target]))

    def on_device(self, values: Sequence[int] | np.ndarray) -> Tensor:
        """int64, copied without waiting for the device."""
        made = torch.from_numpy(np.asarray(values, dtype=np.int64))
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made

    def result(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(mean loss of the answer in nats a token, float64, whether all its tokens are the argmax), each (rows,)."""
        losses, hits = torch.cat(self.found, dim=1).cpu().numpy().astype(np.float64)
        order = np.argsort(self.numbers, kind="stable")
        numbers, counts = np.unique(self.numbers, return_counts=True)
        assert len(numbers) == rows
        first = np.cumsum(counts) - counts
        # summed on the host in float64: the GPU's scatter-add has no fixed order, and would not repeat bit for bit
        return np.add.reduceat(losses[order], first) / counts, np.logical_and.reduceat(hits[order] > 0, first)
