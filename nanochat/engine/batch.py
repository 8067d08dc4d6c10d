"""Continuous batching: rows that are decoded together, and join and leave while the others go on."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.engine.graphs import Graphs
from nanochat.engine.kv_cache import CHUNK, KVCache
from nanochat.engine.sampling import Row, on_device, sample_rows
from nanochat.runtime import heartbeat

MIN_SHARED = 16  # tokens at the beginning of a prompt that are worth a copy of what another row has of them


class Batch:
    """Rows that are decoded together; they join and leave while the others go on.

    The cache has `rows` places for rows that are decoded, always the first ones, and `prefills` more, in which prompts
    go through the model, CHUNK tokens at a time. With `remember`, what a row that has left has in the cache stays as
    long as there is room, so that what a later prompt begins with need not be computed again.
    """

    def __init__(
        self, model: Any, forward: Callable[..., Tensor], rows: int, prefills: int, length: int, remember: bool = False
    ) -> None:
        self.shape = rows, prefills, length
        self.forward, self.size, self.remember, self.device = forward, rows, remember, model.get_device()
        config, dtype = model.config, getattr(model, "compute_dtype", torch.float32)
        self.document_token = getattr(config, "document_token", -1)  # stand-ins of a model say no more than its shape
        # one more position than asked for: on a GPU, a row takes part in one step more than it needs
        shape = (rows + prefills, config.n_kv_head, length + 1, config.n_embd // config.n_head, config.n_layer)
        windows = [config.window(layer) for layer in range(config.n_layer)] if hasattr(config, "window") else ()
        self.cache = KVCache(*shape, self.device, dtype, windows, getattr(config, "key_offset", False))
        step = getattr(forward, "step", None)  # of a model that is fused
        self.graphs = Graphs(self.cache, step, rows) if step is not None and self.device.type == "cuda" else None
        # a CPU plans products in bf16 for each number of rows, with AMX in 58 ms (d4); not over what is remembered
        self.multiple = 16 if dtype == torch.bfloat16 and not remember else 1
        self.waiting: deque[list[Row]] = deque()  # samples of one prompt each
        self.reading: list[list[Row]] = []  # those whose prompts are in the last places of the cache, in part
        self.live: list[Row] = []  # row i of the cache is live[i]
        self.past: dict[int, list[int]] = {}  # tokens that free places still hold, the oldest first
        self.sampled = torch.empty(0, dtype=torch.long, device=self.device)  # what comes next in each live row
        self.behind = False  # whether that is not computed yet

    def __len__(self) -> int:
        """Rows that have not ended, those that wait among them."""
        return len(self.live) + sum(map(len, [*self.waiting, *self.reading]))

    def join(self, samples: list[Row]) -> None:
        """Take in the samples of one prompt, as soon as there is room for all of them."""
        assert len(samples) <= self.size, f"{len(samples)} samples in a batch of {self.size} rows"
        self.waiting.append(samples)

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Rows that nobody waits for any more."""
        for row in rows:
            row.ended = True
        self._remove_ended()
        self.waiting = deque(samples for samples in self.waiting if not all(row.ended for row in samples))

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int, int]]:
        """Read some of the prompts that wait, then one more token of each live row: (row, token, mask)."""
        heartbeat()
        if self.behind and self.live:
            self._decode([row.tokens[-1] for row in self.live], 0)
        self.read_prompts()
        rows, sampled = list(self.live), self.sampled
        # On a GPU, the next tokens are computed while the host looks at these: it never waits for an idle device. Not
        # where a step must be recorded first: the first token of an answer need not wait for that.
        ahead = self.graphs is not None and self.graphs.are_recorded(rows)
        if ahead:
            sampled = sampled.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._decode([row.forced[0] if row.forced else -1 for row in rows], 1)
            copied.synchronize()
        tokens = [(row, *row.next_token(token)) for row, token in zip(rows, sampled.tolist(), strict=True)]
        self._remove_ended()
        self.behind = not ahead and bool(self.live)
        return tokens

    def _decode(self, known: list[int], ahead: int) -> None:
        """Each live row reads its next token, known[i] or, where that is -1, what was sampled, and samples another."""
        tokens = self.sampled
        if max(known) >= 0:
            given = on_device(self.device, known)
            tokens = torch.where(given < 0, tokens, given)
        if self.graphs is not None:
            self.sampled = self.graphs.step(self.live, tokens, ahead)
        else:
            count = len(self.live)
            most = min(-(-count // self.multiple) * self.multiple, self.size)
            self.cache.rows(count, most).reset()
            tokens = F.pad(tokens, (0, most - count)).unsqueeze(1)
            logits = self.forward(tokens, kv_cache=self.cache.rows(0, most))
            self.sampled = sample_rows(self.live, logits[:count, -1], ahead)

    @torch.inference_mode()
    def read_prompts(self) -> None:
        """Let the prompts in the last places of the cache go on by CHUNK tokens; rows whose prompts end go live."""
        self._begin_prompts()
        if not self.reading:
            return
        cache = self.cache.rows(self.size, self.size + len(self.reading))
        starts = cache.lengths.tolist()
        prompts = [samples[0].tokens for samples in self.reading]
        width = min(CHUNK, max(map(len, prompts)) - min(starts), cache.max_seq_len - max(starts))
        parts = [prompt[start : start + width] for prompt, start in zip(prompts, starts, strict=True)]
        width = max(map(len, parts))
        cache.take([len(part) for part in parts])
        padded = [part + part[-1:] * (width - len(part)) for part in parts]
        logits = self.forward(torch.tensor(padded, device=self.device), kv_cache=cache)[:, -1]
        whole = [i for i, prompt in enumerate(prompts) if starts[i] + len(parts[i]) == len(prompt)]
        self._go_live(whole, logits)

    def _begin_prompts(self) -> None:
        places, taken = len(self.cache.lengths) - self.size, len(self.live) + sum(map(len, self.reading))
        while self.waiting and len(self.reading) < places and taken + len(self.waiting[0]) <= self.size:
            place, samples = self.size + len(self.reading), self.waiting.popleft()
            taken += len(samples)
            self.reading.append(samples)
            self.cache.rows(place, place + 1).reset()
            if self.remember:
                self._reuse(place, samples[0].tokens)

    def _reuse(self, place: int, prompt: list[int]) -> None:
        """Copy what another row has computed of the beginning of this prompt; its last token is read in any case."""
        held = self.past | {i: row.tokens for i, row in enumerate(self.live)}
        best, source = 0, -1
        for i, tokens in held.items():
            pairs = zip(prompt[:-1], tokens[: int(self.cache.lengths[i])], strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if common > best and self.cache.can_rewind(i, common):
                best, source = common, i
        if best >= MIN_SHARED:
            self.cache.copy_rows([source], [place])
            self.cache.rewind(place, prompt[:best], self.document_token)

    def _go_live(self, whole: list[int], logits: Tensor) -> None:
        """The samples of these of the prompts being read get places of their own."""
        rows = [row for i in whole for row in self.reading[i]]
        if not rows:
            return
        first, place = len(self.live), [i for i in whole for _ in self.reading[i]]
        for target in range(first, first + len(rows)):
            self._make_free(target, first + len(rows))
        self.cache.copy_rows([self.size + i for i in place], range(first, first + len(rows)))
        rest = [i for i in range(len(self.reading)) if i not in whole]
        self.cache.copy_rows([self.size + i for i in rest], range(self.size, self.size + len(rest)))
        self.reading = [self.reading[i] for i in rest]
        self.sampled = torch.cat([self.sampled, sample_rows(rows, logits[place], 0)])
        self.live += rows
        if any(row.ended for row in rows):  # left while its prompt was read
            self._remove_ended()

    def _make_free(self, place: int, first_free: int) -> None:
        """What is remembered at `place` goes to another free place, unless it is the oldest."""
        if place in self.past:
            empty = [i for i in range(first_free, self.size) if i not in self.past]
            others = empty or [i for i in itertools.takewhile(lambda i: i != place, self.past) if i >= first_free]
            tokens = self.past.pop(place)
            if others:
                self.cache.copy_rows([place], others[:1])
                self.past.pop(others[0], None)
                self.past[others[0]] = tokens

    def _remove_ended(self) -> None:
        """Close up, so that the live rows are the first ones."""
        count = sum(not row.ended for row in self.live)
        if count == len(self.live):
            return
        holes = [i for i in range(count) if self.live[i].ended]
        movers = [i for i in range(count, len(self.live)) if not self.live[i].ended]
        order = list(range(len(self.live)))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole], order[mover] = mover, hole
        if self.remember:  # they change places
            self.cache.copy_rows(holes + movers, movers + holes)
            self.past |= {place: self.live[order[place]].tokens for place in range(count, len(order))}
        else:
            self.cache.copy_rows(movers, holes)
        self.live = [self.live[i] for i in order[:count]]
        self.sampled = self.sampled[on_device(self.device, order[:count])]
